"""Allocate: how much each stage and layer gives up, in any unit of cost."""
