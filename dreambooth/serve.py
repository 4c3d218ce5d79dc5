"""Command `python -m dreambooth.serve`: serves the model of a run over HTTP."""

import os
from dataclasses import replace

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from dreambooth import cli
from dreambooth.config.compose import conf_dir, to_dataclass
from dreambooth.errors import UserError
from dreambooth.models.inference_memory import read_memory
from dreambooth.serving.options import TOKEN_VARIABLE, Serve

ConfigStore.instance().store(name="serve_schema", node=Serve, provider="dreambooth")


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="serve")
def serve(cfg: DictConfig) -> None:
    """Serve a model until SIGTERM or Ctrl-C."""
    cli.run_job(lambda: _job(cfg), sweep=False)


def _job(cfg: DictConfig) -> None:
    options = to_dataclass(cfg, Serve)
    if token := os.environ.pop(TOKEN_VARIABLE, None) or options.token:  # not in the environment of the workers
        try:
            options = replace(options, token=token)
        except ValueError as error:
            raise UserError(str(error)) from error
    if not options.run and not options.base:
        raise UserError("the run is missing: type run=runs/NAME, a folder that python -m dreambooth.train made")
    if options.plan:
        _show_plan(options)
        return
    from dreambooth.serving import server

    server.serve(options)


def _show_plan(options: Serve) -> None:
    """Print what serving needs on each GPU of conf/hardware.

    Raises:
        UserError: there is no model.
    """
    from dreambooth.models.loading import import_libraries
    from dreambooth.planner.serving_plan import format_serving, model_of_source, plan_presets
    from dreambooth.serving.worker import find_model

    source = find_model(options.run, options.base, options.uri, options.cache)
    import_libraries()
    plans = plan_presets(model_of_source(source, options.max_batch), read_memory(options.memory_options))
    print("\n".join(format_serving(plans)), flush=True)


def main() -> None:
    """Run the console script `dreambooth-serve`."""
    cli.run_hydra(serve, Serve)
    cli.exit_process()


if __name__ == "__main__":
    main()
