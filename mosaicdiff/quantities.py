"""Write large numbers for people."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Format bytes by powers of 1000, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError("unreachable")


def human_count(count: float) -> str:
    """Format a count with k, M, G or T."""
    for unit in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:.4g}T"
