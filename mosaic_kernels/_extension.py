"""Find the compiled module once, at import, and say what was found.

Without it (``MOSAIC_BUILD=none``) the same operators run on torch; that is a supported mode
which ``backends()`` reports. A module that was built but does not load is an error.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

REBUILD = "reinstall with MOSAIC_BUILD=cpu (or auto) and a C++17 compiler"


@dataclass(frozen=True)
class Extension:
    """The compiled module, or the reason why there is none.

    Args:
        module: ``mosaic_kernels._C``, or None where it was not built.
        reason: why ``module`` is None and how to get it; empty otherwise.
    """

    module: ModuleType | None
    reason: str = ""

    @property
    def has_cuda(self) -> bool:
        """Tell whether the compiled module holds CUDA kernels."""
        return self.module is not None and bool(self.module.cuda_architectures)

    def info(self) -> dict[str, Any]:
        """Return path, compiler, OpenMP and CUDA architectures of the compiled module."""
        if self.module is None:
            return {"built": False, "reason": self.reason}
        return {
            "built": True,
            "path": self.module.__file__,
            "compiler": self.module.compiler,
            "openmp": self.module.openmp,
            "cuda_architectures": self.module.cuda_architectures.split(),
        }


def load(name: str = "mosaic_kernels._C") -> Extension:
    """Import the compiled module where it was built.

    Raises:
        ImportError: it was built but does not load.
    """
    if find_spec(name) is None:
        return Extension(None, f"extension not built (MOSAIC_BUILD=none, or no build); {REBUILD}")
    try:
        return Extension(import_module(name))
    except ImportError as error:
        raise ImportError(
            f"mosaic_kernels: the compiled module {name} must be loadable, got: {error}. "
            f"It was built for another Python or library; {REBUILD}, or with MOSAIC_BUILD=none."
        ) from error


EXTENSION = load()
