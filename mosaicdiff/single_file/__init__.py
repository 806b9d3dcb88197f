"""Checkpoints in one `.safetensors`, in the layout that a model was published in."""

from .load import is_pruned, load_single_file, read_plan
from .pipelines import load_single_file_pipeline
from .save import check_source, save_single_file

__all__ = [
    "check_source",
    "is_pruned",
    "load_single_file",
    "load_single_file_pipeline",
    "read_plan",
    "save_single_file",
]
