"""DreamBooth: teach a text-to-image diffusion model a new subject from a few photos, as an MLOps project."""

from dreambooth.utils.signals import report_early_interrupts

__version__ = "0.1.0"

report_early_interrupts()
