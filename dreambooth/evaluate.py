"""The door `python -m dreambooth.evaluate`: measures what a run has made. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth import cli
from dreambooth.config.compose import conf_dir, load
from dreambooth.config.enums import EncoderKind
from dreambooth.config.schema import Config
from dreambooth.config.section import Section
from dreambooth.errors import UserError


@dataclass
class Ask(Section):
    """What to measure; see conf/evaluate.yaml. None: as the run has it."""

    run: str | None = None
    encoder: EncoderKind | None = None
    prompts: str | None = None
    images_per_prompt: int | None = None
    class_images: int | None = None
    seed: int | None = None
    reference_dir: str | None = None
    dino: str | None = None
    clip: str | None = None
    lpips: str | None = None
    offline: bool | None = None


ConfigStore.instance().store(name="evaluate_schema", node=Ask, provider="dreambooth")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="evaluate")
def evaluate(cfg: DictConfig) -> None:
    """One call: measures a run, writes its evaluation.json."""
    cli.attempt(lambda: _job(cfg), sweep=False)


def _job(cfg: DictConfig) -> None:
    asked = {str(key): value for key, value in cfg.items() if key != "run" and value is not None}
    if cfg.run is None:
        raise UserError("the run is missing: type run=runs/NAME, a folder that python -m dreambooth.train made")
    from dreambooth.storage import run_inputs

    run = Path(run_inputs.local(cfg.run) or "")
    config = load(composed(run, asked))
    from dreambooth.config.recipe import resolve
    from dreambooth.evaluation.evaluate_run import assess
    from dreambooth.utils.hardware import detect

    assess(resolve(run_inputs.fetched(config, run), run, detect()))


def composed(run: Path, asked: dict[str, object]) -> DictConfig:
    """The run's own configuration, from Hydra's record in its folder, with what is asked for in `evaluate`.

    Raises:
        UserError: it is no run, or its record cannot be read.
    """
    record = run / ".hydra" / "config.yaml"
    if not (run / "run.json").is_file() or not record.is_file():
        raise UserError(f"there is no run in {run}: type run=runs/NAME, a folder that python -m dreambooth.train made")
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(record), {"evaluate": {
            **asked, "select": None, "every": None, "objective": "instance_loss"}})
    except (OSError, OmegaConfBaseException) as error:
        raise UserError(f"the record of the run in {record} cannot be read ({str(error).splitlines()[0]}): "
                        "repeat the run's command, then type this again") from error
    assert isinstance(cfg, DictConfig)
    return cfg


def main() -> None:
    """Console script `dreambooth-evaluate`."""
    evaluate()
    cli.leave()


if __name__ == "__main__":
    main()
