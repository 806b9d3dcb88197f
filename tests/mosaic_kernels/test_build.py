"""The decisions of setup.py; what it compiles is tested by the kernels' own tests."""

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

SETUP = Path(__file__).parents[2] / "setup.py"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture
def build(monkeypatch):
    for name in ("MOSAIC_BUILD", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("mosaic_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_modes(build, monkeypatch):
    assert build.build_mode() == "auto"
    monkeypatch.setenv("MOSAIC_BUILD", "none")
    assert build.extensions() == []
    monkeypatch.setenv("MOSAIC_BUILD", "gpu")
    with pytest.raises(SystemExit, match="MOSAIC_BUILD must be one of auto, .*, got 'gpu'"):
        build.extensions()


def test_cuda_without_nvcc_fails_before_compiling(build, monkeypatch):
    monkeypatch.setenv("MOSAIC_BUILD", "cuda")
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match="MOSAIC_BUILD=cuda needs nvcc, and none was found"):
        build.extensions()


def test_what_is_left_out_is_said_with_the_cure(build, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.plan_cuda("auto") == (
        None,
        "no CUDA: nvcc was not found; put it on PATH or set CUDA_HOME",
    )
    monkeypatch.setattr(build, "find_nvcc", lambda: "/cuda/bin/nvcc")
    assert build.plan_cuda("auto") == build.plan_cuda("cuda") == ("/cuda/bin/nvcc", "")
    assert "use MOSAIC_BUILD=auto" in build.plan_cuda("cpu")[1]


def test_nvcc_is_found_in_cuda_home(build, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == str(nvcc)


def test_architectures(build, monkeypatch):
    known = {"80", "86", "89", "90"}
    monkeypatch.setattr(build, "supported_architectures", lambda nvcc: known)
    chosen = [("80", False), ("86", False), ("89", False), ("90", True)]
    assert build.architectures("nvcc") == chosen  # what this nvcc does not know is left out
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
    assert build.architectures("nvcc") == [("80", False), ("90a", True)]
    assert build.generate_code(build.architectures("nvcc")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]",
    ]
    for value, message in [
        ("Hopper", "must be a list such as '8.0 9.0[+]PTX', got 'Hopper'"),
        ("12.0", "must name architectures that nvcc compiles for, got '12.0'"),
    ]:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
        with pytest.raises(SystemExit, match=message):
            build.architectures("nvcc")
    known.clear()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    with pytest.raises(SystemExit, match="none of 8.0 .* is known to nvcc"):
        build.architectures("nvcc")


@needs_nvcc
def test_the_nvcc_at_hand_supports_a_default_architecture(build):
    assert build.architectures(build.find_nvcc())


def test_no_compiler_is_an_error_that_names_the_way_out(build, monkeypatch):
    from setuptools import Distribution

    command = build.BuildExtension(Distribution())
    command.compiler = SimpleNamespace(compiler_cxx=["no-such-compiler"])
    with pytest.raises(SystemExit, match="'no-such-compiler' was not found.*MOSAIC_BUILD=none"):
        command.find_compiler()


def test_openmp_is_tried_not_assumed(build):
    assert build.has_openmp("false") is False
