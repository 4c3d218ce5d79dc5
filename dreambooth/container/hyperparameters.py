"""Hyperparameters, channels and the machine -> the overrides of one run.

Later beats earlier: what the machine and the channels say, the blog's names, overrides. An override may make one of the
blog's names idle; that is told, never silent.
"""

import difflib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dreambooth.config.storage import is_remote
from dreambooth.container import blog_hyperparameters, hyperparameter_values
from dreambooth.container.sagemaker_paths import Places
from dreambooth.data.photos import list_photos
from dreambooth.errors import ConfigError, UserError
from dreambooth.storage.run_inputs import model_in
from dreambooth.utils.atomic_files import whole_folder

CHANNELS = {  # of the job -> the key that its folder becomes
    "images": "dataset.instance_dir", "training": "dataset.instance_dir", "train": "dataset.instance_dir",
    "class_images": "dataset.class_dir", "base_model": "model.source", "model": "model.source",
}
OTHERS = ("code", "sm_drivers")  # channels in which the SageMaker SDK sends files of its own
SDK = ("sagemaker_", "_tuning_")  # hyperparameters that it adds for containers of its own start like this
IDLE = {"model": ("model.source", "model.resolution")}  # an override -> what of the blog's it decides instead
CUDA_ONLY = {"precision": ("fp16",), "attention": ("xformers",)}  # what hardware=cpu cannot do
BLOG_HARDWARE = "g4dn"


@dataclass
class Request:
    """One run, as it was asked for."""

    overrides: dict[str, str] = field(default_factory=dict)  # key -> value in Hydra's grammar, in this order
    notices: list[str] = field(default_factory=list)
    epochs: bool = False  # checkpoint.every counts passes over the photos
    upload: str | None = None  # an S3 folder for a copy of the model

    def words(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.overrides.items()]


@dataclass(frozen=True)
class Grammar:
    """What the door knows of the configuration."""

    known: Callable[[str], bool]  # is this the key of a setting or group?
    keys: tuple[str, ...]  # to suggest one
    plain: Callable[[str], bool]  # does Hydra read this override, as one value?


def understand(
    hyperparameters: Mapping[str, str], channels: Mapping[str, Path], hardware: str | None, places: Places,
    grammar: Grammar,
) -> Request:
    """The run that is asked for.

    Args:
        hardware: the option for this machine; None: not one that is known.

    Raises:
        ConfigError: names are unknown or values are not what their names ask for; all of them together.
    """
    theirs = {name: raw for name, raw in hyperparameters.items() if not name.startswith(SDK)}
    problems = [*_unknown_names(theirs, grammar), *_wrong_channels(channels)]
    try:
        blog = blog_hyperparameters.read(theirs, places)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    explicit = {name.lstrip("+"): _value(name, raw, grammar) for name, raw in theirs.items()
                if name not in blog_hyperparameters.NAMES}
    request = Request(notices=blog.notices, epochs=blog.epochs, upload=blog.upload)
    paths, sent = _paths(blog, channels, request)
    idle = _idle(blog, sent, explicit, request)
    if request.epochs and "checkpoint.every" in explicit:
        request.epochs = False
        request.notices.append("save_use_epochs is not used: checkpoint.every decides that")
    paths = {key: path for key, path in paths.items() if key not in idle}
    if "dataset.class_dir" in paths:
        _settle_class_images(paths, places, request)
    request.overrides = _of_machine(explicit, bool(blog.names), hardware)
    if blog.names or "dataset.instance_dir" in paths:
        request.overrides["dataset"] = "folder"
    wanted = {key: hyperparameter_values.quoted(path) for key, path in paths.items()} | blog.overrides
    request.overrides |= {key: value for key, value in wanted.items() if key not in idle} | explicit
    return request


def _unknown_names(hyperparameters: Mapping[str, str], grammar: Grammar) -> list[str]:
    problems = []
    for name in hyperparameters:
        if name in blog_hyperparameters.NAMES or grammar.known(name.lstrip("+")):
            continue
        near = difflib.get_close_matches(name, (*blog_hyperparameters.NAMES, *grammar.keys), n=1)
        hint = f"did you mean {near[0]}?" if near else "give an override, such as train.max_train_steps"
        problems.append(f"hyperparameter {name} is not known: {hint}")
    return problems


def _wrong_channels(channels: Mapping[str, Path]) -> list[str]:
    unknown = [f"channel {name} is not known: name it images, class_images or base_model"
               for name in channels if name not in CHANNELS and name not in OTHERS]
    twice = [f"channels {' and '.join(names)} are both {key}: send one of them" for key in sorted({*CHANNELS.values()})
             if len(names := [name for name in channels if CHANNELS.get(name) == key]) > 1]
    return unknown + twice


def _value(name: str, raw: str, grammar: Grammar) -> str:
    """A value as Hydra's grammar has it; what that grammar would not read, or as several values, is a plain text."""
    found = hyperparameter_values.decoded(raw)
    if isinstance(found, str):
        raw = found
    return raw if grammar.plain(f"{name}={raw}") else hyperparameter_values.quoted(raw)


def _of_machine(explicit: Mapping[str, str], blog: bool, hardware: str | None) -> dict[str, str]:
    if explicit.keys() & {"hardware", "experiment"}:
        return {}
    chosen = hardware or (BLOG_HARDWARE if blog else None)
    return {"hardware": chosen} if chosen else {}


def _paths(
    blog: blog_hyperparameters.Blog, channels: Mapping[str, Path], request: Request
) -> tuple[dict[str, str], dict[str, str]]:
    """Paths and hub ids by their keys, and which of those a channel sent: it beats one of the blog's names."""
    paths, sent = dict(blog.paths), {}
    for name, folder in channels.items():
        if key := CHANNELS.get(name):
            if paths.get(key, str(folder)).rstrip("/") != str(folder):
                request.notices.append(f"{blog.names[key]} is not used: the channel {name} decides that")
            paths[key], sent[key] = str(model_in(folder) if key == "model.source" else folder), f"the channel {name}"
    return paths, sent


def _idle(
    blog: blog_hyperparameters.Blog, sent: Mapping[str, str], explicit: Mapping[str, str], request: Request
) -> set[str]:
    """The keys that the blog's names or channels ask for in vain, since an override decides that, or more."""
    names = {**blog.names, **sent}
    deciding = {key: group for group, keys in IDLE.items() if group in explicit for key in keys if key not in sent}
    if explicit.get("hardware") == "cpu":
        deciding |= {key: "hardware" for key, options in CUDA_ONLY.items() if blog.overrides.get(key) in options}
    if explicit.get("dataset", "folder") != "folder":  # it brings photos of its own
        deciding |= {key: "dataset" for key in (*blog.paths, *sent) if key.startswith("dataset.")}
    deciding |= {key: key for key in explicit}
    idle = {key: decider for key, decider in deciding.items() if key in names}
    for key, decider in idle.items():
        request.notices.append(f"{names[key]} is not used: {decider}={explicit[decider]} decides that")
    return set(idle)


def _settle_class_images(paths: dict[str, str], places: Places, request: Request) -> None:
    """The blog's folder is where class images are kept, and may hold none yet. What lies under the job's input is
    read-only, perhaps a stream: a copy is used. What lies in S3 is fetched as any folder there.

    Raises:
        UserError: something is there that is no folder, or cannot be read.
    """
    if is_remote(paths["dataset.class_dir"]):
        return
    folder = Path(paths["dataset.class_dir"])
    try:
        count = len(list_photos(folder))
    except UserError as error:
        if error.__cause__ or folder.is_file():
            raise
        del paths["dataset.class_dir"]
        request.notices.append(f"{folder} holds no class image: all are made, and kept beside the checkpoints")
        return
    if folder.is_relative_to(places.data):
        copy = places.checkpoints / "given_class_images"
        with whole_folder(copy) as aside:
            shutil.copytree(folder, aside, copy_function=shutil.copyfile, dirs_exist_ok=True)
        paths["dataset.class_dir"] = str(copy)
        request.notices.append(f"{count} class images are used from {copy}, a copy of {folder}")
