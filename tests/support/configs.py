"""Composed configurations and recipes for tests."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dreambooth.config.compose import conf_dir, load
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.utils.hardware import Machine


def made(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", list(overrides))


def recipe(*overrides: str, machine: Machine | None = None) -> Recipe:
    return resolve(load(made(*overrides)), Path("runs/x"), machine)
