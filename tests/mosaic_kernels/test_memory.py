"""Memory of an elimination: bounded, in parts, and refused before work starts."""

import pytest
import torch

import mosaic_kernels as mk
from mosaic_kernels import _memory, prune

CPU = torch.device("cpu")


def test_parts_of_a_batch_are_the_batch(device, make_layer):
    weight, h = (t.to(device) for t in make_layer(5, 6, 40))
    needed = prune.elimination_bytes(6, 40, 4, 8, h.device)
    whole = mk.prune_columns(weight, h, group_size=4)
    for layers in (1, 2, 5):
        part = mk.prune_columns(weight, h, group_size=4, max_bytes=layers * needed + 1)
        assert torch.equal(part.order, whole.order) and torch.equal(part.damping, whole.damping)
        torch.testing.assert_close(part.losses, whole.losses, rtol=1e-12, atol=0)


def test_a_failure_in_a_later_part_names_its_entry(make_layer):
    weight, h = make_layer(3, 4, 8)
    h[2] = 1000
    h[2].diagonal().fill_(1)
    needed = prune.elimination_bytes(4, 8, 1, 8, CPU)
    with pytest.raises(RuntimeError, match="no Cholesky factor for batch entry 2"):
        mk.prune_columns(weight, h, max_bytes=needed)


def test_one_layer_too_large_is_refused(make_layer, monkeypatch):
    weight, h = make_layer(1, 4, 8)
    needed = prune.elimination_bytes(4, 8, 1, 8, CPU)
    with pytest.raises(ValueError, match=f"max_bytes must be at least {needed}, .* got 1000"):
        mk.prune_columns(weight, h, max_bytes=1000)
    monkeypatch.setattr(_memory, "available_bytes", lambda device: needed - 1)
    with pytest.raises(RuntimeError, match="a layer needs .* GiB .*, got .* free on cpu. Free"):
        mk.prune_columns(weight, h)


def test_what_is_free():
    assert _memory.available_bytes(CPU) > 2**20
    assert _memory.available_bytes(torch.device("meta")) is None
    assert _memory.layers_at_once("f", 7, 10, torch.device("meta"), None) == 7
    assert _memory.layers_at_once("f", 7, 10, CPU, 35) == 3
