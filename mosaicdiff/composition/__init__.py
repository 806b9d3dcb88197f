"""What diffusers and others do to a denoiser, done to one that is pruned: caches, LoRA, storage."""
