"""The door `python -m dreambooth.train`: composes a run with Hydra and trains it. Nothing heavy is imported here."""

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dreambooth import cli
from dreambooth.config.compose import conf_dir, load, typed_password
from dreambooth.config.schema import Config
from dreambooth.config.storage import is_single
from dreambooth.errors import UserError
from dreambooth.runs import identity
from dreambooth.sweeps.hydra_callbacks import STARTED, named, telling
from dreambooth.utils.signals import again

identity.register_resolver()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def train(cfg: DictConfig) -> float | None:
    """One job: trains and returns the objective for sweepers (lower is better)."""
    sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    if sweep:
        cfg.tracking.sweep = cfg.tracking.sweep or STARTED
        cfg.tracking.run_name = cfg.tracking.run_name or named(list(HydraConfig.get().overrides.task))
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    typed: Any = OmegaConf.to_container(cfg)
    next_time = f"{again(str(typed['checkpoint']['resume']))} to go on from the last checkpoint"
    return cli.attempt(lambda: _job(cfg, run_dir, sweep), sweep, next_time)


def _job(cfg: DictConfig, run_dir: Path, sweep: bool) -> float:
    from dreambooth.cloud import secrets
    from dreambooth.config.recipe import resolve
    from dreambooth.runs import remote_mirror
    from dreambooth.runs.run_folder import discard_if_unused, forget_overrides
    from dreambooth.storage import run_inputs
    from dreambooth.utils.hardware import detect
    from dreambooth.utils.signals import stoppable

    try:
        if HydraConfig.get().runtime.choices.get("hydra/launcher", "").startswith("sagemaker") and not sweep \
                and "DREAMBOOTH_SWEEP" not in os.environ:
            raise UserError("hydra/launcher=sagemaker works on sweeps, and a sweep of one is one too: add -m")
        secrets.load()
        if typed_password(cfg):
            forget_overrides(run_dir)
        config = load(cfg)
        cli.allocator(config.memory)
        config = converted(run_inputs.fetched(config, run_dir))
        recipe = resolve(config, run_dir, detect(), telling(list(HydraConfig.get().overrides.task)))
        with stoppable() as stop, remote_mirror.kept(config.storage, run_dir, config.checkpoint.resume) as keep:
            from dreambooth.run import execute

            result = execute(recipe, stop)
            keep(result)
            if recipe.evaluate.promote and run_inputs.first():
                from dreambooth.sweeps.promotion import offered

                offered(recipe)
            if run_inputs.first() and not sys.stdout.isatty():  # for Katib, which reads a trial's log
                print(f"objective={result.objective:.6g}", flush=True)
            return result.objective
    finally:
        discard_if_unused(run_dir)



def converted(config: Config) -> Config:
    """The config with a folder in place of each model that is one file."""
    if not (is_single(config.model.source) or is_single(config.model.vae)):
        return config
    from dreambooth.serialization.single_file_sources import as_folders

    return as_folders(config)


def main() -> None:
    """Console script `dreambooth-train`."""
    train()
    cli.leave()


if __name__ == "__main__":
    main()
