"""Full-size denoisers with attention to the text apart, on the meta device: closed forms."""

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from mosaicdiff import PruneConfig
from mosaicdiff.adapters import adapter_for
from mosaicdiff.evaluate.configurations import configuration
from mosaicdiff.pipeline import cut

from .test_full_size import linear, mlp, total

pytestmark = pytest.mark.models


def attention(width, columns, tokens, source=None, keys=None, bias=True, whole=None):
    """Parameters, and MACs of linears and attention, of one attention.

    Args:
        columns: of the heads that are left.
        tokens: that ask.
        source: width and tokens of what is asked, where that is something else.
        whole: columns of queries and keys, where they stay.
    """
    inputs, others = (width, tokens) if source is None else source
    asked = columns if whole is None else whole
    made = (width + inputs) * asked + inputs * columns + (2 * asked + columns if bias else 0)
    parameters = made + linear(columns, width)
    macs = tokens * width * (asked + columns) + others * inputs * (asked + columns)
    return parameters, macs, 2 * tokens * others * columns


def feed_forward(width, neurons, tokens, halves=1):
    parameters = linear(width, halves * neurons) + linear(neurons, width)
    return parameters, tokens * width * neurons * (halves + 1), 0


def dit_xl_2(kept):
    width, tokens, blocks = 1152, 256, 28
    parts = []
    for i in range(blocks):
        name = f"transformer_blocks.{i}"
        # Each block has its own embedder of timestep and label, and modulation.
        embedder = mlp(256, width) + 1001 * width + linear(width, 6 * width)
        parts.append((embedder, 256 * width + 7 * width**2, 0))
        parts.append(attention(width, 72 * kept(f"{name}.attn1", 16), tokens))
        parts.append(feed_forward(width, kept(f"{name}.ff", 4 * width), tokens))
    parameters = linear(16, width) + linear(width, 2 * width) + linear(width, 32)
    # The first block's embedder runs once more for the output.
    macs = tokens * (16 + 32) * width + 256 * width + 3 * width**2
    return total(parameters, macs, parts)


def pixart_sigma_xl(kept):
    width, tokens, text = 1152, 4096, 300
    parts = []
    for i in range(28):
        name = f"transformer_blocks.{i}"
        heads = [72 * kept(f"{name}.{part}", 16) for part in ("attn1", "attn2")]
        parts.append((6 * width, 0, 0))
        parts.append(attention(width, heads[0], tokens))
        parts.append(attention(width, heads[1], tokens, (width, text)))
        parts.append(feed_forward(width, kept(f"{name}.ff", 4 * width), tokens))
    parameters = linear(16, width) + mlp(256, width) + linear(width, 6 * width)
    parameters += mlp(4096, width) + 2 * width + linear(width, 32)
    macs = tokens * (16 + 32) * width + 256 * width + 7 * width**2
    macs += text * (4096 * width + width**2)
    return total(parameters, macs, parts)


def wan_14b(kept):
    """Norms over all heads: queries and keys stay whole."""
    width, tokens, text = 5120, 21 * 30 * 52, 512
    parts = []
    for i in range(40):
        heads = [128 * kept(f"blocks.{i}.{part}", 40) for part in ("attn1", "attn2")]
        parts.append((6 * width + 2 * width + 4 * width, 0, 0))  # modulation, norm2, q and k norms
        parts.append(attention(width, heads[0], tokens, whole=width))
        parts.append(attention(width, heads[1], tokens, (width, text), whole=width))
        parts.append(feed_forward(width, kept(f"blocks.{i}.ffn", 13824), tokens))
    parameters = linear(64, width) + mlp(256, width) + linear(width, 6 * width)
    parameters += mlp(4096, width) + 2 * width + linear(width, 64)
    macs = tokens * 2 * 64 * width + 256 * width + 7 * width**2
    macs += text * (4096 * width + width**2)
    return total(parameters, macs, parts)


class SDXL:
    """Sum up the U-Net as it runs."""

    def __init__(self, kept):
        self.kept = kept
        self.parts = [(mlp(320, 1280) + mlp(2816, 1280), (320 + 2816) * 1280 + 2 * 1280**2, 0)]

    def convolution(self, inputs, outputs, side, kernel=3):
        weights = inputs * outputs * kernel**2
        self.parts.append((weights + outputs, weights * side**2, 0))

    def residual(self, inputs, outputs, side):
        self.parts.append((2 * inputs + 2 * outputs + linear(1280, outputs), 1280 * outputs, 0))
        self.convolution(inputs, outputs, side)
        self.convolution(outputs, outputs, side)
        if inputs != outputs:
            self.convolution(inputs, outputs, side, 1)

    def transformer(self, name, width, depth, side):
        tokens = side**2
        self.parts.append((2 * width + 2 * linear(width, width), 2 * tokens * width**2, 0))
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            own, text = (64 * self.kept(f"{block}.{a}", width // 64) for a in ("attn1", "attn2"))
            self.parts += [
                (6 * width, 0, 0),
                attention(width, own, tokens, bias=False),
                attention(width, text, tokens, (2048, 77), bias=False),
                feed_forward(width, self.kept(f"{block}.ff", 4 * width), tokens, halves=2),
            ]

    def count(self):
        self.convolution(4, 320, 128)
        for level, (inputs, outputs, depth) in enumerate(
            [(320, 320, 0), (320, 640, 2), (640, 1280, 10)]
        ):
            side = 128 >> level
            for i, given in enumerate((inputs, outputs)):
                self.residual(given, outputs, side)
                if depth:
                    self.transformer(f"down_blocks.{level}.attentions.{i}", outputs, depth, side)
            if level < 2:
                self.convolution(outputs, outputs, side // 2)
        self.residual(1280, 1280, 32)
        self.transformer("mid_block.attentions.0", 1280, 10, 32)
        self.residual(1280, 1280, 32)
        # What a residual block is given: what comes up, beside what was left on the way down.
        ups = [
            (1280, 10, 32, (1280 + 1280, 1280 + 1280, 1280 + 640)),
            (640, 2, 64, (1280 + 640, 640 + 640, 640 + 320)),
            (320, 0, 128, (640 + 320, 320 + 320, 320 + 320)),
        ]
        for level, (width, depth, side, given) in enumerate(ups):
            for i, inputs in enumerate(given):
                self.residual(inputs, width, side)
                if depth:
                    self.transformer(f"up_blocks.{level}.attentions.{i}", width, depth, side)
            if level < 2:
                self.convolution(width, width, 2 * side)
        self.parts.append((2 * 320, 0, 0))
        self.convolution(320, 4, 128)
        return total(0, 0, self.parts)


CASES = {
    "dit-xl-2": (dit_xl_2, 749_826_464),  # 674.8M of them distinct
    "pixart-sigma-xl": (pixart_sigma_xl, 610_856_096),
    "sdxl": (lambda kept: SDXL(kept).count(), 2_567_463_684),
    "wan-2.1-14b": (wan_14b, 14_288_491_584),
}


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_macs_dense_and_at_30_percent(name):
    form, published = CASES[name]
    dense = configuration(name).empty()
    adapter = adapter_for(dense)
    flow = adapter.sigma_scale is not None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else DDIMScheduler()
    config = PruneConfig(sparsity=0.3, allocation="uniform", stages=1)
    staged = cut(dense, config, scheduler=scheduler)
    layers, kept = adapter.layers(dense), staged.info.kept[0]
    left = {layer.name: len(kept.get(layer.name, range(layer.groups))) for layer in layers}
    spent = sum(x.cost * (x.groups - left[x.name]) for x in layers)
    assert spent / sum(x.cost * x.groups for x in layers) == pytest.approx(0.3, abs=0.005)
    for model, expected in (
        (dense, form(lambda layer, whole: whole)),
        (staged.stage_models[0], form(lambda layer, whole: left[layer])),
    ):
        macs = adapter.macs(model)
        count = sum(p.numel() for p in model.parameters())
        assert (count, macs.linear, macs.attention) == expected
    assert form(lambda layer, whole: whole)[0] == published
