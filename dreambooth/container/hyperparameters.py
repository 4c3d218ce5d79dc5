"""Converts the hyperparameters and channels of a SageMaker job to the Hydra overrides of one run.

Settings have four sources. In order of precedence, lowest first, these are the instance type, blog hyperparameters
(names from an AWS blog post, see blog_hyperparameters.py), channels, and hyperparameters that are overrides. If an
override replaces the setting of a blog hyperparameter or of a channel, the log contains a notice.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dreambooth.config.storage import is_remote
from dreambooth.container import blog_hyperparameters, hyperparameter_values
from dreambooth.container.blog_hyperparameters import BlogSettings
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.data.photos import list_photos
from dreambooth.errors import ConfigError, UserError
from dreambooth.storage.run_inputs import model_folder
from dreambooth.utils.atomic_files import write_folder
from dreambooth.utils.plurals import counted
from dreambooth.utils.quoting import hydra_string
from dreambooth.utils.suggestions import closest

CHANNEL_KEYS = {  # channel of the job -> configuration key that its folder sets
    "images": "dataset.instance_dir", "training": "dataset.instance_dir", "train": "dataset.instance_dir",
    "class_images": "dataset.class_dir", "base_model": "model.source", "model": "model.source",
}
SDK_CHANNELS = ("code", "sm_drivers")  # channels that the SageMaker SDK adds for its own files
SDK_PREFIXES = ("sagemaker_", "_tuning_")  # prefixes of hyperparameters that the SDK adds for its own containers
SUPERSEDED = {"model": ("model.source", "model.resolution")}  # config group -> keys that the group also sets
CUDA_ONLY = {"precision": ("fp16",), "attention": ("xformers",)}  # values unsupported with hardware=cpu
BLOG_HARDWARE = "g4dn"  # option of `hardware` for blog hyperparameters on an unknown instance type


@dataclass
class RunRequest:
    """The run that a job requests: overrides, notices for the log, and settings without a configuration key."""

    overrides: dict[str, str] = field(default_factory=dict)  # key -> value in Hydra's grammar, in this order
    notices: list[str] = field(default_factory=list)
    save_by_epochs: bool = False  # whether checkpoint.every counts epochs instead of steps
    upload_uri: str | None = None  # S3 folder for a copy of the model

    def to_args(self) -> list[str]:
        """Return the overrides as command-line arguments."""
        return [f"{key}={value}" for key, value in self.overrides.items()]


@dataclass(frozen=True)
class OverrideGrammar:
    """Functions that check override names and values against Hydra's grammar and the configuration schema.

    The caller passes the functions, because the folder `container` does not import Hydra.
    """

    is_known: Callable[[str], bool]  # whether a name is the key of a setting or of a config group
    keys: tuple[str, ...]  # known keys, to suggest one for a misspelt name
    is_single_value: Callable[[str], bool]  # whether an override is valid and is not a sweep


def build_request(
    hyperparameters: Mapping[str, str], channels: Mapping[str, Path], hardware: str | None, paths: SageMakerPaths,
    grammar: OverrideGrammar,
) -> RunRequest:
    """Translate hyperparameters and channels to the overrides of one run.

    Args:
        channels: folder of each channel, by channel name.
        hardware: option of the config group `hardware` for this machine; None if no option describes the machine.

    Raises:
        ConfigError: a name is unknown or a value is not valid. The error lists all problems.
    """
    user_hyperparameters = {name: raw for name, raw in hyperparameters.items() if not name.startswith(SDK_PREFIXES)}
    problems = [*_check_names(user_hyperparameters, grammar), *_check_channels(channels)]
    try:
        blog = blog_hyperparameters.parse(user_hyperparameters, paths)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    explicit = {name.lstrip("+"): _to_override_value(name, raw, grammar) for name, raw in user_hyperparameters.items()
                if name not in blog_hyperparameters.NAMES}
    request = RunRequest(notices=blog.notices, save_by_epochs=blog.save_by_epochs, upload_uri=blog.upload_uri)
    inputs, channel_names = _merge_inputs(blog, channels, request)
    superseded = _find_superseded(blog, channel_names, explicit, request)
    if request.save_by_epochs and "checkpoint.every" in explicit:
        request.save_by_epochs = False
        request.notices.append("save_use_epochs is ignored: checkpoint.every decides instead")
    inputs = {key: path for key, path in inputs.items() if key not in superseded}
    if "dataset.class_dir" in inputs:
        _prepare_class_images(inputs, paths, request)
    request.overrides = _choose_hardware(explicit, bool(blog.names), hardware)
    if blog.names or "dataset.instance_dir" in inputs:
        request.overrides["dataset"] = "folder"
    implied = {key: hydra_string(path) for key, path in inputs.items()} | blog.overrides
    request.overrides |= {key: value for key, value in implied.items() if key not in superseded} | explicit
    return request


def _check_names(hyperparameters: Mapping[str, str], grammar: OverrideGrammar) -> list[str]:
    problems = []
    for name in hyperparameters:
        if name in blog_hyperparameters.NAMES or grammar.is_known(name.lstrip("+")):
            continue
        similar = closest(name, (*blog_hyperparameters.NAMES, *grammar.keys), 1)
        hint = f"did you mean {similar[0]}?" if similar else "give an override, such as train.max_train_steps"
        problems.append(f"hyperparameter {name} is not known: {hint}")
    return problems


def _check_channels(channels: Mapping[str, Path]) -> list[str]:
    unknown = [f"channel {name} is not known: name it images, class_images or base_model"
               for name in channels if name not in CHANNEL_KEYS and name not in SDK_CHANNELS]
    duplicates = [f"channels {' and '.join(names)} both set {key}: send one of them"
                  for key in sorted({*CHANNEL_KEYS.values()})
                  if len(names := [name for name in channels if CHANNEL_KEYS.get(name) == key]) > 1]
    return unknown + duplicates


def _to_override_value(name: str, raw: str, grammar: OverrideGrammar) -> str:
    """Return the value of a hyperparameter in Hydra's grammar.

    A value that Hydra cannot parse, or would parse as a sweep, is quoted.
    """
    value = hyperparameter_values.decode_json(raw)
    if isinstance(value, str):
        raw = value
    return raw if grammar.is_single_value(f"{name}={raw}") else hydra_string(raw)


def _merge_inputs(
    blog: BlogSettings, channels: Mapping[str, Path], request: RunRequest
) -> tuple[dict[str, str], dict[str, str]]:
    """Merge the inputs (photos, class images, base model) that blog hyperparameters and channels set.

    If both set the same input, the channel takes precedence.

    Returns:
        Two dictionaries whose keys are configuration keys. The first contains the folder or hub id of each input. The
        second contains only the inputs that a channel sets; its values name the channel for a message, such as
        "the channel images".
    """
    inputs, channel_names = dict(blog.paths), {}
    for name, folder in channels.items():
        if key := CHANNEL_KEYS.get(name):
            if inputs.get(key, str(folder)).rstrip("/") != str(folder):
                request.notices.append(f"{blog.names[key]} is ignored: the channel {name} decides instead")
            inputs[key] = str(model_folder(folder) if key == "model.source" else folder)
            channel_names[key] = f"the channel {name}"
    return inputs, channel_names


def _find_superseded(
    blog: BlogSettings, channel_names: Mapping[str, str], explicit: Mapping[str, str], request: RunRequest
) -> set[str]:
    """Return the configuration keys for which the value from a blog hyperparameter or a channel is ignored.

    The value is ignored because an override decides the key. Add a notice to `request` for each of these keys.
    """
    sources = {**blog.names, **channel_names}
    deciders = {key: group for group, keys in SUPERSEDED.items() if group in explicit
                for key in keys if key not in channel_names}
    if explicit.get("hardware") == "cpu":
        deciders |= {key: "hardware" for key, options in CUDA_ONLY.items() if blog.overrides.get(key) in options}
    if explicit.get("dataset", "folder") != "folder":  # the other options of `dataset` define their own photos
        deciders |= {key: "dataset" for key in (*blog.paths, *channel_names) if key.startswith("dataset.")}
    deciders |= {key: key for key in explicit}
    superseded = {key: decider for key, decider in deciders.items() if key in sources}
    for key, decider in superseded.items():
        request.notices.append(f"{sources[key]} is ignored: {decider}={explicit[decider]} decides instead")
    return set(superseded)


def _prepare_class_images(inputs: dict[str, str], paths: SageMakerPaths, request: RunRequest) -> None:
    """Prepare the folder of class images for the run. Its path is `inputs["dataset.class_dir"]`.

    - If the folder has no images, remove the key from `inputs`. Such a folder is allowed, because the notebook of the
      AWS blog post writes generated class images to the same folder.
    - If the folder is below the job's input, copy it to the checkpoints folder, and set the path to the copy. The
      reason is that the job's input is read-only and may be streamed.
    - If the folder is in S3, change nothing: the run itself downloads it.

    Raises:
        UserError: the path is not a folder, or cannot be read.
    """
    if is_remote(inputs["dataset.class_dir"]):
        return
    folder = Path(inputs["dataset.class_dir"])
    try:
        count = len(list_photos(folder))
    except UserError as error:
        if error.__cause__ or folder.is_file():
            raise
        del inputs["dataset.class_dir"]
        request.notices.append(f"{folder} holds no class images: the run generates all of them and keeps them beside "
                               "the checkpoints")
        return
    if folder.is_relative_to(paths.data):
        copy = paths.checkpoints / "given_class_images"
        with write_folder(copy) as temporary:
            shutil.copytree(folder, temporary, copy_function=shutil.copyfile, dirs_exist_ok=True)
        inputs["dataset.class_dir"] = str(copy)
        request.notices.append(f"using {counted(count, 'class image')} from {copy}, a copy of {folder}")


def _choose_hardware(explicit: Mapping[str, str], from_blog: bool, hardware: str | None) -> dict[str, str]:
    if explicit.keys() & {"hardware", "experiment"}:
        return {}
    option = hardware or (BLOG_HARDWARE if from_blog else None)
    return {"hardware": option} if option else {}
