"""The door `python -m dreambooth.train`: composes a run with Hydra and trains it. Nothing heavy is imported here."""

import os
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dreambooth import door
from dreambooth.config import conf_dir, load, typed_password
from dreambooth.errors import UserError
from dreambooth.sweeping import STARTED, named, telling


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def train(cfg: DictConfig) -> float | None:
    """One job: trains and returns the objective for sweepers (lower is better)."""
    sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    if sweep:
        cfg.tracking.sweep = cfg.tracking.sweep or STARTED
        cfg.tracking.run_name = cfg.tracking.run_name or named(list(HydraConfig.get().overrides.task))
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    return door.attempt(lambda: _job(cfg, run_dir, sweep), sweep)


def _job(cfg: DictConfig, run_dir: Path, sweep: bool) -> float:
    from dreambooth import remote
    from dreambooth.cloud import secrets
    from dreambooth.machine import detect
    from dreambooth.recipe import resolve
    from dreambooth.runfolder import discard_if_unused, forget_overrides
    from dreambooth.signals import stoppable

    try:
        if HydraConfig.get().runtime.choices.get("hydra/launcher", "").startswith("sagemaker") and not sweep \
                and "DREAMBOOTH_SWEEP" not in os.environ:
            raise UserError("hydra/launcher=sagemaker works on sweeps, and a sweep of one is one too: add -m")
        secrets.load()
        if typed_password(cfg):
            forget_overrides(run_dir)
        config = load(cfg)
        door.allocator(config.memory)
        config = remote.fetched(config, run_dir)
        recipe = resolve(config, run_dir, detect(), telling(list(HydraConfig.get().overrides.task)))
        with stoppable() as stop, remote.kept(config.storage, run_dir, config.checkpoint.resume) as keep:
            from dreambooth.run import execute

            result = execute(recipe, stop)
            keep(result)
            if recipe.evaluate.promote and remote.first():
                from dreambooth.promotion import offered

                offered(recipe)
            return result.objective
    finally:
        discard_if_unused(run_dir)


def main() -> None:
    """Console script `dreambooth-train`."""
    train()
    door.leave()


if __name__ == "__main__":
    main()
