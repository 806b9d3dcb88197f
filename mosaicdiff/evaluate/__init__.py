"""Judge a pruned model beside the dense one: pictures, quality, time."""

from .compare import Comparison, compare
from .frechet import frechet_distance
from .judge import DigitsJudge
from .latency import LatencyReport, measure_latency
from .sampling import sample_images

__all__ = [
    "Comparison",
    "DigitsJudge",
    "LatencyReport",
    "compare",
    "frechet_distance",
    "measure_latency",
    "sample_images",
]
