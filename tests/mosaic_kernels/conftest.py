"""Devices, layers and the tolerance that the tests of the kernels share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: the cases are so small that sharing them costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Run a test on the CPU and, where there is one, on a CUDA device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture
def make_layer() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a factory of (weight, H): correlated channels, so that compensation matters."""

    def make(
        batch: int, m: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        mixing = torch.eye(n, dtype=torch.float64) + random(batch, n, n) / n**0.5
        x = random(batch, 2 * n + 8, n) * (0.2 + random(batch, 1, n).abs()) @ mixing
        return random(batch, m, n).to(dtype), (x.mT @ x / x.shape[1]).to(dtype)

    return make


@pytest.fixture
def check_error() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Return a check that a result is as near to the truth as torch is in the same type.

    The tolerance is a ratio to a known error: twice torch's own, plus a rounding of the result.
    """

    def check(actual: Tensor, by_torch: Tensor, truth: Tensor) -> None:
        assert actual.dtype == by_torch.dtype
        wide = truth.double().cpu()
        error = (actual.double().cpu() - wide).abs().max()
        known = (by_torch.double().cpu() - wide).abs().max()
        rounding = torch.finfo(actual.dtype).eps * wide.abs().max()
        assert error <= 2 * known + 2 * rounding, f"error {error:.3g}, torch's own {known:.3g}"

    return check
