"""The 4-step student of `digits` that `benchmarks.distill_digits` made."""

import json
from pathlib import Path

from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors import safe_open

from mosaicdiff.sources import load_pipeline

FIXTURE = Path(__file__).parent.parent / "tests" / "fixtures" / "digits-4-step.safetensors"
STEPS = 4
# "leading" would spend the last of four steps at timestep 0, where there is no noise to remove.
SPACING = "trailing"
#: Under which the file's metadata keeps how it was made and measured.
RECORD = "distilled"


def is_distilled(parameter: str) -> bool:
    """Tell whether a parameter of the denoiser differs from the teacher's."""
    return ".attn1." in parameter or ".ff." in parameter


def load_student(file: Path = FIXTURE) -> DiffusionPipeline:
    """Load `digits` with the student's attentions and FFNs, and a sampler for its steps."""
    pipe = load_pipeline("digits")
    with safe_open(file, framework="pt") as held:
        state = {name: held.get_tensor(name).float() for name in held.keys()}  # noqa: SIM118
    missing, unknown = pipe.transformer.load_state_dict(state, strict=False)
    if unknown or any(is_distilled(name) for name in missing):
        raise ValueError(f"load_student: {file} must hold a student of digits, but does not.")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=SPACING)
    return pipe


def record_of(file: Path = FIXTURE) -> dict:
    """Return how the student was made and measured."""
    with safe_open(file, framework="pt") as held:
        return json.loads(held.metadata()[RECORD])
