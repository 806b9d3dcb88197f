"""A report of a pruned model as one self-contained HTML page."""

from .collect import collect
from .data import Page
from .document import render, write_page

__all__ = ["Page", "collect", "render", "write_page"]
