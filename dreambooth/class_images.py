"""Command `python -m dreambooth.class_images`: generates the class images that a run with the same overrides needs.

Class images are pictures of ordinary members of the subject's class. Prior preservation trains on them.

The images are stored below the folder run_root. Runs with the same class prompt, base model, precision and sampler
share the images. Torch is imported only when the work of the command starts, so that --help is fast.
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import conf_dir, load
from dreambooth.config.schema import Config
from dreambooth.runs import identity
from dreambooth.train import convert_single_files

identity.register_resolver()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def class_images(cfg: DictConfig) -> None:
    """Generate the missing class images of a run."""
    cli.run_job(lambda: _job(load(cfg)), sweep=HydraConfig.get().mode is RunMode.MULTIRUN)


def _job(config: Config) -> None:
    from dreambooth.config.recipe import resolve
    from dreambooth.storage import run_inputs
    from dreambooth.utils.hardware import detect_machine
    from dreambooth.utils.signals import catch_stop_signals

    cli.configure_allocator(config.memory)
    config = convert_single_files(run_inputs.fetch_inputs(config, None))
    recipe = resolve(config, Path(config.run_root), detect_machine())
    with catch_stop_signals() as stop, stop.at_once("stopped; made images are kept; repeat the command to continue"):
        from dreambooth.training.setup import make_class_images

        make_class_images(recipe)


def main() -> None:
    """Run `python -m dreambooth.class_images`."""
    cli.run_hydra_without_folder(class_images, Config, "class_images")
    cli.exit_process()


if __name__ == "__main__":
    main()
