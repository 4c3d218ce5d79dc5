"""DreamBooth: teach a text-to-image diffusion model a new subject from a few photos, as an MLOps project."""

__version__ = "0.1.0"
