"""Several linears as one product."""

import pytest
import torch
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear

from mosaicdiff.execution.products import Joins, group_equal


class Owner(nn.Module):
    def __init__(self, biases=(True, True, True)):
        super().__init__()
        self.a = nn.Linear(4, 3, bias=biases[0])
        self.b = nn.Linear(4, 5, bias=biases[1])
        self.c = nn.Linear(4, 1, bias=biases[2])


def joined(owner, names="abc", joins=None):
    product = (joins or Joins()).linear([(owner, name) for name in names])
    product.refresh()
    return product


@pytest.mark.parametrize("biases", [(True,) * 3, (False,) * 3, (True, False, True)])
def test_is_the_linears_side_by_side(biases):
    owner = Owner(biases)
    x = torch.randn(2, 6, 4)
    apart = torch.cat([owner.a(x), owner.b(x), owner.c(x)], -1)
    product = joined(owner)
    assert torch.allclose(product(x), apart, atol=1e-6)
    assert product.sizes == [3, 5, 1]


def test_writes_through_both_ways():
    owner = Owner()
    product = joined(owner)
    with torch.no_grad():
        owner.b.weight.fill_(2.0)
        product.weight[0] = 7.0
    assert (product.weight[3:8] == 2.0).all()
    assert (owner.a.weight[0] == 7.0).all()
    assert product.refresh() is False


def test_joins_again_after_a_move():
    owner = Owner()
    product = joined(owner)
    owner.double()
    assert product.refresh() is True
    assert product.weight.dtype == torch.float64
    assert torch.equal(product.weight[:3], owner.a.weight)
    product.release()
    assert product.weight is None
    assert product.refresh() is True


def test_a_second_join_of_a_linear_copies_and_follows_it():
    owner, joins = Owner(), Joins()
    first = joined(owner, "ab", joins)
    second = joined(owner, "bc", joins)
    assert joined(owner, "ab", joins) is first
    assert first.refresh() is second.refresh() is False
    with torch.no_grad():
        owner.b.weight.add_(1.0)
    assert first.refresh() is False
    assert second.refresh() is True
    assert torch.equal(second.weight[:5], owner.b.weight)
    second.separate()
    assert owner.b.weight.untyped_storage().data_ptr() == first.weight.data_ptr()
    first.separate()
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in owner.parameters())


def test_what_cannot_be_read_directly_is_refused():
    owner = Owner()
    product = joined(owner)
    owner.a.weight.data = owner.a.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match="must be a plain linear of 16 or 32 bits, but its weig"):
        product.refresh()
    owner = Owner()
    owner.a.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(RuntimeError, match="a must be a plain linear .* but it is hooked"):
        joined(owner)
    owner = Owner()
    owner.a = QuantizedLinear(4, 3)
    with pytest.raises(ValueError, match="a must be a plain linear, got Linear"):
        joined(owner)


def test_groups_of_equal_modules():
    modules = [nn.Linear(2, 2) for _ in range(4)]
    modules[2].load_state_dict(modules[0].state_dict())
    assert group_equal(modules) == [[0, 2], [1], [3]]
