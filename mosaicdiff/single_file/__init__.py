"""Checkpoints in one `.safetensors`, in the layout that a model was published in."""

from .load import load_single_file
from .pipelines import load_single_file_pipeline
from .plan import is_pruned, read_plan
from .save import check_source, check_target, save_single_file

__all__ = [
    "check_source",
    "check_target",
    "is_pruned",
    "load_single_file",
    "load_single_file_pipeline",
    "read_plan",
    "save_single_file",
]
