"""Prune diffusion models stage by stage, without retraining, into smaller dense layers.

    import mosaicdiff
    result = mosaicdiff.prune(pipe, mosaicdiff.PruneConfig(sparsity=0.3), calibration=...)

Importing this package also lets plain diffusers load what it saved.
"""

from .config import PruneConfig
from .integration import install as _install
from .pipeline import PruneResult, plan, prune
from .runtime import StagedDenoiser
from .schedule import NoiseSchedule
from .sources import load_pipeline
from .stages import Division, Stage, divide

__version__ = "0.1.0"

__all__ = [
    "Division",
    "NoiseSchedule",
    "PruneConfig",
    "PruneResult",
    "Stage",
    "StagedDenoiser",
    "divide",
    "load_pipeline",
    "plan",
    "prune",
]

_install()
