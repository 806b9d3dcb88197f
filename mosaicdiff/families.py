"""What can be pruned: of every family, and of one model, without its weights."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers import ConfigMixin, DiffusionPipeline
from torch import nn

from . import digits
from .adapters import DENOISER_CLASSES, Adapter, adapter_for_class
from .groups import Denoiser, PrunableLayer
from .model_checks import check_state
from .single_file import check_source, is_pruned
from .sources import DIGITS, find_denoiser

_COMPONENTS = ("transformer", "unet")
#: Why modules stay whole that a family says nothing of, by patterns of their names.
_USUAL_LEAVES = (
    ("*resnets*", "convolutions: their channels are the residual stream"),
    ("*samplers*", "convolutions between resolutions: their channels are the residual stream"),
    ("*norm*", "norms and modulation: as wide as the residual stream"),
    ("*embed*", "embedders: their rows are the residual stream"),
    ("*proj_in*", "its rows are the residual stream"),
    ("*proj_out*", "its rows or columns are the residual stream"),
    ("*conv_in*", "its rows are the residual stream"),
    ("*conv_out*", "its columns are the residual stream"),
)
_SHARED_NORM = "stays whole before a norm across all heads; goes with shared_norms='approximate'"
_BIAS = "biases after what goes: added once, whatever is left"
_ELSEWHERE = "in no layer of the family's declaration"


@dataclass(frozen=True)
class Family:
    """One family of denoisers in words.

    Args:
        denoiser: class name.
        pipelines: class names of those that carry it.
        goes: what is pruned.
        norms: of queries and keys: what they are over, and whether pruning is exact.
        stays: patterns of names of what stays whole, and why.
        whole_ends: whether the first and the last block stay whole unless they are asked for.
    """

    denoiser: str
    pipelines: tuple[str, ...]
    goes: str
    norms: str
    stays: tuple[tuple[str, str], ...]
    whole_ends: bool


@dataclass(frozen=True)
class LayerKind:
    """Layers of one place in the blocks.

    Args:
        name: of the layers, with a star for each index.
        kind: `heads` or `neurons`.
        layers: how many.
        groups: of one layer, the fewest and the most.
        removable: groups that could go, of all layers.
        macs: of those for one sample, attention products counted.
        macs_share: in all of the denoiser.
        parameters: of those.
        parameters_share: in all of the denoiser.
    """

    name: str
    kind: str
    layers: int
    groups: tuple[int, int]
    removable: int
    macs: int
    macs_share: float
    parameters: int
    parameters_share: float


@dataclass(frozen=True)
class WholePart:
    """Parameters that stay, and why.

    Args:
        name: of the modules, with a star for each index.
        why: they stay.
        parameters: of them.
        share: in all of the denoiser.
    """

    name: str
    why: str
    parameters: int
    share: float


@dataclass(frozen=True)
class ModelView:
    """What of one model could go.

    Args:
        denoiser: class name.
        obstacle: why it cannot be pruned as it is, or None; then the rest is empty where the class
            is not supported.
        found: modules of an unsupported class that a declaration would name, by class.
        goes: what could go.
        stays: what could not.
        macs: of one call for one sample, attention products counted.
        parameters: of the denoiser.
        whole_ends: blocks that stay whole unless they are asked for.
    """

    denoiser: str
    obstacle: str | None
    found: dict[str, int]
    goes: tuple[LayerKind, ...] = ()
    stays: tuple[WholePart, ...] = ()
    macs: int = 0
    parameters: int = 0
    whole_ends: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def families() -> tuple[Family, ...]:
    """List what is supported."""
    adapters = (adapter_for_class(name) for name in DENOISER_CLASSES)
    return tuple(
        Family(a.denoiser_class, a.pipelines, a.summary, a.norms, a.leaves, a.joint)
        for a in adapters
    )


def check_prunable(model: DiffusionPipeline | Denoiser) -> None:
    """Refuse a model that cannot be pruned as it is.

    Args:
        model: a pipeline or a denoiser; the meta device will do.

    Raises:
        ValueError: its class is not supported, or its state must change first; says how.
    """
    denoiser = find_denoiser(model)[1] if isinstance(model, DiffusionPipeline) else model
    kind = type(denoiser).__name__
    if kind in DENOISER_CLASSES:
        adapter_for_class(kind).check(denoiser)
        return
    check_state(denoiser)
    raise ValueError(_unsupported(kind))


def view_model(model: DiffusionPipeline | Denoiser) -> ModelView:
    """Say what of a model could go, and what could not and why.

    Args:
        model: a pipeline or a denoiser; the meta device will do.
    """
    denoiser = find_denoiser(model)[1] if isinstance(model, DiffusionPipeline) else model
    kind, obstacle = type(denoiser).__name__, None
    try:
        check_prunable(denoiser)
    except ValueError as error:
        obstacle = str(error)
    if kind not in DENOISER_CLASSES:
        return ModelView(kind, obstacle, _survey(denoiser))
    if obstacle is not None:
        return ModelView(kind, obstacle, {})
    adapter = adapter_for_class(kind)
    layers = adapter.layers(denoiser)
    parameters = dict(denoiser.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    macs = adapter.macs(denoiser).total
    blocks = adapter.blocks(denoiser)
    return ModelView(
        denoiser=kind,
        obstacle=None,
        found={},
        goes=_kinds(layers, parameters, macs, total),
        stays=_whole(adapter, layers, parameters, total),
        macs=macs,
        parameters=total,
        whole_ends=(blocks[0], blocks[-1]) if adapter.joint else (),
    )


def empty_model(model: str | Path, config: str | Path | None = None) -> Denoiser:
    """Make the denoiser of a model without its weights, from configurations alone.

    Args:
        model: `digits`, a folder of a pipeline or a denoiser, a Hub id, or a single file.
        config: of a dense single file, folder or Hub id of its pipeline.

    Raises:
        ValueError: there is none, or the file is not that of the configuration.
    """
    path = digits.MODEL_FOLDER if str(model) == DIGITS else Path(model)
    if path.suffix == ".safetensors" and path.is_file():
        if is_pruned(path):
            raise _is_pruned(path)
        if config is None:
            raise ValueError(
                "families: a single file must come with the folder or Hub id of its pipeline, got "
                "none. Name it with --pipeline-config."
            )
        made = empty_model(config)
        check_source(path, type(made).__name__, dict(made.config))
        return made
    if config is not None:
        raise ValueError(f"families: config must be left out but for a single file, got {config}.")
    settings = _settings(path, str(model))
    name = settings.get("_class_name", "")
    if name == "StagedDenoiser":
        raise _is_pruned(path)
    if settings.get("quantization_config"):
        raise ValueError(
            f"families: {path} must not be quantised, but it is. Load the model in 16 or 32 bits, "
            "prune, and quantise what comes out."
        )
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"families: {path} must be of a diffusers model, got {name!r}.")
    with init_empty_weights(include_buffers=False):
        return kind.from_config(settings)


def _is_pruned(path: Path) -> ValueError:
    return ValueError(
        f"families: {path} must be dense, but it is pruned already. Look with mosaicdiff info, and "
        "prune the original."
    )


def _settings(path: Path, model: str) -> dict[str, Any]:
    """Read the configuration of a denoiser, that of a pipeline's where it is one's."""
    place = str(path) if path.exists() else model
    if not path.exists() and (place.count("/") != 1 or place.startswith((".", "/"))):
        raise ValueError(
            f"families: model must be 'digits', a local folder, a single file or a Hub id "
            f"(owner/name), got {place!r}, which is none of them."
        )
    if (path / "config.json").is_file():
        return dict(ConfigMixin.load_config.__func__(_Plain, place))
    try:
        index = DiffusionPipeline.load_config(place)
        name = next(n for n in _COMPONENTS if (index.get(n) or [None])[0] is not None)
        return dict(ConfigMixin.load_config.__func__(_Plain, place, subfolder=name))
    except OSError as error:
        raise ValueError(
            f"families: {place} must be a pipeline or a denoiser in diffusers' layout: {error}"
        ) from None
    except StopIteration:
        raise ValueError(
            f"families: {place} must be of a pipeline with one of {', '.join(_COMPONENTS)}, got "
            f"{index.get('_class_name')}."
        ) from None


class _Plain(ConfigMixin):
    """Reads any model's `config.json`."""

    config_name = "config.json"


def _unsupported(kind: str) -> str:
    return (
        f"prune: denoiser must be one of {', '.join(DENOISER_CLASSES)}, got {kind}. Another family "
        "is one declaration in mosaicdiff/adapters: its blocks, and for each attention and "
        "feed-forward its writers and readers."
    )


def _survey(denoiser: Denoiser) -> dict[str, int]:
    """Count, by class, the attentions and feed-forwards that a declaration would name."""
    found: Counter[str] = Counter()
    for module in denoiser.modules():
        children = dict(module.named_children())
        attention = {"to_q", "to_qkv", "to_qkv_mlp_proj"} & set(children)
        if attention or isinstance(children.get("net"), nn.ModuleList):
            found[type(module).__name__] += 1
    return dict(found)


def _starred(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _kinds(
    layers: Iterable[PrunableLayer], parameters: dict[str, nn.Parameter], macs: int, total: int
) -> tuple[LayerKind, ...]:
    kinds: dict[tuple[str, str], list[PrunableLayer]] = defaultdict(list)
    for layer in layers:
        kinds[_starred(layer.name), layer.kind].append(layer)
    rows = []
    for (name, kind), held in kinds.items():
        cost = sum(x.groups * (x.cost + x.products) for x in held)
        count = sum(n for x in held for n in _removable(x, parameters).values())
        groups = [x.groups for x in held]
        rows.append(
            LayerKind(
                name, kind, len(held), (min(groups), max(groups)),
                sum(x.groups - x.least for x in held), cost, cost / macs, count, count / total,
            )
        )  # fmt: skip
    return tuple(rows)


def _removable(layer: PrunableLayer, parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    """Count what of each parameter would go with all groups of a layer."""
    found: Counter[str] = Counter()
    for piece in layer.pieces:
        parameter = parameters.get(piece.parameter)
        if parameter is None or piece.axis is None or piece.whole:
            continue
        length = parameter.shape[piece.axis]
        if piece.partial:
            length = len(piece.starts) * layer.columns_of_groups
        found[piece.parameter] += parameter.numel() // parameter.shape[piece.axis] * length
    return found


def _whole(
    adapter: Adapter,
    layers: Iterable[PrunableLayer],
    parameters: dict[str, nn.Parameter],
    total: int,
) -> tuple[WholePart, ...]:
    goes: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for layer in layers:
        goes.update(_removable(layer, parameters))
        for piece in layer.pieces:
            if piece.axis is None:
                reasons[piece.parameter] = _BIAS
            elif piece.whole:
                reasons[piece.parameter] = _SHARED_NORM
    found: dict[tuple[str, str], int] = defaultdict(int)
    for name, parameter in parameters.items():
        left = parameter.numel() - goes[name]
        if left > 0:
            owner = name.rpartition(".")[0]
            pattern, why = _starred(owner), reasons.get(name)
            if why is None:
                pattern, why = _reason(adapter, owner, pattern, name)
            found[pattern, why] += left
    return tuple(
        WholePart(name, why, count, count / total)
        for (name, why), count in sorted(found.items(), key=lambda row: -row[1])
    )


def _reason(adapter: Adapter, owner: str, starred: str, name: str) -> tuple[str, str]:
    """Say by which pattern a module stays whole, and why."""
    for pattern, why in adapter.leaves:
        if fnmatchcase(owner, pattern) or fnmatchcase(name, pattern):
            return pattern, why
    for pattern, why in _USUAL_LEAVES:
        if fnmatchcase(name, pattern):
            return starred or name, why
    return starred or name, _ELSEWHERE
