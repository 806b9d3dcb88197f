"""Build the compiled part of mosaic_kernels.

The environment variable MOSAIC_BUILD chooses what is built:

    auto   the C++ pieces, and the CUDA ones where nvcc is found (the default)
    cpu    the C++ pieces only
    cuda   both; nvcc must be there
    none   nothing: the package runs on torch alone

Neither torch nor a GPU is needed to build. TORCH_CUDA_ARCH_LIST chooses the CUDA architectures.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODES = ("auto", "cpu", "cuda", "none")
DEFAULT_ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0"
CPU_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-g0"]
CUDA_FLAGS = ["-std=c++17", "-O3", "--Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def build_mode() -> str:
    mode = os.environ.get("MOSAIC_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"setup.py: MOSAIC_BUILD must be one of {', '.join(MODES)}, got {mode!r}.")
    return mode


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (found := shutil.which("nvcc", path=str(Path(home, "bin")))):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def supported_architectures(nvcc: str) -> set[str]:
    """Return what this nvcc compiles for, as compute capabilities without the dot: {"80", ...}."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return set(re.findall(r"compute_(\d+)", listing.stdout))


def architectures(nvcc: str) -> list[tuple[str, bool]]:
    """Return (architecture, with PTX) pairs from TORCH_CUDA_ARCH_LIST or the default list.

    PTX goes with the newest architecture of the default list that this nvcc knows: later chips
    run that.
    """
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    known = supported_architectures(nvcc)
    chosen = []
    for entry in re.split(r"[;,\s]+", (requested or DEFAULT_ARCHITECTURES).strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(
                f"setup.py: TORCH_CUDA_ARCH_LIST must be a list such as '8.0 9.0+PTX', got "
                f"{entry!r}."
            )
        major, minor, suffix, ptx = match.groups()
        if major + minor in known:
            chosen.append((major + minor + suffix, ptx is not None))
        elif requested:
            raise SystemExit(
                f"setup.py: TORCH_CUDA_ARCH_LIST must name architectures that {nvcc} compiles "
                f"for, got {entry!r}. Use a newer CUDA toolkit or leave it out."
            )
    if not chosen:
        raise SystemExit(
            f"setup.py: none of {DEFAULT_ARCHITECTURES} is known to {nvcc}. Set "
            "TORCH_CUDA_ARCH_LIST, or MOSAIC_BUILD=cpu."
        )
    if not requested:
        chosen[-1] = (chosen[-1][0], True)
    return chosen


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Return where the CUDA runtime is; nvcc may be a wrapper far from its toolkit."""
    command = [nvcc, "--dryrun", "-c", cuda_sources()[0]]
    listing = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    top = Path(re.search(r"^#\$ TOP=(.*)$", listing.stderr, re.MULTILINE)[1])
    found = [path.parent for path in top.glob("lib*/libcudart_static.a")]
    found += [path.parent for path in top.glob("targets/*/lib/libcudart_static.a")]
    return [str(path) for path in found]


def generate_code(chosen: list[tuple[str, bool]]) -> list[str]:
    flags = []
    for arch, ptx in chosen:
        targets = f"[sm_{arch},compute_{arch}]" if ptx else f"sm_{arch}"
        flags.append(f"-gencode=arch=compute_{arch},code={targets}")
    return flags


def cuda_sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))


def cpu_sources() -> list[str]:
    parts = (path for folder in ("bindings", "cpu") for path in ROOT.glob(f"csrc/{folder}/*.cpp"))
    return ["csrc/bindings.cpp", *sorted(str(path.relative_to(ROOT)) for path in parts)]


def plan_cuda(mode: str) -> tuple[str | None, str]:
    """Return the nvcc to use, or None, and a line on what was left out."""
    nvcc = find_nvcc()
    if mode == "cuda" and nvcc is None:
        raise SystemExit(
            "setup.py: MOSAIC_BUILD=cuda needs nvcc, and none was found in CUDA_HOME or PATH. "
            "Install the CUDA toolkit, or use MOSAIC_BUILD=auto or cpu."
        )
    if mode == "cpu":
        return None, "no CUDA: MOSAIC_BUILD=cpu; use MOSAIC_BUILD=auto to add it"
    if nvcc is None:
        return None, "no CUDA: nvcc was not found; put it on PATH or set CUDA_HOME"
    return nvcc, ""


def compiler_version(compiler: str) -> str:
    first = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return first.stdout.splitlines()[0].replace('"', "")


def has_openmp(compiler: str) -> bool:
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "openmp.cpp")
        source.write_text(program)
        command = [compiler, "-fopenmp", str(source), "-o", str(Path(folder, "openmp"))]
        return subprocess.run(command, capture_output=True).returncode == 0


class BuildExtension(build_ext):
    """Compiles the C++ pieces with OpenMP and, where there is an nvcc, the CUDA ones."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # what is built depends on the environment, which has no timestamp

    def build_extension(self, ext: Extension) -> None:
        compiler = self.find_compiler()
        nvcc, left_out = plan_cuda(build_mode())
        notes = [left_out] if left_out else []
        ext.extra_compile_args = list(CPU_FLAGS)
        if has_openmp(compiler):
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args = ["-fopenmp"]
        else:
            ext.extra_compile_args.append("-Wno-unknown-pragmas")
            notes.append(f"no OpenMP: {compiler} cannot link it; install libgomp or set CXX")
        chosen = architectures(nvcc) if nvcc else []
        built_for = " ".join(arch + ("+PTX" if ptx else "") for arch, ptx in chosen)
        ext.define_macros += [
            ("MOSAIC_COMPILER", f'"{compiler_version(compiler)}"'),
            ("MOSAIC_CUDA_ARCHITECTURES", f'"{built_for}"'),
        ]
        if nvcc:
            self.add_cuda(ext, nvcc, chosen)
        if notes:
            print(f"mosaic_kernels: built without: {'; '.join(notes)}")
        super().build_extension(ext)

    def find_compiler(self) -> str:
        compiler = (getattr(self.compiler, "compiler_cxx", None) or ["c++"])[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"setup.py: no C++ compiler: {compiler!r} was not found. Install g++ or clang++ "
                "(C++17) or set CXX; or set MOSAIC_BUILD=none to run on torch alone."
            )
        return compiler

    def add_cuda(self, ext: Extension, nvcc: str, chosen: list[tuple[str, bool]]) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        for source in cuda_sources():
            target = str(folder / (Path(source).stem + ".cuda.o"))
            host = ["-ccbin", self.find_compiler()]
            command = [nvcc, "-c", source, "-o", target, "-Icsrc", *host, *CUDA_FLAGS]
            self.spawn([*command, *generate_code(chosen)])
            ext.extra_objects.append(target)
        ext.define_macros.append(("MOSAIC_WITH_CUDA", "1"))
        ext.library_dirs += cuda_library_dirs(nvcc)
        ext.libraries += ["cudart_static", "dl", "pthread", "rt"]


def extensions() -> list[Extension]:
    if build_mode() == "none":
        for stale in ROOT.glob("mosaic_kernels/_C*.so"):
            print(f"mosaic_kernels: {stale} of an earlier build is still used; delete it")
        return []
    if build_mode() == "cuda":
        plan_cuda("cuda")  # fails here, before anything is compiled
    import pybind11

    include_dirs = ["csrc", pybind11.get_include()]
    headers = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h"))
    return [
        Extension(
            "mosaic_kernels._C",
            sources=cpu_sources(),
            include_dirs=include_dirs,
            depends=[*headers, *cuda_sources()],
            language="c++",
        )
    ]


if __name__ == "__main__":  # the tests read the functions above
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
