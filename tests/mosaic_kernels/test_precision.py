"""Full precision whatever the caller has allowed for float32 products."""

import threading

import pytest
import torch

import mosaic_kernels as mk
from mosaic_kernels import _precision
from mosaic_kernels._precision import PRODUCTS, full_precision, own_value, read, write

LEVELS = ["highest", "high", "medium"]
new_only = pytest.mark.skipif(not _precision.BY_BACKEND, reason="needs torch 2.9 or later")
SETTINGS = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), *PRODUCTS]


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_float32_matmul_precision("highest")
    if _precision.BY_BACKEND:
        for setting in SETTINGS:
            write(setting, "none")


def state():
    """What is in force, and what would be if a parent changed."""
    if not _precision.BY_BACKEND:
        return torch.get_float32_matmul_precision()
    return [(read(setting), own_value(setting)) for setting in SETTINGS]


def reduced():
    return [setting for setting in PRODUCTS if read(setting) not in ("none", "ieee", "highest")]


@pytest.mark.parametrize("level", LEVELS)
def test_the_settings_are_restored(level):
    torch.set_float32_matmul_precision(level)
    before = state()
    assert bool(reduced()) == (level != "highest")
    with full_precision():
        assert not reduced()
        with full_precision():
            assert not reduced()
        assert not reduced()
    assert state() == before and torch.get_float32_matmul_precision() == level
    with pytest.raises(ZeroDivisionError), full_precision():
        1 / 0  # noqa: B018
    assert state() == before and torch.get_float32_matmul_precision() == level


@new_only
@pytest.mark.parametrize("generic", ["none", "ieee", "tf32", "bf16"])
@pytest.mark.parametrize("parent", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("own", ["none", "ieee", "tf32"])
def test_what_is_inherited_is_inherited_again(generic, parent, own):
    write(("generic", "all"), generic)
    for setting in PRODUCTS:
        write((setting[0], "all"), parent)
        write(setting, own)
    before = [read(setting) for setting in SETTINGS]
    with full_precision():
        assert not reduced()
    assert [read(setting) for setting in SETTINGS] == before
    for setting in PRODUCTS:  # it follows its parents as it did
        for value in ("ieee", "tf32"):
            write((setting[0], "all"), value)
            assert read(setting) == (value if own == "none" else own)
        write((setting[0], "all"), "none")
        write(("generic", "all"), "ieee")
        assert read(setting) == ("ieee" if own == "none" else own)


@new_only
def test_settings_of_both_kinds_do_no_harm():
    torch.set_float32_matmul_precision("high")
    write(("mkldnn", "matmul"), "bf16")  # torch.get_float32_matmul_precision() raises from here on
    before = state()
    mk.cholesky_inverse(torch.eye(4))
    assert state() == before


def test_the_single_setting_of_older_versions(monkeypatch):
    monkeypatch.setattr(_precision, "BY_BACKEND", False)
    monkeypatch.setattr(_precision, "PRODUCTS", (_precision.GENERIC,))
    for level in LEVELS:
        torch.set_float32_matmul_precision(level)
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == level


def test_the_last_of_several_threads_restores():
    torch.set_float32_matmul_precision("high")
    before = state()
    inside, leave = threading.Event(), threading.Event()

    def work():
        with full_precision():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with full_precision():
        thread.start()
        assert inside.wait(10)
    assert not reduced()
    leave.set()
    thread.join()
    assert state() == before


@pytest.mark.parametrize("level", ["high", "medium"])
def test_results_are_those_of_the_highest_precision(level, device, make_layer):
    weight, h = (t.to(device) for t in make_layer(2, 64, 320, torch.float32))
    kept = torch.arange(0, 320, 2, device=device)

    def results():
        trajectory = mk.prune_columns(weight, h, group_size=8, count=10)
        return [
            mk.cholesky_inverse(h)[0],
            trajectory.order,
            trajectory.losses,
            mk.prune_columns_joint([weight], [h], group_size=8, count=10).losses,
            mk.compensate(weight[0], h[0], kept),
        ]

    expected = results()
    torch.set_float32_matmul_precision(level)
    for result, wanted in zip(results(), expected, strict=True):
        assert torch.equal(result, wanted)
    assert torch.get_float32_matmul_precision() == level
