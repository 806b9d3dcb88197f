"""Prune: what goes, and the refit of what remains."""
