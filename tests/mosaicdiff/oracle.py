"""A denoiser that knows the answer, to measure what a sampler gives its denoiser."""

import sys

import numpy as np
import torch


class Oracle:
    """Predict exactly, from what is seen alone: nothing of the scheduler's levels is used.

    Of an input c (s x_0 + n eps), s c is its projection on x_0 and n c the size of the rest; both
    are kept in `seen` as log10 (s / n)^2. All noise is drawn at right angles to x_0 and to the
    noise before it, so that chance correlations, which would drown a faint signal, are none.

    Args:
        scheduler: after `set_timesteps`.
        kind: what is predicted: epsilon, v_prediction or flow.
        size: of the picture.
    """

    def __init__(self, scheduler, kind, size):
        self.scheduler, self.kind = scheduler, kind
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(size**2, 40, dtype=torch.float64, generator=generator)
        directions = torch.linalg.qr(draw)[0].T * size
        self.clean, self.noise, *self.fresh = directions.reshape(40, 1, 1, 1, size, size)
        self.seen = []

    def first_sample(self):
        """Return x_0 noised by the scheduler's own forward process, at its first timestep."""
        first = self.scheduler.timesteps[:1]
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(self.clean, first, self.noise)
        return self.scheduler.add_noise(self.clean, self.noise, first)

    def predict(self, given):
        signal = float((given * self.clean).mean())
        rest = given - signal * self.clean
        level = float(rest.square().mean().sqrt())
        self.seen.append(2 * np.log10(signal / level))
        noise = rest / level
        if self.kind == "flow":
            return noise - self.clean
        config = self.scheduler.config
        if "sigma_data" in config:
            data, sigma = config["sigma_data"], level / signal
            sample = self.clean + sigma * noise
            sign = 1 if self.kind == "epsilon" else -1
            skip = data**2 / (sigma**2 + data**2)
            scale = sign * sigma * data / (sigma**2 + data**2) ** 0.5
            return (self.clean - skip * sample) / scale
        if self.kind == "epsilon":
            return noise
        size = (signal**2 + level**2) ** 0.5
        return (signal * noise - level * self.clean) / size

    def run(self, patch):
        """Sample, and return log10 SNR of what the denoiser was given at every entry."""
        module = sys.modules[type(self.scheduler).__module__]
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *args, **kwargs: self.fresh.pop())
        x = self.first_sample()
        for t in self.scheduler.timesteps:
            given = x
            if hasattr(self.scheduler, "scale_model_input"):
                given = self.scheduler.scale_model_input(x, t)
            x = self.scheduler.step(self.predict(given), t, x).prev_sample
        return np.asarray(self.seen)
