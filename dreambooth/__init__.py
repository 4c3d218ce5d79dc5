"""dreambooth: teach a text-to-image diffusion model a new subject, as an MLOps project."""

__version__ = "0.1.0"
