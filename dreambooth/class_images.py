"""The door `python -m dreambooth.class_images`: the class images of a run, from the overrides that train it.

Once for many: runs that share class prompt, base, precision and sampler find them in run_root. Nothing heavy is
imported here.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import conf_dir, load
from dreambooth.config.schema import Config
from dreambooth.runs import identity
from dreambooth.train import converted

NOWHERE = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")

identity.register_resolver()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def class_images(cfg: DictConfig) -> None:
    """One call: makes what is missing."""
    cli.attempt(lambda: _job(load(cfg)), sweep=False)


def _job(config: Config) -> None:
    from dreambooth.config.recipe import resolve
    from dreambooth.storage import run_inputs
    from dreambooth.utils.hardware import detect
    from dreambooth.utils.signals import stoppable

    cli.allocator(config.memory)
    recipe = resolve(converted(run_inputs.fetched(config, None)), Path(config.run_root), detect())
    with stoppable() as stop:
        from dreambooth.training.setup import class_images_alone

        class_images_alone(recipe, stop)


def main() -> None:
    """`python -m dreambooth.class_images`."""
    sys.argv[1:] += NOWHERE
    class_images()
    cli.leave()


if __name__ == "__main__":
    main()
