"""Prune diffusion models stage by stage, without retraining, into smaller dense layers.

    import mosaicdiff
    result = mosaicdiff.prune(pipe, mosaicdiff.PruneConfig(sparsity=0.3), calibration=...)

Importing this package also lets plain diffusers load what it saved.
"""

from .allocation.budget import Budget
from .composition.lora import expand_lora, load_lora, unload_lora
from .composition.storage import quantize
from .config import PruneConfig
from .execution import optimize, restore
from .families import check_prunable
from .integration import install as _install
from .pipeline import PruneResult, calibrate, plan, prune
from .runtime import StagedDenoiser
from .search_config import SearchConfig
from .single_file import load_single_file, load_single_file_pipeline, save_single_file
from .sources import load_pipeline
from .statistics.calibration import Calibration
from .statistics.calibration_file import load_calibration_file, save_calibration
from .sweeping import FrontPoint, sweep
from .trajectory.schedule import NoiseSchedule
from .trajectory.stages import Division, Stage, divide

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Calibration",
    "Division",
    "FrontPoint",
    "NoiseSchedule",
    "PruneConfig",
    "PruneResult",
    "SearchConfig",
    "Stage",
    "StagedDenoiser",
    "calibrate",
    "check_prunable",
    "divide",
    "expand_lora",
    "load_calibration_file",
    "load_lora",
    "load_pipeline",
    "load_single_file",
    "load_single_file_pipeline",
    "optimize",
    "plan",
    "prune",
    "quantize",
    "restore",
    "save_calibration",
    "save_single_file",
    "sweep",
    "unload_lora",
]

_install()
