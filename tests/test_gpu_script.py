"""benchmarks/gpu.sh as far as it goes without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )


def test_dry_run_prints_every_part(tmp_path):
    out = tmp_path / "out"
    done = run("--dry-run", TORCH_CUDA_ARCH_LIST="9.0a", OUT=str(out))
    assert (done.returncode, done.stderr) == (0, "")
    for expected in (
        "MOSAIC_BUILD=cuda TORCH_CUDA_ARCH_LIST=9.0a",
        "--tool racecheck",
        *(
            f"benchmarks.bench_{name} --device cuda"
            for name in ("hessian", "cholesky", "sweep", "joint", "prune", "speed")
        ),
    ):
        assert expected in done.stdout
    summary = done.stdout.split("== summary\n")[1].splitlines()
    names = ["build", "test", "models", "kernels", "sanitize"]
    names += ["hessian", "cholesky", "sweep", "joint", "prune", "speed"]
    assert [line.split(":")[0] for line in summary] == names
    assert not out.exists()


def test_parts_are_chosen_by_name():
    done = run("bench", "--dry-run")
    assert [line for line in done.stdout.splitlines() if line.startswith("== ")] == [
        "== hessian",
        "== cholesky",
        "== sweep",
        "== joint",
        "== prune",
        "== summary",
    ]
    done = run("benches")
    assert done.returncode == 2 and "a part must be one of build test" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_refuses_without_a_device():
    done = run("build")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.endswith(
        "gpu.sh: a CUDA device must be visible to torch, got none. Use 'make test' on this "
        "machine.\n"
    )
    done = run("build", PYTHON="false")
    assert done.returncode == 2 and "torch must be importable by false" in done.stderr


def test_a_failing_part_fails_the_run_and_the_others_run(tmp_path):
    """A stand-in for python: it has a device, builds, and fails every test."""
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *pytest*) echo broken; exit 1;; *capability*) echo 9.0;; esac\n'
    )
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    done = run("test", "cholesky", PYTHON=str(fake), **environment)
    assert done.returncode == 1
    assert "test: FAILED" in done.stdout and "cholesky: passed" in done.stdout
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert "broken" in log and "test: FAILED" in log
    assert run("cholesky", PYTHON=str(fake), **environment).returncode == 0
