"""The CUDA walk without a GPU: compiled for each architecture, and run on the CPU."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mosaic_kernels as mk
from mosaic_kernels import _walk

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")
NVCC = shutil.which("nvcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
HOST = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
HOST += [f"-I{CSRC}", str(CSRC / "host/sweep_host.cpp")]


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def host_library(tmp_path_factory):
    target = tmp_path_factory.mktemp("host") / "sweep_host.so"
    run(COMPILER, "-O1", "-shared", "-fPIC", *HOST, "-o", str(target))
    return ctypes.CDLL(str(target))


@pytest.fixture
def steps_host(host_library):
    """Return the steps of a CUDA device, with the walk run by host threads."""

    def walk(state, begin, end):
        batch, m, n = state.weight.shape
        weight, factor, *others = _walk.addresses(state)
        fields = [factor, weight, *others, m, n, begin, end - begin, state.keep, state.of]
        struct = (ctypes.c_int64 * len(fields))(*fields)
        bits = 8 * state.weight.element_size()
        getattr(host_library, f"sweep_block_host_f{bits}")(struct, ctypes.c_int64(batch))

    return _walk.Steps(_walk.choose_torch, walk)


# (batch, rows, columns, sparsity or pattern, block size): rows beside a multiple of the threads,
# columns beside a multiple of the registers, groups wider than them, pieces of U beyond one
CASES = [
    (1, 1, 1, 0.5, 128),
    (2, 9, 75, 0.5, 32),
    (1, 16, 100, 0.9, 100),
    (2, 5, 64, (2, 4), 32),
    (1, 11, 45, (1, 3), 45),
    (1, 3, 80, (7, 20), 40),
    (1, 9, 160, (60, 80), 160),
]


@needs_compiler
@pytest.mark.parametrize("batch, m, n, target, block_size", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_on_the_host(batch, m, n, target, block_size, dtype, steps_host, make_layer, monkeypatch):
    weight, h = make_layer(batch, m, n, dtype)
    share = {"pattern" if isinstance(target, tuple) else "sparsity": target}
    expected = mk.prune_weights(weight, h, block_size=block_size, **share)
    # The factor is the CPU's in both: only the walk is under test.
    monkeypatch.setattr(_walk, "STEPS_CPU", steps_host)
    result = mk.prune_weights(weight, h, block_size=block_size, **share)
    assert torch.equal(result.mask.sum((1, 2)), expected.mask.sum((1, 2)))
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(result.losses, expected.losses, rtol=rtol, atol=0)
    if dtype == torch.float64:
        assert torch.equal(result.mask, expected.mask)
        torch.testing.assert_close(result.weight, expected.weight, rtol=1e-9, atol=1e-9)


@needs_compiler
def test_ties_on_the_host(steps_host, monkeypatch):
    monkeypatch.setattr(_walk, "STEPS_CPU", steps_host)
    result = mk.prune_weights(torch.ones(3, 40), torch.eye(40), pattern=(3, 8))
    assert result.mask.tolist() == [[i % 8 >= 5 for i in range(40)]] * 3
    half = mk.prune_weights(torch.ones(3, 40), torch.eye(40), sparsity=0.5)
    assert half.mask.flatten().tolist() == [False] * 60 + [True] * 60


@pytest.mark.kernels
@needs_compiler
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_under_sanitizers(sanitizer, tmp_path):
    program = str(tmp_path / "program")
    flags = ["-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    flags.append("-DMOSAIC_HOST_MAIN")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    trial = subprocess.run([COMPILER, *flags, str(probe), "-o", program], capture_output=True)
    if trial.returncode or subprocess.run([program], capture_output=True).returncode:
        pytest.skip(f"needs a working -fsanitize={sanitizer}")
    run(COMPILER, *flags, *HOST, str(CSRC / "cpu/sweep.cpp"), "-o", program)
    run(program)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize(
    "architecture",
    ["90", *(pytest.param(other, marks=pytest.mark.kernels) for other in ("80", "100"))],
)
def test_compiles_without_warnings_and_spills(architecture, tmp_path):
    if f"compute_{architecture}" not in run(NVCC, "--list-gpu-arch"):
        pytest.skip(f"needs an nvcc that compiles for sm_{architecture}")
    report = run(
        NVCC,
        *("-c", str(CSRC / "cuda/sweep.cu"), "-o", str(tmp_path / "sweep.o"), f"-I{CSRC}"),
        *("-std=c++17", "-O3", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"),
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
    )
    # Both types: no spill, and no row in local memory for want of a constant index.
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report)
    assert spills == [("0", "0", "0")] * 2, report
