"""Judge a pruned model beside the dense one: pictures, quality, time."""

from .compare import compare
from .evaluation import Evaluation, Metric, Row, Setting
from .frechet import frechet_distance
from .judge import DigitsJudge
from .latency import LatencyReport, measure_latency
from .quality import Judges
from .sampling import sample_images

__all__ = [
    "DigitsJudge",
    "Evaluation",
    "Judges",
    "LatencyReport",
    "Metric",
    "Row",
    "Setting",
    "compare",
    "frechet_distance",
    "measure_latency",
    "sample_images",
]
