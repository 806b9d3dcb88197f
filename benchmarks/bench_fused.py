"""What fused execution saves where launches bound a call: operations and time, narrow networks.

    python -m benchmarks.bench_fused                    # all of them
    python -m benchmarks.bench_fused dit-xl-2 --repeats 15

Each network has the blocks of the published one and narrow layers: 28 blocks of DiT-XL/2, 38 of
SD3.5-Large, 19 and 38 of FLUX.1-dev, 70 of SDXL, 28 of PixArt-Sigma, 40 of Wan 2.1. Rows go to
`benchmarks/results/fused.csv`: operations that a call of one sample dispatches (those that only
view a tensor apart) as diffusers runs it and fused, the medians of both in turn, and how far the
outputs lie apart in float64 by the largest output (parts of FLUX and Wan are float32 in diffusers,
whatever the type of the model).
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mosaicdiff
from benchmarks.rows import RESULTS, provenance, upsert_row
from benchmarks.timing import time_in_turn
from mosaicdiff.evaluate.configurations import CONFIGURATIONS

FILE = RESULTS / "fused.csv"
KEY = ("model", "device", "dtype", "threads")
#: What makes the published configurations narrow.
NARROW: dict[str, dict[str, Any]] = {
    "dit-xl-2": {"num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8},
    "sd3.5-large": {
        "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32,
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "sample_size": 8,
    },
    "flux-dev": {
        "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8),
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "in_channels": 16,
    },
    "sdxl": {
        "block_out_channels": (16, 32, 64), "attention_head_dim": (1, 2, 4), "norm_num_groups": 4,
        "cross_attention_dim": 32, "addition_time_embed_dim": 8, "sample_size": 16,
        "projection_class_embeddings_input_dim": 80,
    },
    "pixart-sigma-xl": {
        "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32,
        "caption_channels": 32, "sample_size": 8,
    },
    "wan-2.1-14b": {
        "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 32,
        "freq_dim": 32,
    },
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Count what a call dispatches, and what of it only views a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.views = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        self.all += 1
        self.views += func.is_view or func.overloadpacket.__name__ == "_unsafe_view"
        return func(*args, **(kwargs or {}))


def narrow(name: str) -> nn.Module:
    """Make a narrow network with random weights, the same at each call."""
    published = CONFIGURATIONS[name]
    torch.manual_seed(5)
    config = dict(published.config) | NARROW[name]
    model: Any = getattr(diffusers, published.denoiser_class)(**config)
    if name == "dit-xl-2":  # as published checkpoints have it
        first, *others = (block.norm1.emb for block in model.transformer_blocks)
        for other in others:
            other.load_state_dict(first.state_dict())
    return model.eval().requires_grad_(False)


def arguments_of(name: str, rows: int = 1) -> dict[str, Any]:
    """Return inputs of a call, of few tokens: what is to be seen is the launches."""
    random = torch.Generator().manual_seed(6)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=random)

    text = {"encoder_hidden_states": noise(8, 32)}
    pooled = {"pooled_projections": noise(32)}
    latents = {"hidden_states": noise(4, 8, 8), "timestep": torch.full((rows,), 500)}
    if name == "dit-xl-2":
        return latents | {"class_labels": torch.arange(rows)}
    if name == "sd3.5-large":
        return latents | text | pooled | {"hidden_states": noise(16, 8, 8)}
    if name == "flux-dev":
        places = {"img_ids": torch.arange(48.0).view(16, 3), "txt_ids": torch.zeros(8, 3)}
        half = {"timestep": torch.full((rows,), 0.5), "guidance": torch.full((rows,), 3.5)}
        return latents | text | pooled | places | half | {"hidden_states": noise(16, 16)}
    if name == "sdxl":
        added = {"text_embeds": noise(32), "time_ids": noise(6)}
        sample = {"sample": noise(4, 16, 16), "timestep": torch.full((rows,), 500)}
        return sample | text | {"added_cond_kwargs": added}
    if name == "wan-2.1-14b":
        return latents | text | {"hidden_states": noise(16, 1, 8, 8)}
    return latents | text | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def call_of(
    model: Any, name: str, device: torch.device, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """Return a call of one sample."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(inner) for key, inner in value.items()}
        if not torch.is_tensor(value):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    arguments = moved(arguments_of(name))

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(**arguments, return_dict=False)[0]

    return call


def distance(name: str) -> float:
    """Return how far fused outputs lie from diffusers' in float64, by the largest output."""
    model = narrow(name).double()
    call = call_of(model, name, torch.device("cpu"), torch.float64)
    eager = call()
    mosaicdiff.optimize(model)
    return float((call() - eager).abs().max() / eager.abs().max())


def count(call: Callable[[], Any]) -> Operations:
    """Count the operations of a call."""
    call()
    with Operations() as counted:
        call()
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help=f"of {', '.join(NARROW)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=25, help="rounds (25)")
    args = parser.parse_args()
    unknown = set(args.models) - set(NARROW)
    if unknown:
        parser.error(f"models must be of {', '.join(NARROW)}, got {', '.join(sorted(unknown))}.")
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    for name in args.models or NARROW:
        eager = narrow(name).to(device)
        if dtype != torch.float32:
            eager = eager.to(dtype)
        fused = copy.deepcopy(eager)
        mosaicdiff.optimize(fused)
        calls = {
            "eager": call_of(eager, name, device, dtype),
            "fused": call_of(fused, name, device, dtype),
        }
        counts = {kind: count(call) for kind, call in calls.items()}
        times = time_in_turn(calls, device, args.repeats)
        row: dict[str, Any] = {"model": name, "dtype": args.dtype, "repeats": args.repeats}
        for kind in calls:
            row[f"{kind}_operations"] = counts[kind].all - counts[kind].views
            row[f"{kind}_views"] = counts[kind].views
            row[f"{kind}_ms"] = times[kind].median
            row[f"{kind}_p20"], row[f"{kind}_p80"] = times[kind].p20, times[kind].p80
        row["speedup"] = times["eager"].median / times["fused"].median
        row["distance"] = distance(name)
        upsert_row(FILE, KEY, row | provenance())
        print(
            f"{name}: {row['speedup']:.2f}x, operations {row['eager_operations']} -> "
            f"{row['fused_operations']}, apart by {row['distance']:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
