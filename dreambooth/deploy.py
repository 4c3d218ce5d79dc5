"""Command `python -m dreambooth.deploy`: serves a model on a SageMaker endpoint.

Torch and AWS libraries are imported only when the work of the command starts, so that --help is fast.
"""

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import conf_dir, to_dataclass
from dreambooth.deployment.options import Deploy

ConfigStore.instance().store(name="deploy_schema", node=Deploy, provider="dreambooth")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="deploy")
def deploy(cfg: DictConfig) -> None:
    """Deploy a model, show the state of its endpoint, roll it back, or delete it."""
    cli.run_job(lambda: _job(cfg), sweep=False)


def _job(cfg: DictConfig) -> None:
    options = to_dataclass(cfg, Deploy)
    from dreambooth.deployment.sagemaker_deployment import open_deployment

    open_deployment(options).run()


def main() -> None:
    """Run the console script `dreambooth-deploy`."""
    cli.run_hydra(deploy, Deploy)
    cli.exit_process()


if __name__ == "__main__":
    main()
