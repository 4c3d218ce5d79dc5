"""Recipes of tiny runs, changed by section__key."""

from pathlib import Path

from dreambooth.config.enums import Device, Dtype, EncoderKind
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.config.schema import Config


def recipe(name: str = "tiny", **changed: object) -> Recipe:
    """The demo, or a model whose architecture ships, with `section__key` changed."""
    config = Config()
    config.dataset.instance_dir, config.dataset.allow_drawings = "package:demo", True
    config.dataset.instance_prompt, config.dataset.class_prompt = "a zwx toy", "a toy"
    if name != "tiny":
        config.model.name, config.model.resolution = name, 512
        config.model.source = f"somebody/{name}"
        config.hardware.device, config.hardware.gpu = Device.cuda, "T4"
        config.hardware.compute_capability, config.hardware.usable_vram_gib = 7.5, 14.6
        config.precision.dtype = Dtype.fp16
    for key, value in changed.items():
        section, _, field = key.partition("__")
        setattr(getattr(config, section), field, value)
    return resolve(config, Path("runs/plan"))


def small(**changed: object) -> Recipe:
    """A tiny run without drawing."""
    return recipe(**{"sample__every": None, "evaluate__encoder": EncoderKind.none, "prior__num_class_images": 1,
                     "prior__sample_batch_size": 1, "train__train_batch_size": 1, **changed})
