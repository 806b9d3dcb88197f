"""Packages that only some metrics need: imported when one is asked for, never before."""

from __future__ import annotations

import importlib
from typing import Any


def optional_module(module: str, package: str, what: str) -> Any:
    """Import a module that a metric needs.

    Args:
        module: its name.
        package: that pip installs it by.
        what: needs it, for the message.

    Raises:
        ValueError: it, or something that it imports, is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"evaluate: {what} needs the package {package}, which could not be imported ({error}). "
            f"pip install {package}, or leave {what} out."
        ) from None
