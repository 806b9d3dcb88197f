"""Divide: the noise schedule, its stages, and following a sampler through them."""
