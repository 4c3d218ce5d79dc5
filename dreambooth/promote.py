"""Command `python -m dreambooth.promote`: registers the best model of a sweep in MLflow's model registry."""

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import conf_dir, to_dataclass
from dreambooth.config.section import Section, finite, require
from dreambooth.errors import UserError


@dataclass
class Promote(Section):
    """Options of the command: the sweep, and rules for its best model. conf/promote.yaml explains each key."""

    sweep: str | None = None
    run_root: str = "runs"
    uri: str | None = None
    default_uri: str | None = None
    experiment: str = "dreambooth"
    name: str | None = None
    objective: str | None = None
    max_class_similarity: float | None = None
    replace: bool = False
    allow_unmeasured: bool = False
    min_prompt_fidelity: float | None = None
    include_base: bool = False
    rule: str | None = None

    def __post_init__(self) -> None:
        most, least = self.max_class_similarity, self.min_prompt_fidelity
        require("", {"max_class_similarity": (most is None or finite(most, -1, 1), f"from -1 to 1, not {most}"),
                     "min_prompt_fidelity": (least is None or finite(least, 0, 1), f"from 0 to 1, not {least}")})


ConfigStore.instance().store(name="promote_schema", node=Promote, provider="dreambooth")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="promote")
def promote(cfg: DictConfig) -> None:
    """Register the best model of a sweep in MLflow, and write promoted.json to run_root."""
    cli.run_job(lambda: _job(cfg), sweep=False)


def _job(cfg: DictConfig) -> None:
    options = to_dataclass(cfg, Promote)
    sweep = cli.intercepted_override("sweep") or options.sweep
    if sweep is None:
        raise UserError("the sweep is missing: type sweep=ID, where ID is the tag `sweep` of its runs in MLflow")
    rule = cli.intercepted_override("rule")
    from dreambooth.runs.report import promotion_message
    from dreambooth.sweeps import promotion

    print(promotion_message(promotion.promote(sweep, Path(options.run_root), promotion.PromotionOptions(
        options.uri, options.experiment, options.name, options.objective, options.max_class_similarity,
        options.replace, options.default_uri, allow_unmeasured=options.allow_unmeasured,
        min_prompt_fidelity=options.min_prompt_fidelity, include_base=options.include_base,
        rule=options.rule if rule in (None, "null") else rule))))


def main() -> None:
    """Run the console script `dreambooth-promote`."""
    cli.intercept_override("sweep")  # its value is an ID, but Hydra would look for an option of the group sweep
    cli.intercept_override("rule")  # Hydra would want quotes around <=
    cli.run_hydra(promote, Promote)
    cli.exit_process()


if __name__ == "__main__":
    main()
