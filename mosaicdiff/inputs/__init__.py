"""What calibration is given: prompts, captions, images, latents; recorded, encoded, kept."""
