"""Command `python -m dreambooth.evaluate`: generates evaluation images with the model of a run, and scores them.

Torch is imported only when the work of the command starts, so that --help is fast.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dreambooth import cli
from dreambooth.config.compose import conf_dir, load, to_dataclass
from dreambooth.config.enums import EncoderKind
from dreambooth.config.schema import Config, StopWhen
from dreambooth.config.section import Section
from dreambooth.config.storage import is_remote
from dreambooth.errors import UserError


@dataclass
class EvaluateOptions(Section):
    """Options of the command: the run to evaluate, and new values for settings of the config group evaluate.

    If a field is None, its setting keeps the value from the training of the run. conf/evaluate.yaml explains each key.
    """

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


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateOptions, provider="dreambooth")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="evaluate")
def evaluate(cfg: DictConfig) -> None:
    """Evaluate the model of a run, and write evaluation.json to the run folder."""
    cli.run_job(lambda: _job(cfg), sweep=False)


def _job(cfg: DictConfig) -> None:
    typed = to_dataclass(cfg, EvaluateOptions)
    options = {key: value for key, value in vars(typed).items() if key != "run" and value is not None}
    if typed.run is None:
        raise UserError("the run is missing: type run=runs/NAME, a folder that python -m dreambooth.train wrote")
    from dreambooth.storage import run_inputs
    from dreambooth.utils import atomic_files

    run = Path(run_inputs.download_if_remote(typed.run) or "")
    config = load(compose_from_run(run, options, downloaded=is_remote(typed.run)))
    atomic_files.check_writable(run, "type run=DIR, a folder that you can write to")
    from dreambooth.config.recipe import resolve
    from dreambooth.evaluation.evaluate_run import evaluate_run
    from dreambooth.utils.hardware import detect_machine

    evaluate_run(resolve(run_inputs.fetch_inputs(config, run), run, detect_machine()))


def compose_from_run(run: Path, options: dict[str, object], downloaded: bool = False) -> DictConfig:
    """Return the configuration that Hydra recorded in a run folder, with new values in the group evaluate.

    Settings that choose a step during training, such as train.stop_when, have their default values.

    Args:
        run: folder of the run.
        options: the new values, by key in the group evaluate.
        downloaded: whether the folder is a copy from S3, whose parent is no run root. Then run_root is as recorded.

    Raises:
        UserError: there is no run in the folder, or its configuration cannot be read.
    """
    record = run / ".hydra" / "config.yaml"
    if not (run / "run.json").is_file() or not record.is_file():
        raise UserError(f"there is no run in {run}: type run=runs/NAME, a folder that python -m dreambooth.train wrote")
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(record), {
            "train": {"stop_when": StopWhen()},
            "evaluate": {**options, "select": None, "every": None, "objective": "instance_loss"}})
        if not downloaded:
            cfg.run_root = find_run_root(run, str(cfg.run_root))
    except (OSError, ValueError, TypeError, AttributeError, IndexError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"the configuration of the run in {record.parent} cannot be read "
                        f"({str(error).splitlines()[0]}): repeat the run's command, then repeat this one") from error
    assert isinstance(cfg, DictConfig)
    return cfg


def find_run_root(run: Path, recorded: str) -> str:
    """Return the folder run_root of a run, which may have been moved with this folder since the run.

    Args:
        recorded: run_root, as the user typed it for the run, possibly in another working directory.
    """
    record = run / ".hydra" / "hydra.yaml"
    if not record.is_file():
        return recorded
    runtime = OmegaConf.load(record).hydra.runtime
    root, folder = (Path(os.path.normpath(path)) for path in (
        Path(str(runtime.cwd), recorded), str(runtime.output_dir)))
    if not folder.is_relative_to(root):
        return str(root)
    depth = len(folder.relative_to(root).parts)  # 1, except with hydra.run.dir
    return str([run.absolute(), *run.absolute().parents][depth])


def main() -> None:
    """Run the console script `dreambooth-evaluate`."""
    cli.run_hydra(evaluate, EvaluateOptions)
    cli.exit_process()


if __name__ == "__main__":
    main()
