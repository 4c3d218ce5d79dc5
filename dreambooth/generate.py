"""The door `python -m dreambooth.generate`: draws with what a run has made. Nothing heavy is imported here."""

from dataclasses import replace

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import asked, conf_dir
from dreambooth.config.generate import Generate

ConfigStore.instance().store(name="generate_schema", node=Generate, provider="dreambooth")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="generate")
def generate(cfg: DictConfig) -> None:
    """One call: writes pictures and a grid."""
    cli.attempt(lambda: _job(cfg), sweep=False)


def _job(cfg: DictConfig) -> None:
    ask = asked(cfg, Generate)
    from dreambooth.inference.generate_images import draw
    from dreambooth.models.loading import import_libraries
    from dreambooth.storage import run_inputs
    from dreambooth.utils.signals import stoppable

    import_libraries()
    ask = replace(ask, run=run_inputs.local(ask.run), base=run_inputs.local(ask.base),
                  lora=[str(run_inputs.local(lora)) for lora in ask.loras])
    with stoppable() as stop:
        draw(ask, stop)


def main() -> None:
    """Console script `dreambooth-generate`."""
    generate()
    cli.leave()


if __name__ == "__main__":
    main()
