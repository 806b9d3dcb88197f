"""Parameters and MACs of full-size denoisers on the meta device, against closed forms."""

import pytest

from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.evaluate.configurations import configuration, random_staged

pytestmark = pytest.mark.models

#: Tokens of 1024x1024 pixels.
IMAGE = 4096


def linear(inputs, outputs):
    """Parameters of a linear with a bias."""
    return inputs * outputs + outputs


def mlp(inputs, width):
    """Parameters of an embedder of two linears."""
    return linear(inputs, width) + linear(width, width)


def joint_block(width, head, heads, image, text, context, tokens):
    """Parameters, and MACs of linears and attention, of a block of two streams.

    Args:
        heads, image, text: how many heads, and neurons of each stream, there are.
        context: whether the text goes on behind the block.
        tokens: of image and text.
    """
    columns, pictures, words = heads * head, *tokens
    parameters = linear(width, 6 * width) + linear(width, (6 if context else 2) * width)
    parameters += 6 * linear(width, columns) + linear(columns, width) * (2 if context else 1)
    parameters += 4 * head
    parameters += linear(width, image) + linear(image, width)
    macs = 6 * width**2 + (6 if context else 2) * width**2
    macs += (pictures + words) * 3 * width * columns + pictures * columns * width
    macs += 2 * pictures * width * image
    if context:
        parameters += linear(width, text) + linear(text, width)
        macs += words * columns * width + 2 * words * width * text
    return parameters, macs, 2 * (pictures + words) ** 2 * columns


def single_block(width, head, heads, neurons, tokens):
    """The same of a parallel block."""
    columns, total = heads * head, sum(tokens)
    parameters = linear(width, 3 * width) + 3 * linear(width, columns) + 2 * head
    parameters += linear(width, neurons) + linear(columns + neurons, width)
    macs = 3 * width**2 + total * width * (3 * columns + neurons + columns + neurons)
    return parameters, macs, 2 * total**2 * columns


def flux_dev(kept):
    """FLUX.1-dev: kept says how many groups of a layer are left."""
    width, head, tokens = 3072, 128, (IMAGE, 512)
    parameters = linear(64, width) + linear(4096, width)
    parameters += 2 * mlp(256, width) + mlp(768, width)
    macs = tokens[0] * 64 * width + tokens[1] * 4096 * width
    macs += (256 + 256 + 768) * width + 3 * width**2
    parts = [
        joint_block(
            width, head, kept(f"transformer_blocks.{i}.attn", 24),
            kept(f"transformer_blocks.{i}.ff", 4 * width),
            kept(f"transformer_blocks.{i}.ff_context", 4 * width), True, tokens,
        )
        for i in range(19)
    ]  # fmt: skip
    for i in range(38):
        name = f"single_transformer_blocks.{i}"
        heads, neurons = kept(f"{name}.attn", 24), kept(f"{name}.mlp", 4 * width)
        parts.append(single_block(width, head, heads, neurons, tokens))
    parameters += linear(width, 2 * width) + linear(width, 64)
    macs += 2 * width**2 + tokens[0] * width * 64
    return total(parameters, macs, parts)


def sd35_large(kept):
    """SD3.5-Large."""
    width, head, tokens = 2432, 64, (IMAGE, 333)
    parameters = linear(2 * 2 * 16, width) + linear(4096, width)
    parameters += mlp(256, width) + mlp(2048, width)
    macs = tokens[0] * 64 * width + tokens[1] * 4096 * width + (256 + 2048) * width + 2 * width**2
    parts = [
        joint_block(
            width, head, kept(f"transformer_blocks.{i}.attn", 38),
            kept(f"transformer_blocks.{i}.ff", 4 * width),
            kept(f"transformer_blocks.{i}.ff_context", 4 * width), i < 37, tokens,
        )
        for i in range(38)
    ]  # fmt: skip
    parameters += linear(width, 2 * width) + linear(width, 64)
    macs += 2 * width**2 + tokens[0] * width * 64
    return total(parameters, macs, parts)


def total(parameters, macs, parts):
    return (
        parameters + sum(p for p, _, _ in parts),
        macs + sum(m for _, m, _ in parts),
        sum(a for _, _, a in parts),
    )


@pytest.mark.parametrize(
    "name, form, published",
    [("flux-dev", flux_dev, 11_901_408_320), ("sd3.5-large", sd35_large, 8_056_627_520)],
)
def test_parameters_and_macs_dense_and_at_30_percent(name, form, published):
    dense = configuration(name).empty()
    adapter = adapter_for(dense)
    staged = random_staged(dense, PruneConfig(sparsity=0.3, allocation="uniform", stages=1))
    layers, kept = adapter.layers(dense), staged.info.kept[0]
    left = {layer.name: len(kept.get(layer.name, range(layer.groups))) for layer in layers}
    spent = sum(layer.cost * (layer.groups - left[layer.name]) for layer in layers)
    assert spent / sum(x.cost * x.groups for x in layers) == pytest.approx(0.3, abs=0.005)
    for model, expected in (
        (dense, form(lambda layer, whole: whole)),
        (staged.stage_models[0], form(lambda layer, whole: left.get(layer, whole))),
    ):
        macs = adapter.macs(model)
        count = sum(p.numel() for p in model.parameters())
        assert (count, macs.linear, macs.attention) == expected
    assert sum(p.numel() for p in dense.parameters()) == published
    assert form(lambda layer, whole: whole)[0] == published
