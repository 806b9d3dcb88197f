"""Tiny denoisers without some of their single weights, for tests of what holds them."""

import torch

from mosaicdiff import Division, NoiseSchedule, PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.patterns import is_chosen
from mosaicdiff.solving.masked import assemble_weights
from mosaicdiff.solving.weights import prune_linear
from mosaicdiff.statistics.bank import HessianBank

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser


def statistics_at(denoiser, timestep):
    """Statistics of the input of every target at one train timestep, by source."""
    sources = {target.source for target in adapter_for(denoiser).targets(denoiser)}
    widths = {name: denoiser.get_submodule(name).in_features for name in sources}
    bank = HessianBank(widths, torch.device("cpu"))

    def see(name):
        return lambda module, args: bank.update(name, args[0].float())

    hooks = [denoiser.get_submodule(n).register_forward_pre_hook(see(n)) for n in sources]
    latents, inputs = tiny_batches()[0]
    denoiser(latents.to(denoiser.dtype), torch.full((len(latents),), timestep), **inputs)
    for hook in hooks:
        hook.remove()
    return {name: bank.finalize(name) for name in sources}


def mask_denoiser(
    denoiser=None,
    criterion="obs",
    *,
    shares=(0.5,),
    pattern=None,
    only=None,
):
    """Prune every target; a share a stage (None leaves the stage whole), or one pattern in all.

    Args:
        only: patterns of targets, for each stage; all by default.
    """
    denoiser = tiny_denoiser() if denoiser is None else denoiser
    adapter = adapter_for(denoiser)
    schedule = NoiseSchedule.from_scheduler(linear_scheduler())
    count = len(shares)
    division = Division.at_timesteps(schedule, [1000 * k // count for k in range(1, count)])
    config = PruneConfig(
        granularity="unstructured", criterion=criterion,
        compensation="plain" if criterion == "obs" else "none",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    solutions = []
    for k, (stage, share) in enumerate(zip(division.stages, shares, strict=True)):
        seen = statistics_at(denoiser, (stage.first + stage.last) // 2)
        target = {"sparsity": share} if pattern is None else {"pattern": pattern}
        solutions.append({
            t.name: prune_linear(
                denoiser.get_submodule(t.name).weight, seen[t.source], criterion,
                generator=generator, **target,
            )
            for t in adapter.targets(denoiser)
            if share is not None and (only is None or is_chosen(t.name, only[k], ()))
        })  # fmt: skip
    steps = [10] * count
    return assemble_weights(adapter, denoiser, division, steps, config, solutions), solutions
