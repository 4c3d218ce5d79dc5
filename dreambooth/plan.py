"""Command `python -m dreambooth.plan`: predicts the memory, time and cost of a run from its overrides.

The command reads neither photos nor weights. It writes no file, except a plot if plan.plot is set. The exit code is 3
if the run does not fit. Torch is imported only when the work of the command starts, so that --help is fast.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import conf_dir, load
from dreambooth.config.enums import Device, PlanFormat
from dreambooth.config.schema import Config
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.runs import identity
from dreambooth.serving.options import Serve

if TYPE_CHECKING:
    from dreambooth.planner.report import Plan

PLACEHOLDERS = {  # values of settings that are required for training, but not for a plan
    "instance_dir": "photos", "instance_prompt": "a photo of a zwx thing", "class_prompt": "a photo of a thing"}
SERVED_BATCH = Serve().max_batch  # pictures at a time
_plans: list["Plan"] = []  # one per job of this process; a sweep runs several jobs

identity.register_resolver()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def plan(cfg: DictConfig) -> float | None:
    """Plan one run, and return the predicted GPU memory in GiB (0 for a run on a CPU).

    Hydra takes this number as the objective if a sweep (`-m`) plans several runs.
    """
    sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    return cli.run_job(lambda: _job(load(cfg), sweep), sweep)


def _job(config: Config, sweep: bool) -> float:
    from dreambooth.config.recipe import resolve
    from dreambooth.utils.hardware import detect_machine

    for number, (_, subject) in enumerate(config.dataset.keyed_subjects):
        for key, value in PLACEHOLDERS.items():
            if getattr(subject, key) is None:
                setattr(subject, key, f"{value}{number or ''}")
    config.dataset.allow_drawings = True  # the rule about drawings matters only for training
    machine = detect_machine() if config.hardware.device is Device.local else None
    recipe = resolve(config, Path(config.run_root), machine)
    from dreambooth.models.loading import import_libraries
    from dreambooth.planner import auto_memory, report, serving_plan

    import_libraries()
    choice = auto_memory.choose_memory_options(recipe)
    serving: list[serving_plan.ServingPlan] = []
    searched = config.plan.larger_batch and config.plan.format is PlanFormat.table and not sweep
    larger = auto_memory.larger_sample_batch(choice) if searched else None
    if recipe.device == "cuda" and not sweep:
        serving = serving_plan.plan_presets(serving_plan.model_of_recipe(
            choice.recipe, choice.prediction.trained_parameters, SERVED_BATCH))
    planned = report.Plan(choice.recipe, choice.prediction, choice.added, choice.why, serving, larger)
    _plans.append(planned)
    if not sweep:
        _show(config)
    if config.plan.plot:
        try:
            report.plot_step_memory(planned, Path(config.plan.plot))
        except (OSError, ValueError) as error:
            raise UserError(f"the plot could not be written ({error}): type another plan.plot=FILE.png") from error
    if not planned.fits:
        raise DoesNotFit(planned.shortfall)
    return planned.card_gib or 0.0


def _show(config: Config) -> None:
    from dreambooth.planner import report

    print(report.plans_as_json(_plans) if config.plan.format is PlanFormat.json else report.format_plan(_plans[0]),
          flush=True)


def _check_budget_of_sweep() -> None:
    """Raise DoesNotFit if all runs of the sweep together pass the budget."""
    usd, hours = zip(*(plan.budgeted for plan in _plans), strict=True)
    if problem := _plans[0].recipe.budget.shortfall("run", usd, hours):
        raise DoesNotFit(problem)


def main() -> None:
    """Run the console script `dreambooth-plan`."""
    cli.run_hydra_without_folder(plan, Config, "plan")
    if len(_plans) > 1 or (_plans and any(word in ("-m", "--multirun") for word in sys.argv)):
        from dreambooth.planner import report

        as_json = any(word == "plan.format=json" for word in sys.argv)
        print(report.plans_as_json(_plans) if as_json else report.format_comparison(_plans))
        cli.run_job(_check_budget_of_sweep, sweep=False)
    cli.exit_process()


if __name__ == "__main__":
    main()
