"""The table of configurations of the Hessian update, and the choice of one.

For each architecture and use a few, the first of which is launched unless ``tune_hessian`` has
found another to be faster on the device at hand.
"""

from collections.abc import Callable

import torch

from mosaic_kernels._triton.hessian_plan import Config

# Hopper, 16 bits: 128 x 256 tiles with wgmma, since each token then feeds 85 operations for a
# byte from the L2 cache (64 with 128 x 128, which would need 12 TB/s of it at the full rate). The
# accumulator is 128 of the 255 registers a thread of 8 warps has, so there is no room for a second
# one: partial sums go to the workspace instead, and per-sample weights, whose partial sums may be
# as short as 64 tokens, take 128 x 128 with two sums in registers. 4 stages of 48 KiB fit the 227
# KiB of a block, one block a multiprocessor. n = 4608, 32768 tokens, 132 multiprocessors: 342
# tiles (5.5% more than n (n + 1) / 2) are two full rounds, and 78 tiles cut into 5 make 3 rounds
# of a fifth: 2.6 rounds in all where 2.59 is ideal and three whole ones would be 2.59 / 3 = 86%.
# Loads are cp.async, not descriptors: those need Triton 3.3 and rows aligned to 16 bytes.
_HOPPER = {
    ("wide", 16): (Config(128, 256, 64, 8, 4, False), Config(128, 256, 64, 8, 3, False)),
    ("two sums", 16): (Config(128, 128, 64, 8, 4, True), Config(128, 128, 64, 8, 3, True)),
    ("wide", 32): (Config(128, 128, 32, 8, 4, False), Config(128, 128, 32, 8, 3, False)),
    ("two sums", 32): (Config(64, 64, 32, 4, 4, True), Config(64, 128, 32, 8, 4, True)),
}
# Ampere, Ada and consumer Blackwell: mma.sync, whose operands take registers too (128 x 256
# spills), in the 99 KiB of the smallest of them.
_AMPERE = {
    ("wide", 16): (Config(128, 128, 64, 8, 4, False), Config(128, 128, 32, 8, 4, False)),
    ("two sums", 16): (Config(128, 128, 32, 8, 4, True), Config(64, 128, 64, 8, 4, True)),
    ("wide", 32): (Config(128, 128, 16, 8, 3, False), Config(64, 128, 16, 8, 3, False)),
    ("two sums", 32): (Config(64, 64, 16, 4, 4, True), Config(64, 64, 16, 4, 3, True)),
}
# Data-centre Blackwell: accumulators in tensor memory, but 128 x 256 spills as it is stored.
_BLACKWELL = {
    ("wide", 16): (Config(128, 128, 64, 8, 4, False), Config(128, 128, 64, 8, 3, False)),
    ("two sums", 16): (Config(128, 128, 64, 8, 4, True), Config(128, 128, 64, 8, 3, True)),
    ("wide", 32): (Config(128, 128, 32, 8, 3, False), Config(128, 128, 32, 8, 4, False)),
    ("two sums", 32): (Config(64, 64, 32, 4, 2, True), Config(64, 64, 32, 4, 3, True)),
}
TABLE = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL}
# Below this width there are fewer wide tiles than multiprocessors, and more of each is wasted on
# the diagonal: 128 x 128 and two sums, which leave the number of parts free.
NARROW_COLUMNS = 2048

_FOUND: dict[tuple[torch.device, torch.dtype, int, bool], Config] = {}


def architecture(major: int, minor: int) -> int:
    """Return whose row of the table a compute capability uses: 80, 90 or 100."""
    if major == 9:
        return 90
    return 100 if major in (10, 11) else 80


def device_class(device: torch.device) -> tuple[int, int]:
    """Return the row of the table and the number of multiprocessors of a device."""
    if device.type != "cuda":
        return 90, 132  # Triton's interpreter runs on the CPU; it plays an H200
    properties = torch.cuda.get_device_properties(device)
    return architecture(properties.major, properties.minor), properties.multi_processor_count


def candidates(chip: int, dtype: torch.dtype, n: int, weighted: bool) -> tuple[Config, ...]:
    """Return the few configurations of a use, the default first."""
    use = "two sums" if weighted or n < NARROW_COLUMNS else "wide"
    return TABLE[chip][use, 8 * dtype.itemsize]


def choose_config(device: torch.device, dtype: torch.dtype, n: int, weighted: bool) -> Config:
    """Return what ``tune_hessian`` found on this device, or else the table's first."""
    found = _FOUND.get((device, dtype, n, weighted))
    return found or candidates(device_class(device)[0], dtype, n, weighted)[0]


def remember_fastest(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    weighted: bool,
    milliseconds: Callable[[Config], float],
) -> dict[Config, float]:
    """Time each candidate, remember the fastest for this process, and return all the times."""
    times = {
        config: milliseconds(config)
        for config in candidates(device_class(device)[0], dtype, n, weighted)
    }
    _FOUND[device, dtype, n, weighted] = min(times, key=lambda config: times[config])
    return times
