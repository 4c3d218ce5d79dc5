"""Configs and recipes for tests."""

import json
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dreambooth.config.compose import conf_dir, load
from dreambooth.config.enums import Device, Dtype, EncoderKind
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.config.schema import Config
from dreambooth.utils.hardware import Machine

BLOG: dict[str, str] = json.loads((
    Path(__file__).parents[1] / "support/golden/blog_hyperparameters.json").read_text("utf-8"))


def compose_config(*overrides: str) -> DictConfig:
    """Compose the config of a training run with Hydra."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", list(overrides))


def compose_recipe(*overrides: str, machine: Machine | None = None) -> Recipe:
    """Compose and resolve the config of a training run."""
    return resolve(load(compose_config(*overrides)), Path("runs/x"), machine)


T4, A10G, NONE = Machine("T4", 14.6, 7.5), Machine("A10G", 22.0, 8.6), Machine()


def resolve_demo(machine: Machine | None = None, **values: object) -> Recipe:
    """Resolve the config of `demo_config`."""
    return resolve(demo_config(**values), Path("runs/x"), machine)


def demo_config(**values: object) -> Config:
    """The schema's defaults with the demo photos; values by key, such as train__seed=1."""
    config = Config()
    config.dataset.instance_dir = "package:demo"
    config.dataset.instance_prompt, config.dataset.class_prompt = "a zwx toy", "a toy"
    for key, value in values.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(config, section) if section else config, name, value)
    return config


def demo_recipe(name: str = "tiny", **values: object) -> Recipe:
    """The recipe of the demo, or of a model whose architecture is packaged; values by key, as in `demo_config`."""
    config = Config()
    config.dataset.instance_dir, config.dataset.allow_drawings = "package:demo", True
    config.dataset.instance_prompt, config.dataset.class_prompt = "a zwx toy", "a toy"
    if name != "tiny":
        config.model.name, config.model.resolution = name, 512
        config.model.source = f"somebody/{name}"
        config.hardware.device, config.hardware.gpu = Device.cuda, "T4"
        config.hardware.compute_capability, config.hardware.usable_vram_gib = 7.5, 14.6
        config.precision.dtype = Dtype.fp16
    for key, value in values.items():
        section, _, field = key.partition("__")
        setattr(getattr(config, section), field, value)
    return resolve(config, Path("runs/plan"))


def small_recipe(**values: object) -> Recipe:
    """The recipe of a tiny run that generates no sample or evaluation images."""
    return demo_recipe(**{"sample__every": None, "evaluate__encoder": EncoderKind.none, "prior__num_class_images": 1,
                          "prior__sample_batch_size": 1, "train__train_batch_size": 1, **values})
