"""Compile Triton kernels for a chip that is not there, and read what came out."""

import os
import re
import subprocess
from pathlib import Path

import torch

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}


def compile_kernel(kernel, architecture, arguments, constants, options, aligned):
    """Compile a kernel of Triton for sm_<architecture>.

    Args:
        arguments: type of each argument that is no constant, by name, in Triton's words.
        constants: value of each compile-time argument by name.
        options: ``num_warps`` and so on.
        aligned: names of the arguments that are multiples of 16, as a launch would find out.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(names) == arguments.keys() | constants.keys()
    signature = {name: arguments.get(name, "constexpr") for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def ptxas_report(architecture: int, ptx: str, folder: Path) -> str:
    """Return what ptxas says of a kernel; the compiled object tells it only on a GPU."""
    from triton.backends.nvidia.compiler import get_ptxas

    path = folder / "kernel.ptx"
    path.write_text(ptx)
    chip = re.search(r"\.target (\w+)", ptx).group(1)
    command = [get_ptxas(architecture).path, "-v", f"--gpu-name={chip}", str(path)]
    run = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def spilled_bytes(report: str) -> int:
    """Return the bytes of registers that a report of ptxas says were spilled."""
    found = re.findall(r"(\d+) bytes spill", report)
    assert found, report
    return sum(map(int, found))
