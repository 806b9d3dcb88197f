"""Train the embedded `digits` model: classifier, autoencoder and diffusion transformer.

Everything is seeded; on two CPU cores the whole takes about forty minutes. The weights are
written in half precision to `mosaicdiff/digits/`, with a record of the run beside them.

    python -m benchmarks.train_digits                 # all three parts
    python -m benchmarks.train_digits --parts vae     # one of them
    python -m benchmarks.train_digits --parts flow    # the transformer retrained with flow matching

`flow` starts from the embedded transformer and is kept in `tests/fixtures`: x = (1 - sigma) x_0 +
sigma eps, sigma uniform in (0, 1), the target eps - x_0, the timestep 1000 sigma.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import flow_model
from mosaicdiff import digits

FOLDER = digits.MODEL_FOLDER
NULL_LABEL = 1000  # DiTPipeline's unconditional class
# One channel of 8x8 is what the autoencoder uses: of four, three came out as pure noise.
LATENT_CHANNELS = 1
RECORD = "training.json"


def make_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=digits.IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def make_transformer() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,  # DiTPipeline reads it
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL_LABEL,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def share_embedders(transformer: DiTTransformer2DModel) -> None:
    """Let every block use one timestep and label embedder, as the original DiT trains it.

    diffusers gives each block a copy; drawing the label dropout in each copy apart would also
    show a block conditions that its neighbours do not see, so dropout is left to the caller.
    """
    for block in transformer.transformer_blocks:
        block.norm1.emb = transformer.transformer_blocks[0].norm1.emb
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def initialise(transformer: DiTTransformer2DModel) -> None:
    """Start every block as the identity (adaLN-Zero) and the output at zero, as in DiT."""
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(transformer.proj_out_2.weight)
    nn.init.zeros_(transformer.proj_out_2.bias)
    nn.init.normal_(
        transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight, std=0.02
    )


def cosine_rate(step: int, steps: int, warmup: int = 100) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimisation(
    name: str, parameters: list[nn.Parameter], steps: int, rate: float
) -> Iterator[tuple[int, torch.optim.Optimizer, Progress, int]]:
    """Yield once a step with a zeroed optimiser; the caller fills the gradients."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
    with Progress() as progress:
        task = progress.add_task(name, total=steps)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate * cosine_rate(step, steps)
            optimiser.zero_grad(set_to_none=True)
            yield step, optimiser, progress, task
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            progress.advance(task)


def jitter(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale and shift each image a little (classifier training only)."""
    batch = images.shape[0]
    draw = torch.rand(batch, 4, generator=generator) * 2 - 1
    angle, scale = draw[:, 0] * 0.2, 1 + draw[:, 1] * 0.1
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.cos(angle) * scale
    theta[:, 0, 1] = -torch.sin(angle) * scale
    theta[:, 1, 0] = torch.sin(angle) * scale
    theta[:, :, 2] = draw[:, 2:] * 0.12
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train_classifier(steps: int) -> dict:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images, labels = digits.load_images()
    order = torch.randperm(len(images), generator=generator)
    held_out, train = order[:360], order[360:]
    model = digits.DigitsClassifier()
    for _step, _opt, _progress, _task in optimisation(
        "classifier", list(model.parameters()), steps, 2e-3
    ):
        pick = train[torch.randint(len(train), (128,), generator=generator)]
        noisy = jitter(images[pick], generator)
        noisy = noisy + 0.1 * torch.randn(noisy.shape, generator=generator)
        F.cross_entropy(model(noisy), labels[pick], label_smoothing=0.05).backward()
    half = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() for k, v in half.items()})
    with torch.no_grad():
        accuracy = (model.eval()(images[held_out]).argmax(1) == labels[held_out]).float().mean()
    from mosaicdiff.digits.classifier import WEIGHTS

    save_file(half, WEIGHTS)
    return {"steps": steps, "held_out": len(held_out), "held_out_accuracy": float(accuracy)}


def train_autoencoder(steps: int) -> dict:
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    images, _ = digits.load_images()
    model = make_autoencoder()
    for _step, _opt, progress, task in optimisation(
        "autoencoder", list(model.parameters()), steps, 2e-3
    ):
        batch = images[torch.randint(len(images), (64,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = model.decode(posterior.mean + posterior.std * noise).sample
        error = F.mse_loss(decoded.float(), batch)
        (error + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        progress.update(task, description=f"autoencoder mse {error.item():.4f}")
    model.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([model.encode(chunk).latent_dist.mean for chunk in images.split(256)])
        decoded = torch.cat([model.decode(chunk).sample for chunk in latents.split(256)])
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    model.half().save_pretrained(FOLDER / "vae")
    return {
        "steps": steps,
        "reconstruction_mse": float(F.mse_loss(decoded, images)),
        "scaling_factor": float(model.config.scaling_factor),
    }


def load_latents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mean and deviation of every image's scaled latents, (N, C, H, W), and labels (N,)."""
    images, labels = digits.load_images()
    vae = AutoencoderKL.from_pretrained(FOLDER / "vae").float().eval().requires_grad_(False)
    with torch.no_grad():
        moments = [vae.encode(chunk).latent_dist for chunk in images.split(256)]
    mean = torch.cat([m.mean for m in moments]) * vae.config.scaling_factor
    std = torch.cat([m.std for m in moments]) * vae.config.scaling_factor
    return mean, std, labels


def noise_latents(
    clean: torch.Tensor, generator: torch.Generator, flow: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return noised latents, their timesteps (B,), and what the model is to predict."""
    noise = torch.randn(clean.shape, generator=generator)
    if flow:
        sigma = torch.rand(len(clean), generator=generator)
        at = sigma[:, None, None, None]
        return (1 - at) * clean + at * noise, 1000 * sigma, noise - clean
    alphas = make_scheduler().alphas_cumprod
    timestep = torch.randint(len(alphas), (len(clean),), generator=generator)
    signal = alphas[timestep].sqrt()[:, None, None, None]
    return signal * clean + (1 - signal**2).sqrt() * noise, timestep, noise


def fit_transformer(
    model: DiTTransformer2DModel, steps: int, batch_size: int, rate: float, flow: bool
) -> tuple[DiTTransformer2DModel, list[float]]:
    """Train in place what requires gradients; return the average of the weights, and losses."""
    generator = torch.Generator().manual_seed(2)
    mean, std, labels = load_latents()
    average = copy.deepcopy(model).requires_grad_(False)
    learnt = [p for p in model.parameters() if p.requires_grad]
    followed = [
        held
        for held, p in zip(average.parameters(), model.parameters(), strict=True)
        if p.requires_grad
    ]
    losses: list[float] = []
    started = time.time()
    for step, _opt, progress, task in optimisation("transformer", learnt, steps, rate):
        if step:
            decay = min(0.9995, (1 + step) / (10 + step))
            torch._foreach_lerp_(followed, [p.detach() for p in learnt], 1 - decay)
        pick = torch.randint(len(mean), (batch_size,), generator=generator)
        shape = (batch_size, *mean.shape[1:])
        clean = mean[pick] + std[pick] * torch.randn(shape, generator=generator)
        noisy, timestep, target = noise_latents(clean, generator, flow)
        dropped = torch.rand(batch_size, generator=generator) < 0.1
        condition = torch.where(dropped, NULL_LABEL, labels[pick])
        # On a CPU the backward pass of fused attention over 16 tokens took 45% of a step.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = model(noisy, timestep=timestep, class_labels=condition).sample
            loss = F.mse_loss(predicted.float(), target)
            loss.backward()
        losses.append(loss.item())
        if step % 50 == 49:
            recent = sum(losses[-50:]) / 50
            progress.update(task, description=f"transformer mse {recent:.4f}")
            progress.console.print(f"{step + 1} {recent:.4f} {time.time() - started:.0f}s")
    return average, losses


def train_transformer(steps: int, batch_size: int) -> dict:
    torch.manual_seed(2)
    model = make_transformer()
    share_embedders(model)
    initialise(model)
    average, losses = fit_transformer(model, steps, batch_size, 1e-3, flow=False)
    released = make_transformer()  # a copy of the embedder in every block, as diffusers has it
    released.load_state_dict(average.state_dict())
    released.eval().half().save_pretrained(FOLDER / "transformer")
    return {"steps": steps, "batch_size": batch_size, "mse": sum(losses[-200:]) / 200}


def train_flow(steps: int, batch_size: int, file: Path) -> dict:
    """Retrain the embedded transformer with flow matching, all but what is not kept."""
    torch.manual_seed(2)
    model = DiTTransformer2DModel.from_pretrained(FOLDER / "transformer").float().train()
    share_embedders(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flow_model.is_trained(name))
    average, losses = fit_transformer(model, steps, batch_size, 5e-4, flow=True)
    row = {"steps": steps, "batch_size": batch_size, "mse": sum(losses[-200:]) / len(losses[-200:])}
    flow_model.write_flow_model(average, file, row | {"torch": torch.__version__})
    return row


def write_pipeline() -> None:
    """Write the pipeline's index around the parts, which are saved by their own trainers."""
    DiTPipeline(
        transformer=DiTTransformer2DModel.from_pretrained(
            FOLDER / "transformer", dtype=torch.float16
        ),
        vae=AutoencoderKL.from_pretrained(FOLDER / "vae", dtype=torch.float16),
        scheduler=make_scheduler(),
    ).save_pretrained(FOLDER)
    for part in ("transformer", "vae"):  # diffusers notes the folder it read from: not for others
        path = FOLDER / part / "config.json"
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = ("classifier", "vae", "transformer")
    parser.add_argument("--parts", nargs="+", choices=(*parts, "flow"), default=parts)
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--vae-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=4000, help="of the transformer")
    parser.add_argument("--flow-steps", type=int, default=3000, help="of flow matching")
    parser.add_argument("--batch-size", type=int, default=192, help="of the transformer")
    parser.add_argument("--flow-file", type=Path, default=flow_model.FIXTURE)
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    path: Path = FOLDER.parent / RECORD
    record = json.loads(path.read_text()) if path.is_file() else {}
    for part in args.parts:
        started = time.time()
        if part == "classifier":
            row = train_classifier(args.classifier_steps)
        elif part == "vae":
            row = train_autoencoder(args.vae_steps)
        elif part == "flow":
            print(part, train_flow(args.flow_steps, args.batch_size, args.flow_file))
            continue
        else:
            row = train_transformer(args.steps, args.batch_size)
        record[part] = row | {"seconds": round(time.time() - started), "torch": torch.__version__}
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(part, record[part])
    if "transformer" in args.parts:
        write_pipeline()


if __name__ == "__main__":
    main()
