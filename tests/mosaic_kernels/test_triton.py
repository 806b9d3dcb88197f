"""The Triton kernels without a GPU: interpreted, and compiled for each architecture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ahead_of_time import POINTERS, compile_kernel, ptxas_report, spilled_bytes

triton = pytest.importorskip("triton", reason="needs triton")

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Bytes a block may use: 99 KiB on sm_86, sm_89 and sm_120, which share a table with sm_80.
SHARED = {80: 101376, 90: 232448, 100: 232448}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def interpret(*arguments):
    script = Path(__file__).with_name("interpret_hessian.py")
    run = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "the interpreter agrees" in run.stdout


@pytest.mark.interpreter
def test_interpreted():
    interpret()


@pytest.mark.interpreter
@pytest.mark.kernels
def test_interpreted_in_every_configuration():
    interpret("all")


def compile_product(architecture, dtype, config, has_sum, weighted, **fixed):
    """Compile ahead of time; ``fixed`` are sizes of one, which a launch makes constants."""
    from mosaic_kernels._triton import hessian

    kernel = hessian._product_kernel
    constants = {
        "HAS_SUM": has_sum,
        "WEIGHTED": weighted,
        "TWO_SUMS": config.two_sums,
        "ROWS": config.rows,
        "COLS": config.cols,
        "TOKENS": config.tokens,
        "PRECISION": hessian.precision(dtype),
        **fixed,
    }
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("parts_ptr", "sums_ptr", "weights_ptr"), "*fp32")
    types |= {"x_ptr": POINTERS[dtype], "units_ptr": "*i32", "batch_stride": "i64"}
    arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
    # Pointers from torch are aligned, and widths of layers are multiples of 16.
    sizes = [name for name in ("n", "batch_stride", "token_stride") if name in arguments]
    aligned = [name for name in arguments if name.endswith("_ptr")] + sizes
    options = {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }
    return compile_kernel(kernel, architecture, arguments, constants, options, aligned)


def check_product(architecture, dtype, config, has_sum, weighted, folder):
    kernel = compile_product(architecture, dtype, config, has_sum, weighted)
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED[architecture]
    report = ptxas_report(architecture, ptx, folder)
    assert spilled_bytes(report) == 0
    assert "serialized" not in report  # ptxas makes wgmma wait for each other where it must
    assert MATRIX_INSTRUCTION[architecture] in ptx
    assert "cp.async" in ptx  # the next tokens are loaded while these are multiplied
    products = [line for line in kernel.asm["ttir"].splitlines() if "tt.dot " in line]
    assert len(products) == 1
    if dtype == torch.float32:
        assert "tf32x3" in products[0]  # never plain TF32
    elif architecture == 90:
        assert f"wgmma.mma_async.sync.aligned.m64n{config.cols}k16" in ptx


def uses(architecture, dtype):
    from mosaic_kernels._triton.hessian_configs import TABLE

    for use in ("wide", "two sums"):
        yield from TABLE[architecture][use, 8 * dtype.itemsize]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiles_for_hopper(dtype, tmp_path):
    check_product(90, dtype, next(uses(90, dtype)), True, False, tmp_path)


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_configuration_compiles(architecture, dtype, tmp_path):
    for config in uses(architecture, dtype):
        for has_sum in (True, False):
            for weighted in (True, False) if config.two_sums else (False,):
                check_product(architecture, dtype, config, has_sum, weighted, tmp_path)


def compile_merge(architecture, config, has_sum, compensated, **fixed):
    from mosaic_kernels._triton import hessian

    kernel = hessian._merge_kernel
    constants = {
        "HAS_SUM": has_sum,
        "COMPENSATED": compensated,
        "ROWS": config.rows,
        "COLS": config.cols,
        "TILE": min(hessian.MERGE_TILE, config.rows),
        **fixed,
    }
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    types |= {"units_ptr": "*i32", "weight": "fp32"}
    arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
    aligned = [name for name in arguments if name.endswith("_ptr") or name == "n"]
    options = {"num_warps": 8, "enable_fp_fusion": False}
    return compile_kernel(kernel, architecture, arguments, constants, options, aligned)


def check_merge(architecture, config, has_sum, compensated, folder):
    kernel = compile_merge(architecture, config, has_sum, compensated)
    assert kernel.metadata.shared <= SHARED[80]
    ptx = kernel.asm["ptx"]
    assert "fma.rn.f32" not in ptx  # a fused product has another error than the two-sum finds
    assert spilled_bytes(ptxas_report(architecture, ptx, folder)) == 0


def test_merge_compiles(tmp_path):
    check_merge(90, next(uses(90, torch.bfloat16)), True, True, tmp_path)


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("compensated", [True, False])
def test_every_merge_compiles(architecture, compensated, tmp_path):
    shapes = {
        (config.rows, config.cols): config
        for dtype in FLOATS
        for config in uses(architecture, dtype)
    }
    for config in shapes.values():
        for has_sum in (True, False):
            check_merge(architecture, config, has_sum, compensated, tmp_path)


def test_compiles_where_a_launch_fixes_sizes_to_one():
    config = list(uses(90, torch.float16))[2]
    compile_product(90, torch.float16, config, True, True, n=1, batch_stride=1, token_stride=1)
    compile_merge(90, config, True, True, n=1)
