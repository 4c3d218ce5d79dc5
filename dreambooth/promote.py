"""The door `python -m dreambooth.promote`: registers the best model of a sweep. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import asked, conf_dir
from dreambooth.config.section import Section, finite, require
from dreambooth.errors import UserError


@dataclass
class Promote(Section):
    """Which sweep, and the rule; see conf/promote.yaml."""

    sweep: str | None = None
    run_root: str = "runs"
    uri: str | None = None
    default_uri: str | None = None
    experiment: str = "dreambooth"
    name: str | None = None
    objective: str | None = None
    max_class_similarity: float | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        bound = self.max_class_similarity
        require("", {"max_class_similarity": (bound is None or finite(bound, -1, 1), f"from -1 to 1, not {bound}")})


ConfigStore.instance().store(name="promote_schema", node=Promote, provider="dreambooth")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="promote")
def promote(cfg: DictConfig) -> None:
    """One call: a champion in MLflow, promoted.json in the folder of the runs."""
    cli.attempt(lambda: _job(cfg), sweep=False)


def _job(cfg: DictConfig) -> None:
    ask = asked(cfg, Promote)
    sweep = cli.given("sweep") or ask.sweep
    if sweep is None:
        raise UserError("the sweep is missing: type sweep=ID, the tag that its runs have in MLflow")
    from dreambooth.runs.report import promoted
    from dreambooth.sweeps import promotion

    terms = promotion.Terms(ask.uri, ask.experiment, ask.name, ask.objective, ask.max_class_similarity, ask.replace,
                            ask.default_uri)
    print(promoted(promotion.promote(sweep, Path(ask.run_root), terms)))


def main() -> None:
    """Console script `dreambooth-promote`."""
    cli.take("sweep")  # an ID; conf/sweep/ is a group, whose options Hydra would look for
    promote()
    cli.leave()


if __name__ == "__main__":
    main()
