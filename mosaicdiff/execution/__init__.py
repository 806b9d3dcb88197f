"""Run the same network with fewer launches: exactly equivalent, and undone at will."""

from .api import describe, optimize, restore

__all__ = ["describe", "optimize", "restore"]
