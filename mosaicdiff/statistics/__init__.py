"""Calibrate: whose activations are seen, what is kept of them, and what they tell."""
