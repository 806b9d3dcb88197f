"""Checks that several configurations share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def require_whole_numbers(settings: Any, least: Mapping[str, int], cure: str = "") -> None:
    """Refuse fields that are not whole numbers, or too small.

    Args:
        settings: whose fields are looked at; its class names it in the message.
        least: of each field, by name.
        cure: what the message ends with.

    Raises:
        ValueError: names the field and the rule.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(
                f"{type(settings).__name__}: {name} must be a whole number of at least {bound}, "
                f"got {value!r}.{cure}"
            )


def require_choices(settings: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse fields that are not one of their choices.

    Raises:
        ValueError: names the field and the choices.
    """
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            raise ValueError(
                f"{type(settings).__name__}: {name} must be one of {', '.join(allowed)}, "
                f"got {getattr(settings, name)!r}."
            )
