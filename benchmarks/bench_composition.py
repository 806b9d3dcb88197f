"""What caches and smaller storage add to pruning, on the embedded model: time, bytes, error.

    python -m benchmarks.bench_composition

The dense model and the pruned one (30%, three stages), each as it is and with one technique. Error
is that of the final latents to the dense model's own without any, squared, over their energy.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig

import mosaicdiff
from mosaicdiff.pipeline import cut

from .rows import RESULTS, provenance, upsert_row

FILE = RESULTS / "composition.csv"
KEY = ("model", "technique", "setting", "device", "threads")
STEPS, PICTURES = 50, 16


def staged(sparsity: float) -> Any:
    """Return the denoiser pruned; of 0 one stage with everything."""
    pipe = mosaicdiff.load_pipeline("digits")
    if sparsity:
        mosaicdiff.prune(pipe, mosaicdiff.PruneConfig(sparsity=sparsity))
        return pipe.transformer
    config = mosaicdiff.PruneConfig(sparsity=0.0, allocation="uniform", stages=1)
    return cut(pipe.transformer, config, scheduler=pipe.scheduler)


def pipeline_of(denoiser: Any) -> Any:
    """Return a pipeline around a copy of the denoiser."""
    pipe = mosaicdiff.load_pipeline("digits")
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = copy.deepcopy(denoiser)
    return pipe


def cached(config: Any) -> Callable[[Any], None]:
    return lambda pipe: pipe.transformer.enable_cache(config)


def _cast(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def _int8(pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    mosaicdiff.quantize(pipe, Int8WeightOnlyConfig())


def _taylor() -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
    )


TECHNIQUES: dict[tuple[str, str], Callable[[Any], None]] = {
    ("none", ""): lambda pipe: None,
    ("FirstBlockCache", "threshold 0.05"): cached(FirstBlockCacheConfig(0.05)),
    ("FirstBlockCache", "threshold 0.1"): cached(FirstBlockCacheConfig(0.1)),
    ("TaylorSeer", "every 2"): cached(_taylor()),
    ("layerwise casting", "float8_e4m3fn"): _cast,
    ("torchao", "int8 weights"): _int8,
}


def latents(pipe: Any) -> torch.Tensor:
    """Sample the final latents (PICTURES, C, H, W), always from the same noise."""
    found: list[torch.Tensor] = []
    decode = pipe.vae.decode

    def caught(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(z.clone())
        return decode(z, *args, **kwargs)

    pipe.vae.decode = caught
    try:
        pipe(
            [k % 10 for k in range(PICTURES)],
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )
    finally:
        del pipe.vae.decode
    return torch.cat(found)


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor, of a quantised one those of what it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=FILE)
    options = parser.parse_args(argv)
    made = []
    for model, sparsity in (("digits", 0.0), ("digits, 30% pruned", 0.3)):
        denoiser = staged(sparsity)
        for (technique, setting), apply in TECHNIQUES.items():
            if technique == "torchao" and importlib.util.find_spec("torchao") is None:
                print("torchao is not installed: its rows are left as they are")
                continue
            pipe = pipeline_of(denoiser)
            apply(pipe)
            made.append((model, technique, setting, pipe))
    reference = latents(made[0][3])
    errors, times = [], [[] for _ in made]
    for _, _, _, pipe in made:
        errors.append(float((latents(pipe) - reference).square().sum() / reference.square().sum()))
    for _ in range(options.repeats):  # in turn, so that a busy machine is busy for all
        for (_, _, _, pipe), taken in zip(made, times, strict=True):
            begin = time.perf_counter()
            latents(pipe)
            taken.append(time.perf_counter() - begin)
    dense = statistics.median(times[0])
    for (model, technique, setting, pipe), error, taken in zip(made, errors, times, strict=True):
        row = {
            "model": model,
            "technique": technique,
            "setting": setting,
            "seconds": statistics.median(taken),
            "fastest": min(taken),
            "slowest": max(taken),
            "speed_up": dense / statistics.median(taken),
            "bytes": sum(tensor_bytes(p.data) for p in pipe.transformer.parameters()),
            "error": error,
            **provenance(),
        }
        upsert_row(options.output, KEY, row)
        print(row)


if __name__ == "__main__":
    main()
