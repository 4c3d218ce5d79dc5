"""Command `python -m dreambooth.train`: composes the configuration of a run with Hydra, and executes the run.

Torch is imported only when the work of the command starts, so that --help is fast.
"""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dreambooth import cli
from dreambooth.config.compose import conf_dir, load, uri_has_password
from dreambooth.config.schema import Config
from dreambooth.config.storage import is_single_file
from dreambooth.errors import Interrupted, OverBudget, UserError
from dreambooth.runs import identity
from dreambooth.runs.pruning import Pruned
from dreambooth.runtime import srun
from dreambooth.sweeps.hydra_callbacks import default_sweep_id, distinguishing_overrides, failure_reasons, trial_name
from dreambooth.utils.signals import how_to_resume

identity.register_resolver()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def train(cfg: DictConfig) -> float | list[float] | None:
    """Execute one training run. Return its objective, which Hydra's sweepers minimise, or a list of several."""
    sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    if sweep:
        cfg.tracking.sweep = cfg.tracking.sweep or default_sweep_id()
        cfg.tracking.run_name = cfg.tracking.run_name or trial_name(list(HydraConfig.get().overrides.task))
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    values: Any = OmegaConf.to_container(cfg)
    resume_hint = f"{how_to_resume(str(values['checkpoint']['resume']))} to continue from the last checkpoint"
    objective = cli.run_job(lambda: _job(cfg, run_dir, sweep), sweep, resume_hint)
    if sweep and (reason := cli.last_failure()):
        failure_reasons[run_dir] = reason
    return objective


def _job(cfg: DictConfig, run_dir: Path, sweep: bool) -> float | list[float]:
    from dreambooth.cloud import secrets
    from dreambooth.config.recipe import resolve
    from dreambooth.data.index.file_hashes import conversion_mark
    from dreambooth.runs import remote_mirror
    from dreambooth.runs.run_folder import remove_hydra_record, remove_if_unused
    from dreambooth.storage import run_inputs
    from dreambooth.utils.hardware import detect_machine
    from dreambooth.utils.signals import catch_stop_signals

    try:
        launcher = HydraConfig.get().runtime.choices.get("hydra/launcher", "").removesuffix("_schema")
        if launcher in ("sagemaker", "slurm") and not sweep and "DREAMBOOTH_SWEEP" not in os.environ:
            raise UserError(f"hydra/launcher={launcher} runs sweeps only, and a single run is a sweep of one: add -m")
        secrets.load()
        if uri_has_password(cfg):
            remove_hydra_record(run_dir)
        config = load(cfg)
        cli.configure_allocator(config.memory)
        config = convert_single_files(run_inputs.fetch_inputs(config, run_dir, conversion_mark))
        overrides = distinguishing_overrides(list(HydraConfig.get().overrides.task))
        recipe = replace(resolve(config, run_dir, detect_machine(), overrides),
                         fixed_length=identity.has_fixed_length(HydraConfig.get()))
        with catch_stop_signals() as stop, \
                remote_mirror.mirror_run(config.storage, run_dir, config.checkpoint.resume, stop) as keep:
            from dreambooth.run import execute

            result = execute(recipe, stop)
            keep(result)
            if recipe.evaluate.promote and run_inputs.is_main_process():
                from dreambooth.sweeps.promotion import register_finished_run

                with stop.at_once("the run is finished; repeat the command to register its model"):
                    register_finished_run(recipe)
            if run_inputs.is_main_process() and not sys.stdout.isatty():  # Katib parses this line in the log of a trial
                print(f"objective={result.objective:.6g}", flush=True)
            return list(result.objectives.values()) or result.objective
    except OverBudget as error:
        if sweep:  # the sweep ends, and the same command continues it with a higher budget
            raise Interrupted(str(error)) from error
        raise
    except Pruned as pruned:  # no failure: the sweep continues with its next trial
        if stop.signal_name:
            raise Interrupted(f"{stop.signal_name}: {pruned}") from None
        failure_reasons[run_dir] = str(pruned)
        print(pruned, flush=True)
        return math.nan
    finally:
        remove_if_unused(run_dir, Path(str(cfg.run_root)))


def convert_single_files(config: Config) -> Config:
    """Convert the base model and the VAE to diffusers folders if they are single files.

    Return the configuration with the paths of these folders.
    """
    if not (is_single_file(config.model.source) or is_single_file(config.model.vae)):
        return config
    from dreambooth.serialization.single_file_sources import as_folders

    return as_folders(config)


def main() -> None:
    """Run the console script `dreambooth-train`."""
    srun.join_step()
    cli.run_hydra(train, Config)
    cli.exit_process()


if __name__ == "__main__":
    main()
