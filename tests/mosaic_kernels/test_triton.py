"""The Triton kernels without a GPU: interpreted, and compiled for each architecture."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SMALLEST_SHARED = 101376  # bytes a block may use on sm_86, sm_89 and sm_120
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def test_interpreted():
    script = Path(__file__).with_name("interpret_hessian.py")
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "the interpreter agrees" in run.stdout


def compile_update(architecture, dtype, config, has_sum, sizes):
    """Compile ahead of time; ``sizes`` fixes tokens, n and x_stride to one, as a launch would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mosaic_kernels._triton import hessian

    signature = {
        "h_ptr": "*fp32",
        "x_ptr": POINTERS[dtype],
        "sum_ptr": "*fp32",
        "tokens": sizes or "i32",
        "n": sizes or "i32",
        "x_stride": sizes or "i32",
        "weight": "fp32",
        "HAS_SUM": "constexpr",
        "TILE": "constexpr",
        "TOKENS": "constexpr",
    }
    constants = {"HAS_SUM": has_sum, "TILE": config.tile, "TOKENS": config.tokens}
    if sizes:
        constants |= {"tokens": 1, "n": 1, "x_stride": 1}
    # Pointers from torch are aligned, and widths of layers are multiples of 16.
    aligned = [0, 1, 2] + ([] if sizes else [4, 5])
    source = ASTSource(
        hessian._update_kernel,
        signature,
        constants,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def spilled_bytes(architecture, ptx, folder):
    """Return what ptxas says about spills; the compiled object tells it only on a GPU."""
    from triton.backends.nvidia.compiler import get_ptxas

    path = folder / "kernel.ptx"
    path.write_text(ptx)
    chip = re.search(r"\.target (\w+)", ptx).group(1)
    command = [
        get_ptxas(architecture).path,
        "-v",
        f"--gpu-name={chip}",
        str(path),
        "-o",
        os.devnull,
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = re.findall(r"(\d+) bytes spill", run.stderr)
    assert found, run.stderr
    return sum(map(int, found))


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", POINTERS, ids=str)
@pytest.mark.parametrize("table", ["NARROW", "WIDE"])
def test_compiles_ahead_of_time(architecture, dtype, table, tmp_path):
    from mosaic_kernels._triton import hessian

    config = getattr(hessian, table)[dtype]
    for has_sum in (True, False):
        kernel = compile_update(architecture, dtype, config, has_sum, None)
        ptx = kernel.asm["ptx"]
        assert kernel.metadata.shared <= SMALLEST_SHARED
        assert spilled_bytes(architecture, ptx, tmp_path) == 0
        on_tensor_cores = any(name in ptx for name in MATRIX_INSTRUCTION.values())
        assert on_tensor_cores == (dtype != torch.float32)  # never TF32
        if on_tensor_cores:
            assert MATRIX_INSTRUCTION[architecture] in ptx


def test_compiles_where_a_launch_fixes_sizes_to_one():
    from mosaic_kernels._triton import hessian

    config = hessian.choose_config(torch.float16, 1)
    assert config == hessian.NARROW[torch.float16]
    assert hessian.choose_config(torch.float16, 4608) == hessian.WIDE[torch.float16]
    compile_update(90, torch.float16, config, True, "constexpr")
