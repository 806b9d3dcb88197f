"""What the stages of a denoiser take in memory: tied, all resident, or swapped from the host."""
