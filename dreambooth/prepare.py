"""Command `python -m dreambooth.prepare`: reports on a folder of photos, and writes a copy with captions and masks.

Torch is imported only if a model is used.
"""

import hydra
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import conf_dir, to_aliased_dataclass
from dreambooth.preparation.options import Prepare


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="prepare")
def prepare(cfg: DictConfig) -> None:
    """Report on a folder of photos, and write a prepared copy of it."""
    cli.run_job(lambda: _job(cfg), sweep=False)


def _job(cfg: DictConfig) -> None:
    options = to_aliased_dataclass(cfg, Prepare)
    from dreambooth.preparation.prepare_folder import check_folders, prepare
    from dreambooth.utils.signals import catch_stop_signals

    check_folders(options)
    if options.uses_models:
        from dreambooth.models.loading import import_libraries

        import_libraries()
    with catch_stop_signals() as stop:
        prepare(options, stop)


def main() -> None:
    """Run the console script `dreambooth-prepare`."""
    cli.run_hydra(prepare, Prepare)
    cli.exit_process()


if __name__ == "__main__":
    main()
