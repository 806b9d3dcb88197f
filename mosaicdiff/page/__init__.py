"""A report of a pruned model as one self-contained HTML page."""

from .bench_file import read_bench
from .collect import make_page, read_networks
from .data import Network, Page
from .document import render, write_page

__all__ = ["Network", "Page", "make_page", "read_bench", "read_networks", "render", "write_page"]
