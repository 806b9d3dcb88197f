"""`digits` retrained with flow matching, as `benchmarks.train_digits --parts flow` keeps it.

The file holds what was trained: attentions, FFNs, the patch embedding, the output layers and the
one timestep embedder. Of the embedded model stay the label tables, the modulations and the
autoencoder, so that the file is a fifth smaller than the whole in half precision.
"""

import json
from pathlib import Path

from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mosaicdiff.sources import load_pipeline

FIXTURE = Path(__file__).parent.parent / "tests" / "fixtures" / "digits-flow.safetensors"
#: Under which the file's metadata keeps how it was made.
RECORD = "trained"
#: The embedder of the first block stands for all: they are equal.
_EMBEDDER = ".norm1.emb.timestep_embedder."
_TRAINED = (".attn1.", ".ff.", "pos_embed.proj.", "proj_out_1.", "proj_out_2.", _EMBEDDER)


def is_trained(parameter: str) -> bool:
    """Tell whether a parameter of the denoiser differs from the embedded model's."""
    return any(part in parameter for part in _TRAINED)


def make_scheduler(shift: float = 1.0) -> DPMSolverMultistepScheduler:
    """Make a sampler that `DiTPipeline` can run: FlowMatch classes have no model input to scale.

    Of first order it is Euler's method on the flow; the second is the usual.
    """
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def load_flow_model(file: Path = FIXTURE, shift: float = 1.0) -> DiffusionPipeline:
    """Load `digits` with the weights trained by flow matching, and a sampler for them.

    Args:
        file: that `write_flow_model` wrote.
        shift: of the sampler's sigmas.
    """
    pipe = load_pipeline("digits")
    blocks = len(pipe.transformer.transformer_blocks)
    state = {}
    with safe_open(file, framework="pt") as held:
        for name in held.keys():  # noqa: SIM118
            tensor = held.get_tensor(name).float()
            copies = range(blocks) if _EMBEDDER in name else (None,)
            for block in copies:
                copy = name if block is None else name.replace("blocks.0.", f"blocks.{block}.")
                state[copy] = tensor.clone()
    missing, unknown = pipe.transformer.load_state_dict(state, strict=False)
    if unknown or any(is_trained(name) for name in missing):
        raise ValueError(f"load_flow_model: {file} must hold a flow model of digits, but does not.")
    pipe.scheduler = make_scheduler(shift)
    return pipe


def write_flow_model(transformer: nn.Module, file: Path, record: dict) -> None:
    """Write what was trained in half precision, with a record of the run."""
    tensors = {
        name: value.detach().half().contiguous()
        for name, value in transformer.state_dict().items()
        if is_trained(name) and (_EMBEDDER not in name or name.startswith("transformer_blocks.0."))
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={RECORD: json.dumps(record)})
    file.chmod(0o644)


def record_of(file: Path = FIXTURE) -> dict:
    """Return how the model was trained."""
    with safe_open(file, framework="pt") as held:
        return json.loads(held.metadata()[RECORD])
