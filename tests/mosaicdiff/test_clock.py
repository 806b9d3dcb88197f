"""Stages follow the sampler's timesteps, without reading tensors."""

import copy
import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

from .conftest import flow_scheduler, linear_scheduler, sample

SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
]
SPACINGS = ["leading", "trailing", "linspace"]


class CountReads(TorchDispatchMode):
    """Count reads of a tensor by the host: `item` and its kin (`bool`, `int`, ...), `tolist`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __enter__(self):
        self._tolist = torch.Tensor.tolist

        def tolist(tensor):
            self.count += 1
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self._tolist
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def record_route(staged):
    """Note (stage, timestep) of every stage call."""
    route = []
    for index, model in enumerate(staged.stage_models):

        def note(module, args, kwargs, index=index):
            route.append((index, float(kwargs["timestep"].max())))

        model.register_forward_pre_hook(note, with_kwargs=True)
    return route


def use(pipe, cls, spacing):
    pipe.scheduler = linear_scheduler(cls, timestep_spacing=spacing)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("cls", SCHEDULERS)
def test_route_follows_the_timesteps(staged_pipe, cls, spacing, guidance):
    use(staged_pipe, cls, spacing)
    staged = staged_pipe.transformer
    route = record_route(staged)
    sample(staged_pipe, steps=9, guidance=guidance)
    sample(staged_pipe, steps=5, guidance=guidance)
    assert route == [(staged.division.stage_of_timestep(t), t) for _, t in route]
    assert {stage for stage, _ in route} == {0, 1, 2}


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("cls", SCHEDULERS)
def test_no_read_beyond_the_dense_pipeline(pipe, batches, cls, spacing, guidance):
    import mosaicdiff

    counts = []
    for prepare in (
        lambda: None,
        lambda: mosaicdiff.prune(
            pipe, mosaicdiff.PruneConfig(sparsity=0.3, samples=32, steps=20), calibration=batches
        ),
    ):
        prepare()
        use(pipe, cls, spacing)
        with CountReads() as reads:
            sample(pipe, steps=4, guidance=guidance)
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_a_detached_denoiser_reads_once_a_call(staged_pipe):
    counts = []
    for _ in range(2):
        with CountReads() as reads:
            sample(staged_pipe, steps=6)
        counts.append(reads.count)
        staged_pipe.transformer.detach()
    assert counts[1] == counts[0] + 6


def test_attached_and_detached_give_the_same_pictures(staged_pipe):
    attached = sample(staged_pipe)
    staged_pipe.transformer.detach()
    assert (sample(staged_pipe) == attached).all()


def test_methods_keep_their_signatures_and_are_restored():
    scheduler = linear_scheduler(EulerDiscreteScheduler)
    before = {name: getattr(scheduler, name) for name in ("set_timesteps", "step")}
    clock = make_clock()
    clock.attach(scheduler)
    assert "step" in scheduler.__dict__
    for name, method in before.items():
        assert inspect.signature(getattr(scheduler, name)) == inspect.signature(method)
    clock.detach()
    assert all(getattr(scheduler, name) == method for name, method in before.items())
    assert not any(name.startswith("_mosaicdiff") for name in scheduler.__dict__)


def make_clock():
    from mosaicdiff.trajectory.clock import StageClock
    from mosaicdiff.trajectory.schedule import NoiseSchedule
    from mosaicdiff.trajectory.stages import divide

    return StageClock(divide(NoiseSchedule.named("linear")))


@pytest.mark.parametrize(
    "cls, device",
    [
        (DDIMScheduler, None),
        (DDIMScheduler, "meta"),
        (DDPMScheduler, "meta"),
        (EulerDiscreteScheduler, "cpu"),
        (FlowMatchEulerDiscreteScheduler, "meta"),
    ],
)
def test_timesteps_end_up_where_they_were_asked(cls, device):
    """On `meta` any read of the timesteps would raise, as it would wait on a GPU."""
    flow = cls is FlowMatchEulerDiscreteScheduler
    plain, followed = (flow_scheduler() if flow else linear_scheduler(cls) for _ in range(2))
    clock = make_clock()
    clock.attach(followed)
    for scheduler in (plain, followed):
        scheduler.set_timesteps(10, device=device)
    assert followed.timesteps.device == plain.timesteps.device
    assert followed.timesteps.dtype == plain.timesteps.dtype
    assert followed.timesteps.shape == plain.timesteps.shape
    if flow:  # moves its sigmas too
        assert followed.sigmas.device == plain.sigmas.device


def test_two_clocks_on_one_scheduler():
    scheduler, first, second = linear_scheduler(), make_clock(), make_clock()
    first.attach(scheduler)
    second.attach(scheduler)
    scheduler.set_timesteps(10)
    first.detach()
    assert second.stage_of_call(scheduler.timesteps[-1]) == 2
    second.detach()
    assert "step" not in scheduler.__dict__


def test_a_copied_scheduler_steps_itself():
    scheduler, clock = linear_scheduler(EulerDiscreteScheduler), make_clock()
    clock.attach(scheduler)
    scheduler.set_timesteps(10)
    twin = copy.deepcopy(scheduler)
    x = torch.randn(1, 2, 4, 4)
    for t in scheduler.timesteps[:6]:
        twin.step(x, t, x)
    assert twin.step_index == 6 and scheduler.step_index is None
    assert clock.stage_of_call(scheduler.timesteps[0]) == 0  # the original has not moved


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_run_that_begins_late(cls):
    """Image-to-image: by `set_begin_index` where there is one, else by the first timestep."""
    scheduler, clock = linear_scheduler(cls), make_clock()
    clock.attach(scheduler)
    scheduler.set_timesteps(10)
    start = 8
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    x = torch.randn(1, 2, 4, 4)
    for t in scheduler.timesteps[start:]:
        expected = clock.division.stage_of_timestep(float(t))
        assert clock.stage_of_call(t.expand(2)) == expected
        x = scheduler.step(x, t, x).prev_sample


def test_a_timestep_that_is_a_copy_is_located_by_value():
    scheduler, clock = linear_scheduler(), make_clock()
    clock.attach(scheduler)
    scheduler.set_timesteps(10)
    assert clock.stage_of_call(torch.tensor([float(scheduler.timesteps[9])])) == 2


def test_a_scheduler_attached_in_mid_run_is_joined():
    scheduler, clock = linear_scheduler(), make_clock()
    scheduler.set_timesteps(10)
    clock.attach(scheduler)
    assert clock.stage_of_call(scheduler.timesteps[9:10]) == 2


def test_replacing_the_scheduler_is_followed(staged_pipe):
    route = record_route(staged_pipe.transformer)
    sample(staged_pipe, steps=4)
    staged_pipe.scheduler = linear_scheduler(UniPCMultistepScheduler, timestep_spacing="trailing")
    sample(staged_pipe, steps=6)
    division = staged_pipe.transformer.division
    assert len(route) == 10
    assert all(division.stage_of_timestep(t) == stage for stage, t in route)


def test_detached_rows_of_two_stages_are_refused(staged_pipe):
    denoiser = staged_pipe.transformer
    denoiser.detach()
    with pytest.raises(ValueError, match="timestep must lie in one stage"):
        denoiser(torch.randn(2, 2, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 2]))


def test_no_timestep_is_refused(staged_pipe):
    with pytest.raises(ValueError, match="timestep must be given"):
        staged_pipe.transformer(torch.randn(2, 2, 8, 8), class_labels=torch.tensor([1, 2]))


def test_a_scheduler_without_snr_cannot_be_attached(staged_pipe):
    with pytest.raises(ValueError, match="scheduler must be variance preserving"):
        staged_pipe.transformer.attach(IPNDMScheduler())


def test_a_copied_denoiser_reads_for_itself(staged_pipe):
    twin = copy.deepcopy(staged_pipe.transformer)
    staged_pipe.scheduler.set_timesteps(10)  # the original's clock now stands at the first step
    inputs = (torch.randn(2, 2, 8, 8), torch.tensor([5, 5]), torch.tensor([1, 2]))
    assert torch.equal(twin(*inputs).sample, twin.stage_models[2](*inputs).sample)


def test_compiled_stages_need_no_second_graph(staged_pipe):
    staged = staged_pipe.transformer
    plain = sample(staged_pipe)
    staged.compile(backend="eager", fullgraph=True)
    compiled = sample(staged_pipe)
    torch._dynamo.config.error_on_recompile = True
    try:
        assert (sample(staged_pipe) == compiled).all()
    finally:
        torch._dynamo.config.error_on_recompile = False
    assert abs(compiled - plain).max() < 1e-5
