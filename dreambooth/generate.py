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
    from dreambooth.storage import run_inputs
    from dreambooth.utils.signals import catch_stop_signals

    import_libraries()
    download = run_inputs.download_if_remote
    options = replace(options, run=download(options.run), base=download(options.base),
                      lora=[str(download(lora)) for lora in options.loras])
    with catch_stop_signals() as stop:
        draw(options, stop)


def main() -> None:
    """Run the console script `dreambooth-generate`."""
    cli.run_hydra(generate, Generate)
    cli.exit_process()


if __name__ == "__main__":
    main()
