"""Access to the SageMaker SDK: its typed classes, its sessions and its settings.

Importing the SDK takes about two seconds. Each function imports it when it is called, and only submitting calls them.
"""

import inspect
import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dreambooth.errors import ConfigError, UserError
from dreambooth.storage import aws_errors

TELEMETRY_PATH = ("SageMaker", "PythonSDK", "Modules", "TelemetryOptOut")
LOGGERS = ("sagemaker", "sagemaker.config")  # the second one sets its own level, unless it already has one
PIPELINE_VARIABLE = "is-instance[PipelineVariable]"  # pydantic's name of the second type of `str or PipelineVariable`
MESSAGES = {  # pydantic's error type -> end of a sentence about the value
    "missing": "is missing", "extra_forbidden": "is not known to SageMaker", "string_type": "must be a string",
    "int_type": "must be an integer", "int_from_float": "must be an integer", "bool_type": "must be true or false",
    "list_type": "must be a list", "dict_type": "must be a mapping", "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping"}


def load_resources() -> Any:
    """Return the SDK's module of typed resources, such as TrainingJob.

    Raises:
        UserError: the SDK is not installed.
    """
    try:
        from sagemaker.core import resources
    except ImportError as error:
        raise UserError("SageMaker needs a package: pip install 'dreambooth[aws]'") from error
    return resources


def mute_logs() -> None:
    """Let the SDK log warnings and errors only, unless the user has chosen another level for its loggers.

    Hydra prints what any logger of the process logs at the level INFO. The SDK logs there which defaults files it does
    not find. At the level DEBUG, it logs whole requests. Call this before the SDK is imported.
    """
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)


def bind_training_job(name: str, client: Any) -> Any:
    """Return the SDK's TrainingJob object of a job. Its methods call SageMaker through `client`.

    TrainingJob.get is not used: it logs the description of the job, with the job's environment variables, at the level
    DEBUG. The method `refresh` of the returned object loads the same description and does not log it.
    """
    training_job = load_resources().TrainingJob(training_job_name=name)
    training_job._set_client_context(session=_session_of(client), region=client.meta.region_name)
    return training_job


def describe_training_job(name: str, client: Any) -> Any:
    """Return the SDK's TrainingJob object of a job, with the job's current description.

    Raises:
        UserError: the description does not follow the SDK's shapes. The message repeats no value of the description,
            because the job's environment variables may be confidential.
    """
    load_resources()
    from pydantic import ValidationError

    try:
        return bind_training_job(name, client).refresh()
    except ValidationError:
        raise UserError(f"the installed SageMaker SDK does not understand AWS's description of {name}: type "
                        "pip install -U 'sagemaker<4'") from None


def find_type_problems(request: Mapping[str, Any], shape: Any) -> list[str]:
    """Return one sentence for each missing, unknown or wrongly typed value of a CreateTrainingJob request.

    The sentences do not repeat the values, which may be confidential.

    Args:
        shape: botocore's shape of the request, from which the names of its parts are known.
    """
    from pydantic import ValidationError

    names: dict[str, str] = {}  # the SDK's name -> SageMaker's name
    try:
        typed_request(request, shape, names)
    except ValidationError as error:
        errors = {item["loc"]: item["type"] for item in error.errors(include_input=False, include_url=False)}
        unions = {place[:-1] for place in errors if place[-1] == PIPELINE_VARIABLE}
        return [f"{_path(place[:-1] if place[:-1] in unions else place, names)} {MESSAGES.get(kind, 'is not valid')}"
                for place, kind in errors.items() if place[-1] != PIPELINE_VARIABLE]
    return []


def typed_request(request: Mapping[str, Any], shape: Any, names: dict[str, str] | None = None) -> Any:
    """Return the arguments of TrainingJob.create for a request, as an object whose attributes are the SDK's shapes.

    Args:
        names: receives SageMaker's name of each part of the request, by the SDK's name.

    Raises:
        pydantic.ValidationError: the request is not a valid CreateTrainingJob request.
    """
    arguments = _to_snake_case(request, shape, {} if names is None else names)
    return _request_class().model_validate(arguments, strict=True)


def has_settings_files() -> bool:
    """Return whether a defaults file of the SDK exists or is named: that of the administrator or that of the user.

    The SDK is not imported, so that a command without such files reports its mistakes at once.
    """
    try:
        from platformdirs import site_config_dir, user_config_dir
    except ImportError:  # the SDK needs platformdirs, so it is not installed either
        return False
    folders = {"SAGEMAKER_ADMIN_CONFIG_OVERRIDE": site_config_dir("sagemaker"),
               "SAGEMAKER_USER_CONFIG_OVERRIDE": user_config_dir("sagemaker")}
    return any(variable in os.environ or (Path(folder) / "config.yaml").exists()
               for variable, folder in folders.items())


def read_settings() -> dict[str, Any]:
    """Return the content of the SDK's defaults files: that of the administrator, overridden by that of the user.

    Raises:
        ConfigError: a file cannot be read, or does not follow the SDK's schema.
    """
    if not has_settings_files():
        return {}
    load_resources()
    from jsonschema import ValidationError
    from sagemaker.core.config.config_manager import SageMakerConfig
    from yaml import YAMLError

    try:
        settings: dict[str, Any] = SageMakerConfig().load_sagemaker_config()
    except ValidationError as error:  # its message repeats the value, which may be confidential
        problem = f"{error.json_path} does not follow the SDK's schema ({error.validator})"
    except (OSError, ValueError, YAMLError) as error:
        problem = " ".join(str(error).split())[:300]
    except Exception as error:
        if not aws_errors.is_aws_error(error):
            raise
        problem = aws_errors.describe_error(error, "s3:GetObject", "the defaults file")
    else:
        return settings
    raise ConfigError(f"the defaults of the SageMaker SDK cannot be used: {problem}: change the file, or the variable "
                      "SAGEMAKER_ADMIN_CONFIG_OVERRIDE or SAGEMAKER_USER_CONFIG_OVERRIDE that names it")


def open_session(settings: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Return a Session of the SDK that sends no telemetry, unless a defaults file sets TelemetryOptOut to false.

    Args:
        settings: what `read_settings` returned; None: call it.
        options: further arguments of the Session, such as boto_session.
    """
    load_resources()
    from sagemaker.core.helper.session_helper import Session

    return Session(sagemaker_config=with_telemetry_choice(read_settings() if settings is None else settings), **options)


def with_telemetry_choice(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the SDK's settings with telemetry switched off, unless `settings` contain a choice."""
    result: dict[str, Any] = {"SchemaVersion": "1.0"} | dict(settings)
    place = result
    for key in TELEMETRY_PATH[:-1]:
        place[key] = dict(place.get(key) or {})
        place = place[key]
    place.setdefault(TELEMETRY_PATH[-1], True)
    return result


@cache
def _session_of(client: Any) -> Any:
    """Return a boto3 Session for the SDK that hands out `client`. It is kept, because the SDK keeps every session.

    The SDK makes its own clients from a session: four of them, with ten attempts per call and without timeouts. Ten
    attempts take minutes, in which the launcher would not see that AWS throttles its calls.
    """
    from boto3.session import Session

    class ClientSession(Session):  # type: ignore[misc]
        def client(self, *args: Any, **options: Any) -> Any:
            return client

    return ClientSession(region_name=client.meta.region_name)


@cache
def _request_class() -> Any:
    """Return a pydantic class with one field per argument of TrainingJob.create that is part of the request."""
    from pydantic import ConfigDict, create_model

    arguments = inspect.signature(inspect.unwrap(load_resources().TrainingJob.create.__func__)).parameters
    fields: dict[str, Any] = {
        name: (argument.annotation, ... if argument.default is inspect.Parameter.empty else argument.default)
        for name, argument in arguments.items() if name not in ("cls", "session", "region")}
    settings = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return create_model("CreateTrainingJobArguments", __config__=settings, **fields)


def _to_snake_case(value: Any, shape: Any, names: dict[str, str]) -> Any:
    """Return a request with the SDK's names of its parts. Keys of maps, such as hyperparameters, are kept."""
    from sagemaker.core.utils.utils import pascal_to_snake

    if shape.type_name == "structure" and isinstance(value, Mapping):
        names |= {pascal_to_snake(name): name for name in [*shape.members, *value]}
        return {pascal_to_snake(name): _to_snake_case(item, shape.members[name], names) if name in shape.members
                else item for name, item in value.items()}
    if shape.type_name == "list" and isinstance(value, list):
        return [_to_snake_case(item, shape.member, names) for item in value]
    return value


def _path(place: tuple[str | int, ...], names: Mapping[str, str]) -> str:
    """Return the position of a value in SageMaker's words, such as Tags[0].Key."""
    words = [f"[{part}]" if isinstance(part, int) else f".{names.get(part, part)}" for part in place]
    return "".join(words).removeprefix(".")
