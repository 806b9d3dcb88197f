"""Kernels of mosaicdiff: tensors in, tensors out.

Importing is free: it starts no CUDA context, imports no triton and prints nothing.
"""

from mosaic_kernels._backends import backends
from mosaic_kernels.cholesky import cholesky_inverse
from mosaic_kernels.hessian import hessian_finalize_, hessian_update_, tune_hessian
from mosaic_kernels.joint import JointTrajectory, prune_columns_joint
from mosaic_kernels.prune import Trajectory, compensate, prune_columns
from mosaic_kernels.sweep import Sweep, prune_weights

__all__ = [
    "JointTrajectory",
    "Sweep",
    "Trajectory",
    "backends",
    "cholesky_inverse",
    "compensate",
    "hessian_finalize_",
    "hessian_update_",
    "prune_columns",
    "prune_columns_joint",
    "prune_weights",
    "tune_hessian",
]
