"""How much outputs depend on layers, against noise added there."""

import math

import torch

from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.allocation.planning import make_frame
from mosaicdiff.statistics.noising import CalibrationSet, draw_noisy
from mosaicdiff.statistics.sensitivity import measure_weights, stage_gains
from mosaicdiff.trajectory.probe import Probe

from .conftest import linear_scheduler, tiny_batches, tiny_denoiser

CONFIG = PruneConfig(samples=64, steps=12)


def setup():
    denoiser = tiny_denoiser()
    adapter = adapter_for(denoiser)
    frame = make_frame(linear_scheduler(), CONFIG)
    data = CalibrationSet(tiny_batches(), adapter, denoiser)
    return denoiser, adapter, adapter.layers(denoiser), frame, data


def weights_of(denoiser, adapter, layers, frame, data):
    stages = frame.division.stages
    return measure_weights(denoiser, adapter, layers, stages, frame.schedule, data, CONFIG)


def hooks(denoiser):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in denoiser.modules())


def test_a_weight_is_what_noise_in_a_layer_adds_to_the_output():
    denoiser, adapter, layers, frame, data = setup()
    weights = weights_of(denoiser, adapter, layers, frame, data)
    generator, amplitude = torch.Generator().manual_seed(5), 1e-2
    stage = frame.division.stages[1]
    batches = list(
        draw_noisy(
            denoiser, adapter, stage, frame.schedule, data, CONFIG, generator, samples=256
        )
    )  # fmt: skip
    ratios, shape = [], adapter.latent_shape(denoiser)
    for layer in layers:
        added, elements = 0.0, 0

        def disturb(module, args, output):
            nonlocal elements
            elements += output.shape[-1] * len(output) * math.prod(shape)
            return output + amplitude * torch.randn(output.shape, generator=generator)

        for latents, timesteps, inputs in batches:
            with torch.no_grad():
                clean = adapter.predict(denoiser, latents, timesteps, inputs)
                reader = denoiser.get_submodule(layer.readers[0].module)
                handle = reader.register_forward_hook(disturb)
                noisy = adapter.predict(denoiser, latents, timesteps, inputs)
                handle.remove()
            added += float((noisy - clean).double().square().sum())
        ratios.append(weights[1][layer.readers[0].name] / (added / (amplitude**2 * elements)))
    assert all(1 / 1.5 < ratio < 1.5 for ratio in ratios), ratios
    assert len(set(weights[1].values())) == len(layers)


def test_nothing_is_left_behind():
    denoiser, adapter, layers, frame, data = setup()
    before = {name: p.clone() for name, p in denoiser.named_parameters()}
    first = weights_of(denoiser, adapter, layers, frame, data)
    assert first == weights_of(denoiser, adapter, layers, frame, data)
    assert hooks(denoiser) == 0
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad
        assert torch.equal(parameter, before[name])


def test_a_gain_is_the_error_of_noise_over_its_power():
    denoiser, adapter, _, frame, data = setup()
    probe = Probe(
        denoiser, adapter, linear_scheduler(), data, steps=CONFIG.steps, samples=16, seed=0
    )
    gains = stage_gains(probe, denoiser, frame.steps)
    assert len(gains) == len(frame.steps) and min(gains) > 0

    class Loud:
        """Noise of twice the amplitude, the same at every step."""

        noise = 0.04 * torch.randn(16, 2, 8, 8)

        def __call__(self, *args, **kwargs):
            output = denoiser(*args, **kwargs)
            output.sample = output.sample + self.noise
            return output

    for stage, count in enumerate(frame.steps):
        networks = [denoiser] * len(gains)
        networks[stage] = Loud()
        error = probe.error(probe.run(networks, frame.steps))
        assert 0.4 < gains[stage] / (error / 0.04**2 / count) < 2.5
