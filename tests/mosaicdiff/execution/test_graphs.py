"""Graphs by shape of inputs, on the CPU with a recording that replays by calling again."""

import pytest
import torch

from mosaicdiff.execution.graphs import GraphRunner, capture_cuda
from tests.mosaicdiff.conftest import tiny_denoiser


class Recorder:
    """Capture as a CUDA graph does: fixed inputs, and a result that every replay overwrites."""

    def __init__(self):
        self.captures = 0

    def __call__(self, call):
        self.captures += 1
        output = call()

        def replay():
            tensor = output["out"] if isinstance(output, dict) else output
            again = call()
            tensor.copy_(again["out"] if isinstance(again, dict) else again)

        return output, replay


def test_replays_with_other_values_and_keeps_old_results():
    recorder = Recorder()
    run = GraphRunner(lambda x, scale, extra: {"out": scale * x + extra["y"]}, recorder)
    first = run(torch.ones(3), 2.0, extra={"y": torch.zeros(3)})
    second = run(torch.full((3,), 5.0), 2.0, extra={"y": torch.ones(3)})
    assert first["out"].tolist() == [2.0] * 3
    assert second["out"].tolist() == [11.0] * 3
    assert recorder.captures == 1


def test_other_shapes_types_and_values_are_other_graphs():
    recorder = Recorder()
    run = GraphRunner(lambda x, scale=1.0: scale * x, recorder)
    for args in ((torch.ones(3),), (torch.ones(4),), (torch.ones(3).double(),)):
        run(*args)
    run(torch.ones(3), scale=2.0)
    assert recorder.captures == 4
    run.clear()
    run(torch.ones(3))
    assert recorder.captures == 5


def test_too_many_shapes_are_refused():
    run = GraphRunner(lambda x: 2 * x, Recorder(), most=2)
    run(torch.ones(1)), run(torch.ones(2))
    with pytest.raises(RuntimeError, match="keeps at most 2 shapes of inputs a stage"):
        run(torch.ones(3))
    assert run(torch.full((2,), 3.0)).tolist() == [6.0, 6.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_denoiser_on_the_device():
    model = tiny_denoiser().cuda()
    with torch.no_grad():
        run = GraphRunner(model, capture_cuda)
        for rows, seed in ((2, 0), (2, 1), (1, 2)):
            generator = torch.Generator().manual_seed(seed)
            latents = torch.randn(rows, 2, 8, 8, generator=generator).cuda()
            inputs = latents, torch.full((rows,), 100 * seed).cuda(), torch.arange(rows).cuda()
            assert torch.allclose(run(*inputs).sample, model(*inputs).sample, atol=1e-5)
