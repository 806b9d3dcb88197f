"""The CUDA panel for wide groups, run on the CPU, against torch's and the reference."""

import ctypes

import pytest
import torch
from host_builds import host_library, needs_compiler

import mosaic_kernels as mk
from mosaic_kernels import _elimination
from mosaic_kernels.ref import prune_columns_ref

pytestmark = needs_compiler
LIMIT = 99 * 1024  # bytes of shared memory on the smaller chips
# (batch, rows, columns, group size): odd groups, groups over several panels, one group alone
CASES = [
    (1, 5, 6, 2),
    (3, 9, 90, 2),
    (1, 20, 81, 3),
    (2, 16, 96, 8),
    (1, 24, 160, 32),
    (2, 12, 216, 72),
    (1, 6, 40, 40),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return host_library("prune_groups_host", tmp_path_factory.mktemp("host"))


@pytest.fixture
def panel_host(library):
    """Return the CUDA panel, run by host threads, with a limit on shared memory."""
    library.prune_groups_workspace_host.restype = ctypes.c_int64

    def with_limit(limit=LIMIT):
        def run_panel(state, pivots):
            panel = _elimination.empty_panel(state, pivots)
            batch, n = state.inverse.shape[:2]
            g, size = state.group_size, state.inverse.element_size()
            fields = [*_elimination.addresses(state, panel), n, g, pivots]
            struct = (ctypes.c_int64 * len(fields))(*fields)
            library.set_shared_limit_host(ctypes.c_int64(limit))
            elements = library.prune_groups_workspace_host(*map(ctypes.c_int64, (n // g, g, size)))
            assert (elements > 0) == ((g + 1) * (g | 1) * size > limit)
            workspace = state.inverse.new_empty(batch * elements)
            address = ctypes.c_void_p(workspace.data_ptr() or None)
            getattr(library, f"prune_groups_host_f{8 * size}")(
                struct, address, ctypes.c_int64(batch)
            )
            return panel

        return run_panel

    return with_limit


@pytest.mark.parametrize("limit", [LIMIT, 100])
@pytest.mark.parametrize("batch, m, n, group", CASES)
def test_float64_is_the_reference(batch, m, n, group, limit, panel_host, make_layer):
    weight, h = make_layer(batch, m, n)
    inverse = mk.cholesky_inverse(h, 0.01)[0]
    panel = panel_host(limit)
    order, losses = _elimination.eliminate(weight, inverse.clone(), group, n // group, panel)
    for b in range(batch):
        ref_order, ref_losses, _ = prune_columns_ref(weight[b], h[b], group, n // group, 0.01)
        assert torch.equal(order[b], ref_order)
        torch.testing.assert_close(losses[b], ref_losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("batch, m, n, group", CASES)
def test_float32_loses_no_more_than_torch(batch, m, n, group, panel_host, make_layer):
    weight, h = make_layer(batch, m, n, torch.float32)
    inverse = mk.cholesky_inverse(h)[0]
    count = n // group
    runs = [
        _elimination.eliminate(weight, inverse.clone(), group, count, panel)[1].sum(1)
        for panel in (panel_host(), _elimination.panel_torch)
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("group, pivots", [(2, 5), (8, 3), (13, 2)])
def test_one_panel_leaves_what_the_other_leaves(group, pivots, panel_host, make_layer):
    weight, h = make_layer(2, 30, 104)
    inverse = mk.cholesky_inverse(h)[0]
    states, panels = [], []
    for panel in (panel_host(), _elimination.panel_torch):
        states.append(_elimination.initial_state(weight, inverse, group))
        panels.append(panel(states[-1], pivots))
    here, there = panels
    assert torch.equal(here.picked, there.picked)
    assert torch.equal(states[0].alive, states[1].alive)
    torch.testing.assert_close(here.u.mT @ here.u, there.u.mT @ there.u)
    # V is one of several with the same update of G.
    cross = [panel.u.mT @ panel.v for panel in panels]
    torch.testing.assert_close(cross[0] + cross[0].mT, cross[1] + cross[1].mT)
    left = states[0].alive
    for name in ("inverse_blocks", "gram_blocks"):
        mine, other = (getattr(state, name)[left] for state in states)
        torch.testing.assert_close(mine, other)
        assert torch.equal(mine, mine.mT)
    removed = ~left.repeat_interleave(group, dim=1)
    for b in range(2):  # a group's columns are zero from its own removal on
        last = here.picked[b, -1] * group
        assert not here.u[b, -group:, removed[b]].any() and not here.v[b, -group:, last].any()


def test_ties_and_dead_groups(panel_host):
    inverse = torch.eye(40)[None]
    weight = torch.ones(1, 2, 40)
    weight[:, :, 28:32] = 0
    order, losses = _elimination.eliminate(weight, inverse.clone(), 4, 10, panel_host())
    assert order[0].tolist() == [7, *range(7), 8, 9]
    assert losses[0].tolist() == [0.0] + [8.0] * 9


@pytest.mark.parametrize("limit", [LIMIT, 100])
@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), float("inf")])
def test_breakdown_stays_in_its_layer(bad, limit, panel_host, make_layer):
    weight, h = make_layer(3, 4, 40)
    inverse = mk.cholesky_inverse(h)[0]
    good = _elimination.eliminate(weight, inverse.clone(), 5, 8, panel_host(limit))
    inverse[1, 7, 7] = inverse[1, 33, 33] = bad
    order, losses = _elimination.eliminate(weight, inverse.clone(), 5, 8, panel_host(limit))
    assert torch.isnan(losses[1]).all() and order[1].tolist() == list(range(8))
    assert torch.equal(losses[[0, 2]], good[1][[0, 2]])
    assert torch.equal(order[[0, 2]], good[0][[0, 2]])


def test_the_same_result_twice(panel_host, make_layer):
    weight, h = make_layer(2, 10, 96, torch.float32)
    inverse = mk.cholesky_inverse(h)[0]
    runs = [_elimination.eliminate(weight, inverse.clone(), 8, 12, panel_host()) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
