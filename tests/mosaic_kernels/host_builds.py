"""Builds of the CUDA kernels without a GPU: on the CPU through csrc/host, and by nvcc."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
NVCC = shutil.which("nvcc")
PROGRAMS = sorted(path.stem for path in CSRC.glob("host/*_host.cpp"))
KERNELS = sorted(path.stem for path in CSRC.glob("cuda/*.cu"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"]


def run(*command: str) -> str:
    """Run a command that must succeed; return what it printed."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def host_library(stem: str, folder: Path) -> ctypes.CDLL:
    """Compile csrc/host/<stem>.cpp and load it."""
    target = folder / f"{stem}.so"
    source = str(CSRC / "host" / f"{stem}.cpp")
    run(COMPILER, "-O1", "-shared", "-fPIC", *FLAGS, f"-I{CSRC}", source, "-o", str(target))
    return ctypes.CDLL(str(target))


def needed_sources(source: Path) -> set[Path]:
    """Return a C++ source and those of csrc/cpu whose headers it includes, and theirs."""
    found, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        found.add(path)
        names = re.findall(r'#include "(?:cpu/)?(\w+)\.h"', path.read_text())
        candidates = [CSRC / "cpu" / f"{name}.cpp" for name in names]
        waiting += [c for c in candidates if c.exists() and c not in found]
    return found


def host_program(stem: str, folder: Path, *flags: str) -> str:
    """Compile a host program, with the C++ sources whose headers it includes; return its path."""
    main = CSRC / "host" / f"{stem}.cpp"
    sources = sorted(needed_sources(main) - {main})
    target = str(folder / stem)
    define = "-DMOSAIC_HOST_MAIN"
    run(COMPILER, *flags, define, *FLAGS, f"-I{CSRC}", *map(str, [main, *sources]), "-o", target)
    return target


def compile_cuda(stem: str, architecture: str, folder: Path) -> None:
    """Compile a kernel file for one architecture: no warning, no spill."""
    if f"compute_{architecture}" not in run(NVCC, "--list-gpu-arch"):
        pytest.skip(f"needs an nvcc that compiles for sm_{architecture}")
    report = run(
        NVCC,
        *("-c", str(CSRC / f"cuda/{stem}.cu"), "-o", str(folder / "kernel.o"), f"-I{CSRC}"),
        *("-std=c++17", "-O3", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"),
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
    )
    spills = re.findall(r"(\d+) bytes spill", report)
    assert spills and set(spills) == {"0"}, report
