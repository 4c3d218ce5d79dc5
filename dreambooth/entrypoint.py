"""The door `python -m dreambooth.entrypoint`: what the image runs to train. SageMaker's contract in, one run out.

Reads hyperparameters, channels and hosts below /opt/ml, trains in a process or several of its own, keeps the result.
Words after the command are overrides, and beat everything else. Nothing heavy is imported here.
"""

import sys
import traceback
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dreambooth import cli
from dreambooth.config.compose import conf_dir, load
from dreambooth.config.enums import Device
from dreambooth.config.schema import Config, Storage
from dreambooth.config.storage import is_remote
from dreambooth.container import cluster as clusters
from dreambooth.container import hyperparameter_values
from dreambooth.container import hyperparameters as requests
from dreambooth.container.publish_model import publish
from dreambooth.container.sagemaker_paths import Places
from dreambooth.container.supervisor import End, Supervisor
from dreambooth.data.photos import list_photos
from dreambooth.errors import DreamBoothError, UserError
from dreambooth.runs import identity
from dreambooth.utils.assets import asset

ENFORCED = {"hydra/launcher": "basic", "hydra.mode": "RUN"}  # an experiment may not make a job start jobs

identity.register_resolver()


def main() -> None:
    """One job. What ends it badly is also written to output/failure."""
    supervisor, places = Supervisor(), Places.found()
    with suppress(OSError):
        places.failure.unlink(missing_ok=True)
    try:
        places.check()
        end = _job(places, sys.argv[1:], supervisor)
    except DreamBoothError as error:
        print(f"dreambooth: {error}", file=sys.stderr)
        end = End(error.exit_code, str(error))
    except Exception as error:
        traceback.print_exc()
        end = End(1, cli.fault(error))
    if end.code:
        with suppress(OSError):  # nowhere to write to: the log and the exit code have it
            places.failure.parent.mkdir(parents=True, exist_ok=True)
            places.failure.write_text(end.sentence, encoding="utf-8")
    sys.exit(end.code)


def _job(places: Places, words: list[str], supervisor: Supervisor) -> End:
    cluster = clusters.cluster(places.config("resourceconfig.json"), clusters.gpus() or 1)
    request = asked(places, words, _hardware_of(cluster.instance_type))
    config, run_dir = composed(request.words())
    if config.hardware.device is Device.cpu:
        cluster = clusters.on_cpu(cluster)
    if request.epochs:
        request.overrides["checkpoint.every"] = str(_steps(config, cluster.world))
    for notice in request.notices:
        print(f"dreambooth: {notice}", flush=True)
    print(f"dreambooth: python -m dreambooth.train {' '.join(request.words())}", flush=True)
    end = supervisor.run(cluster.command(request.words()), cluster.environment(), launcher=cluster.world > 1)
    if end.code or not cluster.first:
        return end
    publish(run_dir, places.model)
    if request.upload:
        place = f"{request.upload.rstrip('/')}/{run_dir.name}"
        return supervisor.run([sys.executable, "-m", "dreambooth.storage", "upload", str(places.model), place], {},
                              stopped=f"stopped after the last step, the model is in {places.model}; start it again to "
                                      f"send it to {place}")
    return end


def asked(places: Places, words: list[str], hardware: str | None) -> requests.Request:
    """The run that a job asks for, and where it is to live.

    Raises:
        ConfigError: names are unknown or values are not what their names ask for.
    """
    hyperparameters = {name: raw if isinstance(raw, str) else hyperparameter_values.encoded(raw)
                       for name, raw in places.config("hyperparameters.json").items()}
    request = requests.understand(hyperparameters | _typed(words), places.channels(), hardware, places, GRAMMAR)
    request.notices += [f"{key} is not used: a job is one run" for key in ENFORCED if key in request.overrides]
    ours = {"run_root": hyperparameter_values.quoted(str(places.checkpoints)),
            "storage.cache": hyperparameter_values.quoted(str(places.cache))}
    request.overrides = ours | request.overrides | ENFORCED
    return request


def composed(words: list[str]) -> tuple[Config, Path]:
    """The run's configuration and its folder.

    Raises:
        UserError: the overrides do not compose.
    """
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("config", words, return_hydra_config=True)
        run_dir = Path(cfg.hydra.run.dir)
    except (HydraException, OmegaConfBaseException) as error:
        causes = [error, *filter(None, [error.__cause__])]
        raise UserError("; ".join(" ".join(str(cause).split("\n    ")[0].split()) for cause in causes)) from error
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return load(cfg), run_dir


def _steps(config: Config, world: int) -> int:
    """save_steps passes over the photos, in steps.

    Raises:
        DreamBoothError: there are no photos, or they cannot be had.
    """
    train, every = config.train, config.checkpoint.every or 1
    photos = sum(one.repeats * len(list_photos(_photos(one.instance_dir, config.storage)))
                 for one in config.dataset.subjects if one.instance_dir)  # one without is told when the run is made
    return max(1, every * photos // (train.train_batch_size * train.gradient_accumulation_steps * world))


def _photos(folder: str, spec: Storage) -> Path:
    """The folder on this disk. From S3 it comes to where the run looks for it, which does not fetch it again."""
    if not is_remote(folder):
        return Path(asset(folder))
    from dreambooth.storage import folders

    return folders.download(folder, Path(spec.cache).absolute(), parallel=spec.parallel)


def _typed(words: list[str]) -> dict[str, str]:
    """Overrides as they are typed.

    Raises:
        UserError: a word is none.
    """
    if wrong := [word for word in words if "=" not in word]:
        raise UserError(f"{wrong[0]} is no override: type key=value after train, such as train.max_train_steps=300")
    return {key: value for key, _, value in (word.partition("=") for word in words)}


@cache
def _keys() -> frozenset[str]:
    """Every setting, such as train.seed, and every group."""
    parts = vars(Config())
    settings = {f"{name}.{key}" for name, part in parts.items() if is_dataclass(part) for key in vars(part)}
    single = {name for name, part in parts.items() if not is_dataclass(part)}
    return frozenset({*settings, *single, *(folder.name for folder in conf_dir().iterdir() if folder.is_dir())})


def _known(name: str) -> bool:
    return name in _keys() or name.startswith(("hydra.", "hydra/", "hardware.node_selector.", "dataset.concepts."))


def _plain(override: str) -> bool:
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return not parsed.is_sweep_override()


def _hardware_of(instance_type: str | None) -> str | None:
    """The option of group hardware for an instance type, else for its family, such as g5 for ml.g5.2xlarge."""
    family = (instance_type or "").rpartition(".")[0]
    options = {path.stem: OmegaConf.load(path) for path in sorted((conf_dir() / "hardware").glob("*.yaml"))}
    exact = (name for name, option in options.items() if instance_type and option.instance_type == instance_type)
    return next(exact, None) or next((name for name, option in options.items()
                 if family and (option.instance_type or "").rpartition(".")[0] == family), None)


GRAMMAR = requests.Grammar(_known, tuple(sorted(_keys())), _plain)


if __name__ == "__main__":
    main()
