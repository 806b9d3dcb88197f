"""The CUDA panel without a GPU: compiled for each architecture, and run on the CPU."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mosaic_kernels as mk
from mosaic_kernels import _elimination

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")
NVCC = shutil.which("nvcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
HOST = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
HOST += [f"-I{CSRC}", str(CSRC / "host/prune_host.cpp")]


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def host_library(tmp_path_factory):
    target = tmp_path_factory.mktemp("host") / "prune_host.so"
    run(COMPILER, "-O1", "-shared", "-fPIC", *HOST, "-o", str(target))
    return ctypes.CDLL(str(target))


@pytest.fixture
def panel_host(host_library):
    """Return the CUDA panel, run by host threads."""

    def run_panel(state, pivots):
        panel = _elimination.empty_panel(state, pivots)
        batch, n = state.inverse.shape[:2]
        fields = [*_elimination.addresses(state, panel), n, 1, pivots]
        struct = (ctypes.c_int64 * len(fields))(*fields)
        bits = 8 * state.inverse.element_size()
        getattr(host_library, f"prune_panel_host_f{bits}")(struct, ctypes.c_int64(batch))
        return panel

    return run_panel


@needs_compiler
@pytest.mark.parametrize("batch, n, count", [(1, 1, 1), (1, 33, 33), (2, 31, 10), (1, 100, 70)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_on_the_host(batch, n, count, dtype, panel_host, make_layer):
    weight, h = make_layer(batch, 7, n, dtype)
    inverse = mk.cholesky_inverse(h)[0]
    runs = [
        _elimination.eliminate(weight, inverse.clone(), 1, count, panel)
        for panel in (panel_host, _elimination.panel_torch)
    ]
    if dtype == torch.float64:
        assert torch.equal(runs[0][0], runs[1][0])
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(runs[0][1].sum(1), runs[1][1].sum(1), rtol=rtol, atol=0)


@needs_compiler
def test_ties_and_dead_columns_on_the_host(panel_host):
    inverse = torch.eye(40)[None]
    weight = torch.ones(1, 2, 40)
    weight[:, :, 35] = 0
    order, losses = _elimination.eliminate(weight, inverse.clone(), 1, 40, panel_host)
    assert order[0].tolist() == [35, *range(35), *range(36, 40)]
    assert losses[0].tolist() == [0.0] + [2.0] * 39


@needs_compiler
def test_breakdown_on_the_host(panel_host, make_layer):
    weight, h = make_layer(3, 4, 40)
    inverse = mk.cholesky_inverse(h)[0]
    good = _elimination.eliminate(weight, inverse.clone(), 1, 40, panel_host)
    inverse[1, 5, 5] = -1.0
    order, losses = _elimination.eliminate(weight, inverse.clone(), 1, 40, panel_host)
    assert torch.isnan(losses[1]).all() and order[1].tolist() == list(range(40))
    assert torch.equal(losses[[0, 2]], good[1][[0, 2]])


@needs_compiler
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_under_sanitizers(sanitizer, tmp_path):
    program = str(tmp_path / "program")
    flags = ["-g", "-O1", f"-fsanitize={sanitizer}", "-DMOSAIC_HOST_MAIN"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    trial = subprocess.run([COMPILER, *flags, str(probe), "-o", program], capture_output=True)
    if trial.returncode or subprocess.run([program], capture_output=True).returncode:
        pytest.skip(f"needs a working -fsanitize={sanitizer}")
    run(COMPILER, *flags, *HOST, str(CSRC / "cpu/prune.cpp"), "-o", program)
    run(program)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_compiles_without_warnings_and_spills(architecture, tmp_path):
    if f"compute_{architecture}" not in run(NVCC, "--list-gpu-arch"):
        pytest.skip(f"needs an nvcc that compiles for sm_{architecture}")
    report = run(
        NVCC,
        *("-c", str(CSRC / "cuda/prune.cu"), "-o", str(tmp_path / "prune.o"), f"-I{CSRC}"),
        *("-std=c++17", "-O3", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"),
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
    )
    spills = re.findall(r"(\d+) bytes spill", report)
    assert len(spills) == 4 and set(spills) == {"0"}, report
