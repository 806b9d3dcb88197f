"""Imports point one way, files stay short, and importing is free."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mosaic_kernels", "mosaicdiff")
#: The parts of mosaicdiff that touch diffusers; mathematics takes tensors and numbers.
KNOW_DIFFUSERS = (
    "adapters", "checkpoint.py", "checkpoint_load.py", "composition", "evaluate", "execution",
    "families.py",
    "integration.py", "pipeline.py",
    "request.py", "runtime.py", "single_file", "sources.py", "sweeping.py", "cli",
)  # fmt: skip
MATHEMATICS = (
    "groups.py", "allocation/shares.py", "allocation/budget.py", "allocation/costs.py",
    "allocation/items.py", "allocation/optimal.py", "allocation/planning.py", "solving/curves.py",
    "solving/solve.py", "solving/weights.py", "trajectory/schedule.py", "trajectory/stages.py",
)  # fmt: skip
#: Longer than 400 lines, with the reason.
LONG_FILES: dict[str, str] = {}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of the packages a file imports; relative imports count as their own."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0] if node.level == 0 else f".{node.module or ''}")
    return names


@pytest.mark.parametrize("path", sources("mosaic_kernels"), ids=str)
def test_kernels_know_torch_only(path):
    assert not imported(path) & {"diffusers", "mosaicdiff", "benchmarks", "click", "rich"}


def test_mathematics_is_there():
    assert all((ROOT / "mosaicdiff" / name).is_file() for name in MATHEMATICS)


@pytest.mark.parametrize("path", sources("mosaicdiff"), ids=str)
def test_engine_imports(path):
    place = path.relative_to(ROOT / "mosaicdiff")
    part, names = place.parts[0], imported(path)
    assert "benchmarks" not in names
    if part not in KNOW_DIFFUSERS:
        assert "diffusers" not in names
    if part not in ("cli", "__main__.py"):
        assert "click" not in names and ".cli" not in names
    if place.as_posix() in MATHEMATICS:
        assert not names & {".runtime", ".pipeline", ".checkpoint", ".sources", ".adapters"}


@pytest.mark.parametrize(
    "path",
    [
        path
        for folder in (*PACKAGES, "csrc", "benchmarks", "tests")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh")
    ],
    ids=str,
)
def test_files_stay_short(path):
    lines = len(path.read_text().splitlines())
    name = str(path.relative_to(ROOT))
    assert lines <= 400 or name in LONG_FILES


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_free(package):
    """No CUDA start, nothing printed, no seed drawn, and none of the heavy optional packages."""
    code = f"""
import sys, torch
threads, state = torch.get_num_threads(), torch.get_rng_state()
import {package}
assert not torch.cuda.is_initialized()
assert threads == torch.get_num_threads()
assert torch.equal(state, torch.get_rng_state())
heavy = [m for m in ("matplotlib", "sklearn", "click") if m in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
