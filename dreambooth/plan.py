"""The door `python -m dreambooth.plan`: what a run would need, from the same overrides. Nothing heavy is imported here.

It reads no photos and no weights, and writes nothing but the picture that plan.plot names. Exit code 3: does not fit.
"""

import sys
import tempfile
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

if TYPE_CHECKING:
    from dreambooth.planner.report import Planned

NOWHERE = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
UNSAID = {"instance_dir": "photos", "instance_prompt": "a photo of a zwx thing", "class_prompt": "a photo of a thing"}
_plans: list["Planned"] = []  # of the jobs in this process; a sweep has several

identity.register_resolver()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def plan(cfg: DictConfig) -> float | None:
    """One job: a plan."""
    sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    return cli.attempt(lambda: _job(load(cfg), sweep), sweep)


def _job(config: Config, sweep: bool) -> float:
    from dreambooth.config.recipe import resolve
    from dreambooth.utils.hardware import detect

    for number, (_, subject) in enumerate(config.dataset.places):
        for key, value in UNSAID.items():
            if getattr(subject, key) is None:
                setattr(subject, key, f"{value}{number or ''}")
    config.dataset.allow_drawings = True  # nothing is trained
    here = detect() if config.hardware.device is Device.local else None
    recipe = resolve(config, Path(config.run_root), here)
    from dreambooth.models.loading import import_libraries
    from dreambooth.planner import auto_memory, report

    import_libraries()
    choice = auto_memory.chosen(recipe)
    planned = report.Planned(choice.recipe, choice.prediction, choice.added, choice.why)
    _plans.append(planned)
    if not sweep:
        _show(config)
    if config.plan.plot:
        try:
            report.plot(planned, Path(config.plan.plot))
        except (OSError, ValueError) as error:
            raise UserError(f"the picture could not be written ({error}): type another plan.plot=FILE.png") from error
    if not planned.fits:
        raise DoesNotFit(planned.lacks)
    return planned.card or 0.0


def _show(config: Config) -> None:
    from dreambooth.planner import report

    print(report.dumped(_plans) if config.plan.format is PlanFormat.json else report.table(_plans[0]),
          flush=True)


def main() -> None:
    """Console script `dreambooth-plan`."""
    with tempfile.TemporaryDirectory() as aside:  # Hydra keeps a record of every sweep
        sys.argv[1:] += [*NOWHERE, f"hydra.sweep.dir={aside}"]
        plan()
    if len(_plans) > 1 or any(word in ("-m", "--multirun") for word in sys.argv):
        from dreambooth.planner import report

        asked = any(word == "plan.format=json" for word in sys.argv)
        print(report.dumped(_plans) if asked else report.comparison(_plans))
    cli.leave()


if __name__ == "__main__":
    main()
