"""Run the same network with fewer launches: exactly equivalent, and undone at will."""

from .api import optimize, restore

__all__ = ["optimize", "restore"]
