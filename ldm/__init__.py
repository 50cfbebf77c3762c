"""ldm: latent diffusion, from text to image. The parts; whole pictures are drawn by `pipelines`."""

__version__ = "0.1.0"
