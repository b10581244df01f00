"""How a collection becomes latents and comes back. Imports `model`, never `jobs`."""
