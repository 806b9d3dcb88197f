"""Swap mode: the same bits with one stage on the device, and nothing lost on the way."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mosaicdiff
from mosaicdiff.memory.count import measure_memory, state_memory

from ..conftest import sample, tiny_denoiser
from ..family_cases import CASES
from ..test_checkpoint import prune, run_stages
from ..test_clock import CountReads
from ..test_families import call, staged_of, uneven

FILE = "diffusion_pytorch_model.safetensors"
KINDS = [
    {"sparsity": 0.4},
    {"sparsity": 0.4, "compensation": "affine"},
    {"sparsity": 0.4, "compensation": "none", "criterion": "magnitude"},
    {"allocation": "explicit", "stage_sparsity": (0.6, 0.0, 0.0)},
    {"allocation": "explicit", "stage_sparsity": (1.0, 0.2, 0.95)},
    {"stages": 1},
]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def staged():
    return prune(tiny_denoiser(), sparsity=0.4)


@pytest.fixture
def swapped(staged):
    staged.set_stage_memory("swap")
    return staged


@pytest.mark.parametrize("config", KINDS, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_swap_gives_the_same_bits_and_files(config, tmp_path):
    staged = prune(tiny_denoiser(), **config)
    expected, macs = run_stages(staged), staged.macs()
    staged.save_pretrained(tmp_path / "resident")
    staged.set_stage_memory("swap")
    assert staged.stage_memory == "swap"
    for _ in range(2):
        assert same(run_stages(staged), expected)
    assert staged.macs() == macs
    staged.save_pretrained(tmp_path / "swap")
    assert same(run_stages(staged), expected)
    files = [(tmp_path / mode / FILE).read_bytes() for mode in ("resident", "swap")]
    assert files[0] == files[1]
    loaded = mosaicdiff.StagedDenoiser.from_pretrained(tmp_path / "swap", stage_memory="swap")
    assert loaded.stage_memory == "swap" and same(run_stages(loaded), expected)
    for model in (staged, loaded):
        model.set_stage_memory("resident")
        assert model.stage_memory == "resident" and same(run_stages(model), expected)
        assert len(model.state_dict()) > 0


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_pictures_are_bit_equal(staged_pipe, guidance):
    expected = sample(staged_pipe, guidance=guidance)
    staged_pipe.transformer.set_stage_memory("swap")
    for _ in range(2):
        assert (sample(staged_pipe, guidance=guidance) == expected).all()


@pytest.mark.models
@pytest.mark.parametrize("name", CASES)
def test_every_family_swaps(name):
    case = CASES[name]
    dense = case.make().double().eval()
    stages = [uneven(dense), {}, uneven(dense, ("neurons",)), uneven(dense, ("heads",))]
    staged = staged_of(dense, stages[:3])
    heads = staged_of(dense, stages[3:] + stages[:1])
    for model in (staged, heads):
        numbers = range(len(model.stage_models))
        expected = [call_stage(model, k, case) for k in numbers]
        resident = sum(p.numel() for p in model.parameters())
        model.set_stage_memory("swap")
        assert sum(p.numel() for p in model.parameters()) < resident
        for k in (*numbers, *numbers):
            assert torch.equal(call_stage(model, k, case), expected[k])
    shelves = sum(shelf.tensor.numel() for shelf in staged.swap.shelves)
    apart = sum(slot.source.shape.numel() for slot in staged.swap.slots)
    assert shelves < apart  # writers are there once


def call_stage(model, stage, case):
    model.activate_stage(stage)
    return call(model.stage_models[stage], case)


def test_the_device_holds_what_is_shared_and_one_stage(swapped):
    stages = swapped.stage_models
    shared = {id(p) for p in stages[0].parameters()}
    for stage in stages:
        shared &= {id(p) for p in stage.parameters()}
    stated = state_memory(swapped)
    seen = []
    for k, stage in enumerate(stages):
        swapped.activate_stage(k)
        live = measure_memory(swapped).live["cpu"]
        own = sum(p.numel() * 4 for p in stage.parameters())
        buffers = sum(b.numel() * b.element_size() for b in swapped.buffers())
        assert live == own + buffers
        seen.append(live)
        for other in (m for m in stages if m is not stage):
            mine = {id(p) for p in stage.parameters()}
            assert all(p.numel() == 0 for p in other.parameters() if id(p) not in mine)
    assert max(seen) == stated.swap_device
    assert measure_memory(swapped).bank == stated.swap_host


class LiveBytes(TorchDispatchMode):
    """Note, at every gathering, how much the stages hold."""

    def __init__(self, staged):
        super().__init__()
        self.staged, self.most = staged, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        held = {id(p): p.numel() * p.element_size() for p in self.staged.parameters()}
        self.most = max(self.most, sum(held.values()))
        return result


def test_two_stages_are_never_there_together(swapped):
    stated = state_memory(swapped)
    with LiveBytes(swapped) as live:
        for k in (1, 2, 0, 2):
            swapped.activate_stage(k)
    buffers = sum(b.numel() * b.element_size() for b in swapped.buffers())
    assert 0 < live.most + buffers <= stated.swap_device


@pytest.mark.parametrize("mode", ["resident", "swap"])
def test_no_read_but_the_schedulers_own(pipe, staged_pipe, mode):
    """The dense pipeline reads as often: a switch, too, reads nothing."""
    staged_pipe.transformer.set_stage_memory(mode)
    counts = []
    staged = staged_pipe.transformer
    for denoiser in (tiny_denoiser(), staged):
        staged_pipe.transformer = denoiser
        sample(staged_pipe, steps=9)  # what is done once is not counted
        with CountReads() as reads:
            sample(staged_pipe, steps=9)
        counts.append(reads.count)
    # DDIM reads its timestep at each step; the clock none of them, the beginning of a run at most.
    assert counts[1] - counts[0] <= 3
    assert counts[0] >= 9


@pytest.mark.parametrize("mode", ["resident", "swap"])
def test_steps_add_no_reads(staged_pipe, mode):
    staged_pipe.transformer.set_stage_memory(mode)
    dense, staged = tiny_denoiser(), staged_pipe.transformer
    added = []
    for steps in (6, 18):
        counts = []
        for denoiser in (dense, staged):
            staged_pipe.transformer = denoiser
            with CountReads() as reads:
                sample(staged_pipe, steps=steps)
            counts.append(reads.count)
        added.append(counts[1] - counts[0])
    assert added[0] == added[1]


def test_types_change_in_both_places(staged):
    expected = run_stages(copy.deepcopy(staged).to(torch.bfloat16))
    staged.set_stage_memory("swap")
    assert same(run_stages(staged.to(torch.bfloat16)), expected)
    assert {shelf.tensor.dtype for shelf in staged.swap.shelves} == {torch.bfloat16}
    assert run_stages(staged.half())[0].dtype == torch.float16


def test_moved_to_another_device_only_the_stage_goes(swapped):
    """What is moved is what is shared; the stage is brought from the bank to where that is."""
    expected, moved = run_stages(swapped), {}
    swapped._apply(lambda tensor: moved.setdefault(id(tensor), tensor.clone()))
    own = {id(slot.parameter) for slot in swapped.swap.slots}
    shared = sum(p.numel() for p in swapped.parameters() if id(p) not in own)
    buffers = sum(b.numel() for b in swapped.buffers())
    assert sum(tensor.numel() for tensor in moved.values()) <= shared + 3 * buffers  # of each stage
    assert same(run_stages(swapped), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_their_own(swapped, clone):
    expected = run_stages(swapped)
    other = clone(swapped)
    assert other.stage_memory == "swap" and same(run_stages(other), expected)
    for shelf in other.swap.shelves:
        shelf.tensor.zero_()
    assert same(run_stages(swapped), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("first", ["compile", "swap"])
def test_compiled_stages_swap_without_compiling_again(staged, backend, first):
    torch._dynamo.reset()
    expected = run_stages(staged)
    if first == "swap":
        staged.set_stage_memory("swap")
    staged.compile(backend=backend)
    staged.set_stage_memory("swap")
    frames = torch._dynamo.utils.counters["frames"]
    with torch.no_grad():
        assert same(run_stages(staged), expected)
        made = frames["ok"]
        for _ in range(2):
            assert same(run_stages(staged), expected)
    assert frames["ok"] == made
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["optimize", "swap"])
def test_fused_stages_swap(staged, first):
    with torch.no_grad():
        mosaicdiff.optimize(staged)
        expected = run_stages(staged)
        if first == "swap":
            mosaicdiff.restore(staged)
        staged.set_stage_memory("swap")
        if first == "swap":
            mosaicdiff.optimize(staged)
        for _ in range(2):
            assert same(run_stages(staged), expected)
        # Joined weights hold views of one tensor, and no byte more.
        assert max_live(staged) == state_memory(staged).swap_device
        mosaicdiff.restore(staged)
        staged.set_stage_memory("resident")
        mosaicdiff.optimize(staged)
        assert same(run_stages(staged), expected)


def test_fused_and_compiled_stages_swap(staged):
    torch._dynamo.reset()
    with torch.no_grad():
        mosaicdiff.optimize(staged)
        expected = run_stages(staged)
        mosaicdiff.restore(staged)
        staged.set_stage_memory("swap")
        mosaicdiff.optimize(staged, compile={"backend": "eager"})
        frames = torch._dynamo.utils.counters["frames"]
        assert same(run_stages(staged), expected)
        made = frames["ok"]
        for _ in range(2):
            assert same(run_stages(staged), expected)
        assert frames["ok"] == made
    torch._dynamo.reset()


def max_live(staged):
    sizes = []
    for k in range(len(staged.stage_models)):
        staged.activate_stage(k)
        sizes.append(measure_memory(staged).live["cpu"])
    return max(sizes)


def test_graphs_are_refused(swapped):
    for options in ({"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}):
        with pytest.raises(
            ValueError, match="^compile: stage_memory must be 'resident' where CUDA"
        ):
            swapped.compile(**options)
    with pytest.raises(ValueError, match="^optimize: stage_memory must be 'resident' where CUDA"):
        swapped.check_graphs("optimize")


def test_swapping_captured_stages_is_refused(staged):
    staged.compile(mode="reduce-overhead")
    with pytest.raises(ValueError, match="^set_stage_memory: mode must be 'resident' where CUDA"):
        staged.set_stage_memory("swap")


def test_other_modes_are_refused(staged, tmp_path):
    with pytest.raises(ValueError, match="mode must be 'resident' or 'swap', got 'disk'"):
        staged.set_stage_memory("disk")
    staged.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="mode must be 'resident' or 'swap', got 'disk'"):
        mosaicdiff.StagedDenoiser.from_pretrained(tmp_path / "m", stage_memory="disk")


def test_an_incomplete_state_is_refused(swapped):
    with pytest.raises(
        ValueError, match="^state_dict: stage_memory must be 'resident', got 'swap'"
    ):
        swapped.state_dict()
    with pytest.raises(ValueError, match="^load_state_dict: stage_memory must be 'resident'"):
        swapped.load_state_dict({})


def own_parameter(staged):
    slot = next(slot for slot in staged.swap.slots if slot.stages == {0})
    return slot, slot.places[0]


def test_changes_that_a_switch_would_lose_are_refused(swapped):
    slot, (module, leaf) = own_parameter(swapped)
    with torch.no_grad():
        getattr(module, leaf).mul_(2)
    with pytest.raises(RuntimeError, match=f"{slot.name} must not change in swap mode, but it did"):
        swapped.activate_stage(1)
    changed = getattr(module, leaf).clone()
    swapped.set_stage_memory("resident")  # the cure keeps it
    assert torch.equal(getattr(module, leaf), changed)


def test_replaced_parameters_are_refused(swapped):
    slot, (module, leaf) = own_parameter(swapped)
    module._parameters[leaf] = torch.nn.Parameter(slot.parameter.data.clone(), False)
    with pytest.raises(RuntimeError, match=f"{slot.name} must stay the parameter that it was"):
        swapped.activate_stage(1)


def test_inference_mode_leaves_usable_weights(swapped):
    with torch.inference_mode():
        expected = [out.clone() for out in run_stages(swapped)]
    assert not any(p.is_inference() for p in swapped.parameters())
    assert same(run_stages(swapped), expected)


def test_a_stage_alone_wants_to_be_brought(swapped):
    x, labels = torch.randn(2, 2, 8, 8), torch.tensor([1, 2])
    step = torch.tensor([30, 30])
    with pytest.raises(RuntimeError):
        swapped.stage_models[2](x, step, labels)
    swapped.activate_stage(2)
    swapped.stage_models[2](x, step, labels)
