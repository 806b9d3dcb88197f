"""Tables of rows: of several tensors, joined of several calls, and halved where memory ends."""

import pytest
import torch

from mosaicdiff.adapters.inputs import Condition
from mosaicdiff.inputs.batching import fitting_rows, halving
from mosaicdiff.inputs.joining import joined
from mosaicdiff.inputs.rows import Rows

TEXT = Condition("encoder_hidden_states", ("text", "joint_attention_dim"))
MASK = Condition("encoder_hidden_states_mask", ("text",), optional=True, whole_numbers=True)
GUIDANCE = Condition("guidance", (), null=False, optional=True)


def test_rows_of_several_tensors():
    whole = torch.randn(20, 3)
    rows = Rows([whole[:7], whole[7:8], whole[8:8], whole[8:].double()])
    assert len(rows) == 20
    for picked in (torch.arange(20), torch.randperm(20), torch.tensor([7, 7, 19, 0])):
        assert torch.equal(rows.take(picked), whole[picked].double())


def test_rows_of_a_view_that_is_spread():
    one = torch.randn(1, 4)
    rows = Rows([one.expand(5, 4), torch.zeros(2, 4)])
    assert torch.equal(rows.take(torch.tensor([4, 6])), torch.stack([one[0], torch.zeros(4)]))


def part(length, mask=None, null=True, value=1.0):
    call = {"encoder_hidden_states": torch.full((2, length, 3), value)}
    if mask is not None:
        call["encoder_hidden_states_mask"] = torch.tensor([mask, mask])
    return call, {name: -v for name, v in call.items()} if null else {}


def test_equal_null_conditions_keep_one_row():
    found = joined([part(4), part(4)], (TEXT,))
    assert found["encoder_hidden_states"].shape == (4, 4, 3)
    assert found["negative_encoder_hidden_states"].shape == (1, 4, 3)
    found = joined([part(4), part(4, value=2.0)], (TEXT,))
    assert found["negative_encoder_hidden_states"].shape == (4, 4, 3)
    assert set(joined([part(4, null=False)], (TEXT,))) == {"encoder_hidden_states"}


def test_shorter_texts_are_padded_and_masked():
    found = joined([part(2), part(4), part(3, mask=[1, 1, 0])], (TEXT, MASK))
    assert found["encoder_hidden_states"].shape == (6, 4, 3)
    rows = [[1, 1, 0, 0]] * 2 + [[1, 1, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2
    assert found["encoder_hidden_states_mask"].tolist() == rows
    assert (found["encoder_hidden_states"][:2, 2:] == 0).all()
    assert found["negative_encoder_hidden_states_mask"].shape == (6, 4)
    alone = joined([part(2), part(2)], (TEXT, MASK))
    assert "encoder_hidden_states_mask" not in alone


def test_what_does_not_join_is_refused():
    with pytest.raises(ValueError, match="the same number of tokens, got 2, 4: the denoiser takes"):
        joined([part(2), part(4)], (TEXT,))
    call, null = part(2)
    with pytest.raises(ValueError, match="guidance must be given for all texts or for none"):
        joined([(call | {"guidance": torch.ones(2)}, null), part(2)], (TEXT, GUIDANCE))


def test_what_has_no_null_condition_is_kept_once():
    call, null = part(2)
    found = joined([({**call, "guidance": torch.ones(2)}, {**null, "guidance": torch.ones(2)})],
                   (TEXT, GUIDANCE))  # fmt: skip
    assert set(found) == {
        "encoder_hidden_states", "negative_encoder_hidden_states", "guidance",
    }  # fmt: skip


def test_batches_are_halved_where_memory_ends():
    seen = []

    def run(rows):
        seen.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("full")
        return rows * 2

    rows = torch.arange(9.0)
    assert torch.equal(torch.cat(list(halving(run, rows, 8))), rows * 2)
    assert seen == [8, 4, 2, 2, 2, 2, 1]

    def never(rows):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        list(halving(never, rows, 4))


@pytest.mark.parametrize("free, rows", [(1 << 40, 64), (40 * 8 * 4096 * 4 - 1, 8), (1, 1)])
def test_rows_on_the_cpu_follow_the_rule(monkeypatch, free, rows):
    module = torch.nn.Sequential(torch.nn.Linear(4, 4096), torch.nn.Linear(4096, 2))
    monkeypatch.setattr("mosaicdiff.inputs.batching.free_bytes", lambda device: free)
    call = lambda count: module(torch.zeros(count, 4))  # noqa: E731
    assert fitting_rows(call, torch.device("cpu"), module) == rows
    assert not any(m._forward_hooks for m in module.modules())
