"""Say which implementation each operator uses on each device, and what would be better."""

from importlib.util import find_spec
from typing import Any

import torch

from mosaic_kernels._extension import EXTENSION, REBUILD


def _cpp(uses: str) -> dict[str, str]:
    if EXTENSION.module is None:
        return {"implementation": "torch", "note": EXTENSION.reason}
    if EXTENSION.module.openmp:
        return {"implementation": "C++ (OpenMP)", "note": uses}
    note = f"{uses}; built without OpenMP, on one thread: {REBUILD} that links OpenMP"
    return {"implementation": "C++", "note": note}


def _cuda(implementation: str, note: str) -> dict[str, str]:
    if not torch.cuda.is_available():
        cure = (
            "no visible CUDA device" if torch.version.cuda else "this torch is built without CUDA"
        )
        return {"implementation": "unavailable", "note": f"{cure}; would be {implementation}"}
    return {"implementation": implementation, "note": note}


def _cuda_panels() -> dict[str, str]:
    if EXTENSION.has_cuda:
        return _cuda("CUDA", "panels in CUDA, a thread block for each layer; products by cuBLAS")
    note = "panels on torch, many small launches: reinstall with MOSAIC_BUILD=cuda and nvcc"
    return _cuda("torch", note)


def _cuda_inverse() -> dict[str, str]:
    if EXTENSION.has_cuda:
        return _cuda("CUDA", "diagonal blocks in shared memory, products by cuBLAS")
    note = "cuSOLVER on diagonal blocks, products by cuBLAS: reinstall with MOSAIC_BUILD=cuda"
    return _cuda("torch", note)


def _cuda_walk() -> dict[str, str]:
    if EXTENSION.has_cuda:
        return _cuda("CUDA", "walks in CUDA, masks and products by torch")
    note = "walks on torch, many small launches: reinstall with MOSAIC_BUILD=cuda and nvcc"
    return _cuda("torch", note)


def _triton() -> dict[str, str]:
    if torch.cuda.is_available() and find_spec("triton") is None:
        return {"implementation": "unavailable", "note": "triton is missing: pip install triton"}
    return _cuda("triton", "")


def backends() -> dict[str, Any]:
    """Return what each operator runs on, for a doctor's report.

    Returns:
        ``{"extension": {...}, "operators": {operator: {"cpu": entry, "cuda": entry}}}``, where an
        entry has ``implementation`` ("torch", "C++ (OpenMP)", "triton", "unavailable") and
        ``note``: what it consists of, or why there is nothing better and how to get it.
    """
    return {
        "extension": EXTENSION.info(),
        "operators": {
            "hessian_update_": {
                "cpu": _cpp("lower triangle, narrow inputs read as they are"),
                "cuda": _triton(),
            },
            "hessian_finalize_": {"cpu": _cpp("tiled mirror"), "cuda": _cuda("torch", "")},
            "cholesky_inverse": {
                "cpu": _cpp("block sweep in place"),
                "cuda": _cuda_inverse(),
            },
            "prune_columns": {
                "cpu": _cpp("panels, and products of half a matrix"),
                "cuda": _cuda_panels(),
            },
            "prune_columns_joint": {
                "cpu": _cpp("inverse and products of half a matrix in C++, pivots on torch"),
                "cuda": _cuda("torch", "pivots on torch, many small launches"),
            },
            "compensate": {"cpu": _cpp("blocked Cholesky solve"), "cuda": _cuda("torch", "")},
            "prune_weights": {
                "cpu": _cpp("masks and walks in C++, products by torch"),
                "cuda": _cuda_walk(),
            },
        },
    }
