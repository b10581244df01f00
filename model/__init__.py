"""The diffusion model: schedules, the U-Net, DDIM. Torch only: no Ray, no files but checkpoints."""
