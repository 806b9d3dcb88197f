"""Cut denoisers by hand: packed, and for comparison with the removed columns zeroed."""

import copy

import torch

from mosaicdiff.adapters import adapter_for
from mosaicdiff.pack import LayerState, dense_parts, narrow_parts
from mosaicdiff.surgery import Surgeon


def states_of(dense, kept, shared_norms="exact"):
    """What a stage that keeps these groups holds of its layers; kept: lists by layer name."""
    states = {}
    for layer in adapter_for(dense).layers(dense, shared_norms):
        if layer.name in kept:
            groups = torch.tensor(kept[layer.name], dtype=torch.long)
            parts = narrow_parts(dense_parts(dense, layer), layer, groups)
            states[layer.name] = LayerState(groups, parts)
    return states


def pack(dense, kept, shared_norms="exact"):
    """A stage of the dense denoiser that keeps these groups."""
    adapter = adapter_for(dense)
    surgeon = Surgeon(adapter, adapter.layers(dense, shared_norms))
    return surgeon.build(dense, states_of(dense, kept, shared_norms)).root


def zeroed(dense, kept):
    """A copy of the dense denoiser with the readers' columns of the removed groups zeroed."""
    model = copy.deepcopy(dense)
    for layer in adapter_for(model).layers(model):
        if layer.name in kept:
            gone = sorted(set(range(layer.groups)) - set(kept[layer.name]))
            columns = layer.columns(torch.tensor(gone, dtype=torch.long))
            for reader in layer.readers:
                weight = model.get_submodule(reader.module).weight.data
                reader.of_weight(weight)[:, columns] = 0
    return model
