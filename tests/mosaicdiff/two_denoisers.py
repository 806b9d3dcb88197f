"""A pipeline with two denoisers that hand over at a boundary, as Wan 2.2's does."""

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from .conftest import tiny_denoiser


class TwoDenoiserPipeline(DiffusionPipeline):
    """Call `transformer` from boundary_ratio * T upwards, and `transformer_2` below."""

    model_cpu_offload_seq = "transformer->transformer_2"
    _optional_components = ["transformer", "transformer_2"]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: DiTTransformer2DModel | None = None,
        transformer_2: DiTTransformer2DModel | None = None,
        boundary_ratio: float | None = None,
    ):
        super().__init__()
        self.register_modules(
            scheduler=scheduler, transformer=transformer, transformer_2=transformer_2
        )
        self.register_to_config(boundary_ratio=boundary_ratio)

    @torch.no_grad()
    def __call__(
        self, class_labels, num_inference_steps=10, guidance_scale=1.0, generator=None,
        output_type="latent",
    ):  # fmt: skip
        x = torch.randn(len(class_labels), 2, 8, 8, generator=generator)
        labels = torch.tensor(class_labels)
        self.scheduler.set_timesteps(num_inference_steps)
        ratio = self.config.boundary_ratio
        for t in self.scheduler.timesteps:
            first = ratio is None or t >= ratio * self.scheduler.config.num_train_timesteps
            model = self.transformer if first else self.transformer_2
            y = model(x, timestep=t.expand(len(x)), class_labels=labels).sample
            x = self.scheduler.step(y, t, x).prev_sample
        return (x,)


def two_denoiser_pipeline(ratio=0.8, shift=3.0, first=True, second=True):
    other = tiny_denoiser()
    generator = torch.Generator().manual_seed(5)
    for parameter in other.parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    pipe = TwoDenoiserPipeline(
        FlowMatchEulerDiscreteScheduler(shift=shift),
        tiny_denoiser() if first else None,
        other if second else None,
        ratio,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
