"""Command `python -m dreambooth.entrypoint`: runs one SageMaker training job in the container image.

The command reads the hyperparameters, input channels and hosts of the job from files below /opt/ml, trains in one or
more child processes, and copies the result to the folder that SageMaker uploads. The command's arguments are overrides,
which take precedence over all other settings. Heavy libraries such as torch are not imported in this process.
"""

import json
import sys
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dreambooth import cli
from dreambooth.config.compose import composed, conf_dir, load
from dreambooth.config.enums import Device
from dreambooth.config.overrides import parse, setting_keys
from dreambooth.config.schema import Config, Storage
from dreambooth.config.storage import is_remote
from dreambooth.container.cluster import count_gpus, limit_to_one_process, parse_resource_config
from dreambooth.container.hyperparameters import OverrideGrammar, RunRequest, build_request
from dreambooth.container.publish_model import publish
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.container.supervisor import ExitStatus, Supervisor
from dreambooth.data.photos import list_photos
from dreambooth.errors import DreamBoothError, UserError
from dreambooth.runs import identity
from dreambooth.runs.remote_mirror import result_name
from dreambooth.storage import folders
from dreambooth.tracking.mlflow_database import local_path
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.masking import mask_urls
from dreambooth.utils.quoting import hydra_string, shell_line

FORCED_OVERRIDES = {"hydra/launcher": "basic", "hydra.mode": "RUN"}  # a job must not start further jobs

identity.register_resolver()


def main() -> None:
    """Run one job and exit with its exit code. If the job fails, write the reason to the file output/failure."""
    cli.use_utf8()
    supervisor, paths = Supervisor(), SageMakerPaths.from_environment()
    with suppress(OSError):
        paths.failure.unlink(missing_ok=True)
    try:
        with cli.reporting_full_disk():
            paths.check_writable()
            status = _run_job(paths, sys.argv[1:], supervisor)
    except DreamBoothError as error:
        status = ExitStatus(error.exit_code, mask_urls(str(error)))
        print(f"dreambooth: {status.message}", file=sys.stderr)
    except Exception as error:
        if sentence := cli.describe_system_error(error):
            status = ExitStatus(UserError.exit_code, sentence)
            print(f"dreambooth: {sentence}", file=sys.stderr)
        else:
            status = ExitStatus(1, cli.describe_fault(error))
            sys.stderr.write(mask_urls(traceback.format_exc()))
    if status.code:
        with suppress(OSError):  # if nothing can be written, the log and the exit code still report the failure
            paths.failure.parent.mkdir(parents=True, exist_ok=True)
            paths.failure.write_text(status.message, encoding="utf-8")
    sys.exit(status.code)


def _run_job(paths: SageMakerPaths, args: list[str], supervisor: Supervisor) -> ExitStatus:
    cluster = parse_resource_config(paths.read_config("resourceconfig.json"), count_gpus() or 1)
    request = read_request(paths, args, _find_hardware_option(cluster.instance_type))
    config, run_dir = compose_run(request.to_args(), paths)
    if config.hardware.device is Device.cpu:
        cluster = limit_to_one_process(cluster)
    if request.save_by_epochs:
        request.overrides["checkpoint.every"] = str(_epochs_to_steps(config, cluster.world_size))
    for notice in request.notices:
        print(f"dreambooth: {mask_urls(notice)}", flush=True)
    print(f"dreambooth: python -m dreambooth.train {mask_urls(shell_line(request.to_args()))}", flush=True)
    if request.upload_uri:
        folders.check_destination(request.upload_uri)  # before hours of training
    status = supervisor.run(cluster.train_command(request.to_args()), cluster.network_environment(),
                            launcher=cluster.world_size > 1)
    if status.code or not cluster.is_first_host:
        return status
    publish(run_dir, paths.model)
    return _upload(request.upload_uri, run_dir.name, paths.model, supervisor) if request.upload_uri else status


def _upload(parent: str, run_name: str, result: Path, supervisor: Supervisor) -> ExitStatus:
    """Upload the result of a run to its own folder below the S3 address `parent`."""
    step = json.loads((result / "result.json").read_text(encoding="utf-8"))["step"]
    uri = f"{parent.rstrip('/')}/{run_name}/{result_name(step)}"
    return supervisor.run([sys.executable, "-m", "dreambooth.storage", "upload", "--result", str(result), uri], {},
                          stopped=f"stopped after the last step, the model is in {result}; start it again to upload "
                                  f"it to {uri}")


def read_request(paths: SageMakerPaths, args: list[str], hardware: str | None) -> RunRequest:
    """Read the hyperparameters and input channels of a job, and return the run that they request.

    The folder of the run is below `paths.checkpoints`.

    Args:
        paths: the folders that SageMaker mounts.
        args: overrides from the command line.
        hardware: option of the config group hardware for this machine; None if no option matches the machine.

    Raises:
        ConfigError: hyperparameters have unknown names, or values of the wrong type.
    """
    hyperparameters = {name: raw if isinstance(raw, str) else json.dumps(raw)
                       for name, raw in paths.read_config("hyperparameters.json").items()}
    request = build_request(hyperparameters | _parse_args(args), paths.channels(), hardware, paths, GRAMMAR)
    request.notices += [f"{key} is ignored: a job is one run" for key in FORCED_OVERRIDES if key in request.overrides]
    defaults = {"run_root": hydra_string(str(paths.checkpoints)), "storage.cache": hydra_string(str(paths.cache))}
    request.overrides = defaults | request.overrides | FORCED_OVERRIDES
    return request


def _parse_args(args: list[str]) -> dict[str, str]:
    """Return the overrides from the command line as a dictionary, from key to value.

    Raises:
        UserError: an argument is not KEY=VALUE.
    """
    if invalid := [arg for arg in args if "=" not in arg]:
        raise UserError(f"{invalid[0]} is not a valid override: type key=value after train, such as "
                        "train.max_train_steps=300")
    return {key: value for key, _, value in (arg.partition("=") for arg in args)}


def compose_run(overrides: list[str], paths: SageMakerPaths | None = None) -> tuple[Config, Path]:
    """Compose a run from overrides, and return its configuration and its run folder.

    Args:
        paths: the folders of the job, below which the run must write its files. None: the run may write anywhere.

    Raises:
        UserError: Hydra cannot compose the overrides, or the run would write outside of `paths.checkpoints`.
    """
    with composed(overrides) as cfg:
        run_dir = Path(cfg.hydra.run.dir)
        OmegaConf.set_struct(cfg, False)
        outputs = _list_outputs(cfg, run_dir) if paths else {}
    del cfg["hydra"]
    config = load(cfg)
    if paths:
        paths.check_outputs(outputs)
    return config, run_dir


def _list_outputs(cfg: DictConfig, run_dir: Path) -> dict[str, Path]:
    """Return the path of each file or folder that a run writes, by the override that sets the path."""
    OmegaConf.set_readonly(cfg.hydra, False)
    cfg.hydra.runtime.output_dir = str(run_dir)  # as Hydra does when it starts the run
    outputs = {"run_root": Path(cfg.run_root), "name or hydra.run.dir": run_dir}
    if cfg.hydra.output_subdir is not None:
        outputs["hydra.output_subdir"] = run_dir / str(cfg.hydra.output_subdir)
    for key in ("hydra.job_logging", "hydra.hydra_logging"):
        if (settings := OmegaConf.select(cfg, key)) is not None:
            outputs |= _find_log_files(key, OmegaConf.to_container(settings, resolve=True))
    if cfg.tracking.kind.uses_mlflow and cfg.tracking.uri and (store := local_path(cfg.tracking.uri)):
        outputs["tracking.uri"] = store
    return outputs


def _find_log_files(key: str, settings: Any) -> dict[str, Path]:
    """Return the path of each log file in a configuration of Python's logging, by the override that sets the path.

    Args:
        key: the key of `settings`, such as hydra.job_logging.
        settings: the configuration of Python's logging, or a part of it.
    """
    if not isinstance(settings, dict):
        return {}
    files = {f"{key}.filename": Path(str(settings["filename"]))} if settings.get("filename") else {}
    for name, value in settings.items():
        files |= _find_log_files(f"{key}.{name}", value)
    return files


def _epochs_to_steps(config: Config, world_size: int) -> int:
    """Return the number of steps between checkpoints, for a job whose `checkpoint.every` counts epochs.

    An epoch is one pass over the photos that train.

    Raises:
        DreamBoothError: there are no photos, or they cannot be downloaded.
    """
    train, epochs = config.train, config.checkpoint.every or 1
    photos = sum(subject.repeats * (len(list_photos(_to_local_folder(subject.instance_dir, config.storage)))
                                    - config.dataset.validation_count)
                 for subject in config.dataset.subjects
                 if subject.instance_dir)  # the run itself reports a missing instance_dir
    batch = train.global_batch_size or train.train_batch_size * train.gradient_accumulation_steps * world_size
    return max(1, epochs * photos // batch)


def _to_local_folder(folder: str, storage: Storage) -> Path:
    """Return the local path of a folder. If the folder is in S3, download it to the cache that the run also uses."""
    if not is_remote(folder):
        return Path(resolve_asset(folder))
    return folders.download(folder, Path(storage.cache).absolute(), parallel=storage.parallel)


def _find_hardware_option(instance_type: str | None) -> str | None:
    """Return the option of the config group hardware for an instance type.

    If no option has exactly this type, return an option for the same instance family, such as g5 for ml.g5.2xlarge.
    Return None if there is no such option either.
    """
    family = (instance_type or "").rpartition(".")[0]
    options = {path.stem: OmegaConf.load(path) for path in sorted((conf_dir() / "hardware").glob("*.yaml"))}
    exact = (name for name, option in options.items() if instance_type and option.instance_type == instance_type)
    return next(exact, None) or next((name for name, option in options.items()
                 if family and (option.instance_type or "").rpartition(".")[0] == family), None)


@cache
def _config_keys() -> frozenset[str]:
    """Return the keys of all settings, such as train.seed, and the names of all config groups."""
    groups = (folder.name for folder in conf_dir().iterdir() if folder.is_dir())
    return frozenset({*setting_keys(Config), *groups})


def _is_known_key(name: str) -> bool:
    prefixes = ("hydra.", "hydra/", "hardware.node_selector.", "dataset.concepts.")
    return name in _config_keys() or name.startswith(prefixes)


def _is_single_value(override: str) -> bool:
    parsed = parse(override)
    return parsed is not None and not parsed.is_sweep_override()


GRAMMAR = OverrideGrammar(_is_known_key, tuple(sorted(_config_keys())), _is_single_value)


if __name__ == "__main__":
    main()
