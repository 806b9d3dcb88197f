"""The CUDA panel for single columns, run on the CPU, and what holds for every CUDA kernel."""

import ctypes
import os
import subprocess

import pytest
import torch
from host_builds import (
    COMPILER,
    KERNELS,
    PROGRAMS,
    compile_cuda,
    host_library,
    host_program,
    needs_compiler,
    needs_nvcc,
    run,
)

import mosaic_kernels as mk
from mosaic_kernels import _elimination


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return host_library("prune_host", tmp_path_factory.mktemp("host"))


@pytest.fixture
def panel_host(library):
    """Return the CUDA panel, run by host threads."""

    def run_panel(state, pivots):
        panel = _elimination.empty_panel(state, pivots)
        batch, n = state.inverse.shape[:2]
        fields = [*_elimination.addresses(state, panel), n, 1, pivots]
        struct = (ctypes.c_int64 * len(fields))(*fields)
        bits = 8 * state.inverse.element_size()
        getattr(library, f"prune_panel_host_f{bits}")(struct, ctypes.c_int64(batch))
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


@pytest.mark.kernels
@needs_compiler
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_sanitizers(program, sanitizer, tmp_path):
    flags = ["-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    probe, built = tmp_path / "probe.cpp", str(tmp_path / "probe")
    probe.write_text("int main() { return 0; }\n")
    trial = subprocess.run([COMPILER, *flags, str(probe), "-o", built], capture_output=True)
    if trial.returncode or subprocess.run([built], capture_output=True).returncode:
        message = f"needs a working -fsanitize={sanitizer}"
        if os.environ.get("MOSAIC_REQUIRE_SANITIZERS"):  # make sanitize
            pytest.fail(message)
        pytest.skip(message)
    run(host_program(program, tmp_path, *flags))


@needs_nvcc
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "architecture",
    ["90", *(pytest.param(other, marks=pytest.mark.kernels) for other in ("80", "100"))],
)
def test_compiles_without_warnings_and_spills(kernel, architecture, tmp_path):
    compile_cuda(kernel, architecture, tmp_path)


def test_every_kernel_runs_on_the_host():
    assert {f"{kernel}_host" for kernel in KERNELS} <= set(PROGRAMS)
