import subprocess
import sys

import pytest
import torch

import mosaic_kernels as mk
from mosaic_kernels import _backends, _extension
from mosaic_kernels._extension import EXTENSION, Extension

built = pytest.mark.skipif(EXTENSION.module is None, reason="needs the compiled extension")


def test_import_is_free():
    program = (
        "import sys, mosaic_kernels, torch\n"
        "assert 'triton' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert sorted(mosaic_kernels.__all__) == list(mosaic_kernels.__all__)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_without_the_extension_the_operators_run_on_torch():
    program = (
        "import importlib.util as util, torch\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'mosaic_kernels._C' else find(name)\n"
        "import mosaic_kernels as mk\n"
        "h = torch.eye(4); mk.hessian_finalize_(h, 2.0)\n"
        "print(h[0, 0].item(), mk.prune_columns(torch.eye(4), h).order.tolist())\n"
        "report = mk.backends()\n"
        "print(report['extension']['built'], report['operators']['prune_columns']['cpu'])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert first == "0.5 [[0, 1, 2, 3]]"
    assert second.startswith("False {'implementation': 'torch', 'note': 'extension not built")
    assert "reinstall with MOSAIC_BUILD=cpu" in second


def test_a_module_that_does_not_load_is_one_guided_error(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("raise ImportError('libgone.so: not found')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="must be loadable, got: libgone.so.*MOSAIC_BUILD=none"):
        _extension.load("broken_module")


def test_backends_names_every_operator(monkeypatch):
    operators = mk.backends()["operators"]
    others = ("JointTrajectory", "Sweep", "Trajectory", "backends", "tune_hessian")
    public = {name for name in mk.__all__ if name not in others}
    assert set(operators) == public
    for entries in operators.values():
        assert set(entries) == {"cpu", "cuda"}
        for entry in entries.values():
            assert entry["implementation"]
            assert entry["note"] or entry["implementation"] in ("triton", "torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert mk.backends()["operators"]["hessian_update_"]["cuda"]["implementation"] == "triton"
    monkeypatch.setattr(_backends, "find_spec", lambda name: None)
    assert "pip install triton" in mk.backends()["operators"]["hessian_update_"]["cuda"]["note"]


def test_backends_says_what_is_missing(monkeypatch):
    class WithoutOpenMP:
        openmp = False

    monkeypatch.setattr(_backends, "EXTENSION", Extension(WithoutOpenMP))  # type: ignore[arg-type]
    entry = _backends._cpp("panels")
    assert entry["implementation"] == "C++" and "without OpenMP" in entry["note"]


@built
def test_extension_info():
    info = mk.backends()["extension"]
    assert info["built"] and info["path"].endswith(".so") and info["compiler"]
    assert isinstance(info["openmp"], bool) and isinstance(info["cuda_architectures"], list)


@pytest.mark.skipif(not EXTENSION.has_cuda, reason="needs the CUDA kernels")
def test_cuda_bindings_refuse_what_cannot_be():
    module = EXTENSION.module
    block = torch.zeros(256, 1)
    address = block.data_ptr()
    nine = [address] * 9
    for call, message in [
        (lambda: module.prune_panel_cuda(nine, 0, 1, 256, 1, 129, 4, 0, 0), "at most 128, got 129"),
        (lambda: module.prune_panel_cuda(nine, 0, 1, 9, 2, 1, 4, 0, 0), "group_size must be a div"),
        (
            lambda: module.prune_panel_cuda(nine, 2, 1, 8, 2, 1, 4, 0, 0),
            "workspace must be aligned",
        ),
        (lambda: module.prune_workspace_cuda(40000, 40000, 4, 0), "group_size must be at most"),
        (lambda: module.factor_width_cuda(2, 0), "element_bytes must be 4 or 8, got 2"),
        (
            lambda: module.invert_factor_cuda(address, 1, 129, 1, 129, address, 4, 0, 0),
            "invert_factor_cuda: width must be at most 128, got 129",
        ),
        (
            lambda: module.invert_factor_cuda(address, 1, 4, 1, 3, address, 4, 0, 0),
            "invert_factor_cuda: ld must be at least width, got 3",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(not EXTENSION.has_cuda, reason="needs the CUDA kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_says_why_it_cannot():
    with pytest.raises(RuntimeError, match="CUDA says: .* Rebuild with TORCH_CUDA_ARCH_LIST"):
        EXTENSION.module.factor_width_cuda(4, 0)


@built
def test_bindings_refuse_what_cannot_be():
    module = EXTENSION.module
    matrix = torch.zeros(4, 4)
    address = matrix.data_ptr()
    nine = [address] * 9
    for call, message in [
        (lambda: module.mirror_lower(0, 4, 1.0, 4, 1), "mirror_lower: h must be a non-null"),
        (lambda: module.mirror_lower(address + 1, 4, 1.0, 4, 1), "h must be aligned"),
        (lambda: module.mirror_lower(address, 4, 1.0, 2, 1), "element_bytes must be 4 or 8, got 2"),
        (lambda: module.mirror_lower(address, 0, 1.0, 4, 1), "n must be at least 1, got 0"),
        (lambda: module.mirror_lower(address, 4, 1.0, 4, 0), "threads must be at least 1, got 0"),
        (lambda: module.mirror_lower(address, 4, 1.0, 4, 1, address + 1), "residual must be al"),
        (lambda: module.add_compensated_lower(address, 0, address, 4, 4, 1), "part must be a non"),
        (lambda: module.add_compensated_lower(address, address, 0, 4, 4, 1), "residual must be a"),
        (lambda: module.invert_factors(address, address, 0, 4, address, 4, 1), "batch must be"),
        (lambda: module.prune_panel(nine, 0, 4, 1, 1, 4, 1), "batch must be at least 1"),
        (lambda: module.prune_panel(nine, 1, 4, 3, 1, 4, 1), "group_size must be a divisor of n"),
        (lambda: module.prune_panel(nine, 1, 4, 2, 3, 4, 1), "pivots must be between 1 and"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
