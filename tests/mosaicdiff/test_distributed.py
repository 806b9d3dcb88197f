"""Two processes prune what one does: batches and layers shared out, written once."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mosaicdiff.distributed import World

from .commands import run_json, stored

#: Several commands in one start of two processes.
RUN = """
import json, sys
from mosaicdiff.cli import main
for arguments in json.loads(sys.argv[1]):
    main(arguments, standalone_mode=False)
"""


def options(tiny, output, *more):
    return [str(part) for part in (
        "prune", *tiny.options, "--batch-size", 8, "--packages", 2, "--sparsity", "40%",
        "--output", output, *more,
    )]  # fmt: skip


CASES = {
    "layers": (),
    "weights": ("--granularity", "unstructured", "--stages", "3", "--allocation", "score"),
    "along": ("--activations", "trajectory", "--trajectories", "6", "--trajectory-batch", "2"),
    "one batch": ("--activations", "trajectory", "--trajectories", "2", "--packages", "1"),
}  # fmt: skip


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_two_processes_prune_what_one_does(tiny, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    runs = [options(tiny, tmp_path / name, *more) for name, more in CASES.items()]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(script), json.dumps(runs),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == len(CASES)  # by the first process alone
    assert {path.name for path in tmp_path.iterdir()} == {"run.py", *CASES}
    for name, more in CASES.items():
        run_json(*options(tiny, tmp_path / "one", *more, "--overwrite"))
        one, both = stored(tmp_path / "one"), stored(tmp_path / name)
        assert one.keys() == both.keys()
        for name, tensor in one.items():
            assert tensor.shape == both[name].shape, name  # as many kept, and of masks the same
            if tensor.is_floating_point():
                torch.testing.assert_close(both[name], tensor, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(both[name], tensor), name


def test_alone_nothing_is_exchanged():
    world = World.current()
    assert world == World(0, 1) and world.is_first
    tensor = torch.ones(2)
    world.sum_(tensor)
    assert tensor.tolist() == [1, 1]
    assert world.merged({"a": 1}) == {"a": 1} and world.from_first("b") == "b"
    assert world.any(True) and not world.any(False)
    assert [World(1, 3).mine(i) for i in range(4)] == [False, True, False, False]
