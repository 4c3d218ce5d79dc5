"""Command `python -m dreambooth.generate`: generates images with the model of a run.

Torch is imported only when the work of the command starts, so that --help is fast.
"""

from dataclasses import replace

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import conf_dir, to_dataclass
from dreambooth.config.generate import Generate

ConfigStore.instance().store(name="generate_schema", node=Generate, provider="dreambooth")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="generate")
def generate(cfg: DictConfig) -> None:
    """Generate images, and write each image and a grid of all images."""
    cli.run_job(lambda: _job(cfg), sweep=False)


def _job(cfg: DictConfig) -> None:
    options = to_dataclass(cfg, Generate)
    from dreambooth.inference.generate_images import draw
    from dreambooth.models.loading import import_libraries
    from dreambooth.tracking.registered_models import local_path
    from dreambooth.utils.signals import catch_stop_signals

    import_libraries()
    options = replace(options, run=local_path(options.run, options.uri), base=local_path(options.base, options.uri),
                      lora=[str(local_path(lora, options.uri)) for lora in options.loras])
    with catch_stop_signals() as stop:
        draw(options, stop)


def main() -> None:
    """Run the console script `dreambooth-generate`."""
    cli.run_hydra(generate, Generate)
    cli.exit_process()


if __name__ == "__main__":
    main()
