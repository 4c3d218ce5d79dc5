"""Recipes decided for a machine."""

from pathlib import Path

from dreambooth.config.recipe import Recipe, resolve
from dreambooth.config.schema import Config
from dreambooth.utils.hardware import Machine

T4, A10G, NONE = Machine("T4", 14.6, 7.5), Machine("A10G", 22.0, 8.6), Machine()


def decided(machine: Machine | None = None, **values: object) -> Recipe:
    return resolve(config(**values), Path("runs/x"), machine)


def config(**values: object) -> Config:
    """The schema's defaults with the demo's photos; values by key, such as train__seed=1."""
    found = Config()
    found.dataset.instance_dir = "package:demo"
    found.dataset.instance_prompt, found.dataset.class_prompt = "a zwx toy", "a toy"
    for key, value in values.items():
        section, _, name = key.partition("__")
        setattr(getattr(found, section), name, value)
    return found
