"""What the Hessian update's formats cost in accuracy, emulated: the figures of its comments.

A tensor core multiplies TF32 or 16-bit numbers exactly, adds 8 or 16 such products to the
accumulator and cuts the result off to float32, towards zero (measured by Fasi, Higham, Mikaitis
and Pranesh, Numerical behavior of NVIDIA tensor cores, 2021).
"""

import numpy as np
import pytest

STEP = 32  # tokens of one product of Triton, which adds it to the accumulator by itself


def to_tf32(x):
    """Round to 10 explicit bits, to nearest."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def cut_off(wide):
    near = wide.astype(np.float32)
    return np.where(np.abs(near) > np.abs(wide), np.nextafter(near, np.float32(0)), near)


def on_tensor_cores(a, b, total, depth):
    for k in range(0, len(a), depth):
        total = cut_off(total + a[k : k + depth].astype(np.float64).T @ b[k : k + depth])
    return total


def three_products(x):
    big = to_tf32(x)
    small = to_tf32(x - big)
    h = np.zeros((x.shape[1],) * 2, np.float32)
    for k in range(0, len(x), STEP):
        b, s = big[k : k + STEP], small[k : k + STEP]
        part = on_tensor_cores(s, b, np.zeros_like(h), 8)
        part = on_tensor_cores(b, s, part, 8)
        h += on_tensor_cores(b, b, part, 8)
    return h


def one_product(x):
    big = to_tf32(x)
    return on_tensor_cores(big, big, np.zeros((x.shape[1],) * 2, np.float32), 8)


def fused_multiply_adds(x):
    h = np.zeros((x.shape[1],) * 2, np.float32)
    for row in x.astype(np.float64):
        h = (h + np.outer(row, row)).astype(np.float32)
    return h


def error(h, x):
    truth = x.astype(np.float64).T @ x.astype(np.float64)
    return np.abs(h - truth).max() / np.abs(truth).max()


@pytest.mark.parametrize("tokens", [1, 32, 300, 8192])
@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_three_tf32_products_are_as_good_as_float32(tokens, mean):
    x = (np.random.default_rng(0).standard_normal((tokens, 32)) + mean).astype(np.float32)
    three, plain, fused = (
        error(product(x), x) for product in (three_products, one_product, fused_multiply_adds)
    )
    assert three <= 2 * fused + 2 * np.finfo(np.float32).eps
    assert three <= 1e-6
    assert plain > 50 * three / (10 if tokens > 1000 else 1)
    if tokens >= 300:
        assert three < fused


def test_partial_sums_of_16_bits_come_out_low_in_proportion_to_their_tokens():
    found = []
    for tokens in (2048, 8192, 16384):
        x = np.random.default_rng(0).standard_normal((tokens, 16)).astype(np.float16)
        x = x.astype(np.float32)
        h = on_tensor_cores(x, x, np.zeros((16, 16), np.float32), 16)
        truth = (x.astype(np.float64) ** 2).sum(0)
        found.append(((truth - np.diag(h)) / truth).mean())
    assert 1e-5 < found[1] < 2e-5  # with CHUNK_TOKENS
    assert found[0] < found[1] / 3 and found[2] > 1.7 * found[1]
