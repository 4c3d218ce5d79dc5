"""Downloads the S3 inputs of a run before the run starts: everything that the run reads from s3://.

The name of a run folder depends on the S3 addresses of the inputs, not on their content. `remote.json` in the run
folder records hashes of the downloaded content, so that a run is not resumed after the content has changed.
"""

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from dreambooth.config.dataset import FOLDERS
from dreambooth.config.schema import Config
from dreambooth.config.storage import is_remote, is_single_file
from dreambooth.errors import UserError
from dreambooth.utils import atomic_files
from dreambooth.utils.console import Console

REMOTE_KEYS = {
    ("model", "source"): True, ("model", "vae"): False,
    ("checkpoint", "resume"): True, ("evaluate", "reference_dir"): False, ("evaluate", "prompts"): False,
    ("evaluate", "lpips"): False}  # value: whether the S3 folder must have a manifest
PHOTO_KEYS = ("instance_dir", "class_dir", "validation_dir")  # keys of folders whose photos are converted to sRGB
RECORD_FILE = "remote.json"


def is_main_process() -> bool:
    """Return whether this process has rank 0 in a distributed run, or is the only process."""
    return os.environ.get("RANK", "0") == "0"


def download_if_remote(path: str | None, cache: str = "runs/s3") -> str | None:
    """Return the path unchanged if it is local; otherwise download the S3 address and return the local path.

    An S3 folder must be complete, which means that it has a manifest. A single file needs no manifest.
    """
    if not is_remote(path):
        return path
    from dreambooth.storage import folders

    console = Console(quiet=not is_main_process())
    return str(folders.download(str(path), Path(cache), console, complete=not is_single_file(path)))


def possible_inputs(config: Config) -> list[tuple[str, Any, str, bool]]:
    """List the keys of a config that may name an S3 address.

    Returns:
        One tuple (section, owner, key, complete) per key. `section` is the part of an override before the key, such as
        "model" or "dataset.concepts.0". `owner` is the object with the attribute `key`. `complete` is True if the S3
        folder must have a manifest.
    """
    inputs: list[tuple[str, Any, str, bool]] = [
        (section, subject, key, False) for section, subject in config.dataset.keyed_subjects for key in FOLDERS]
    return inputs + [(section, getattr(config, section), key, complete)
                     for (section, key), complete in REMOTE_KEYS.items()]


def fetch_inputs(config: Config, run_dir: Path | None, photo_mark: Callable[[Path], str] = lambda folder: "") -> Config:
    """Download everything that a run reads from s3://.

    Args:
        run_dir: the run folder in which `remote.json` is written; None if no `remote.json` is to be written.
        photo_mark: takes a folder of photos, returns a text that differs if the same files give other pixels.

    Returns:
        A copy of the config in which local paths replace the S3 addresses.

    Raises:
        UserError: an input cannot be downloaded, or checkpoint.resume is auto and the content of an input differs from
            the hash in `remote.json`.
    """
    config = deepcopy(config)
    contents: dict[str, str] = {}
    for section, owner, key, complete in possible_inputs(config):
        if is_remote(uri := getattr(owner, key)):
            from dreambooth.storage import folders

            folder = folders.download(uri, Path(config.storage.cache).absolute(),
                                      Console(quiet=not is_main_process()), config.storage.parallel,
                                      complete=complete and not is_single_file(uri))
            # The name of a downloaded folder contains a content hash. A single file is inside a folder of this kind.
            named_by_content = folder.parent if section == "model" and folder.is_file() else folder
            mark = photo_mark(folder) if key in PHOTO_KEYS else ""
            contents[f"{section}.{key}={uri}"] = named_by_content.name + mark
            setattr(owner, key, str(model_folder(folder) if section == "model" else folder))
    if contents and run_dir:
        _record_contents(contents, run_dir, config.checkpoint.resume)
    return config


def model_folder(folder: Path) -> Path:
    """Return the subfolder `model`, where a run stores its result, or `folder` itself if there is no such subfolder."""
    inner = folder / "model"
    return inner if inner.is_dir() else folder


def _record_contents(contents: dict[str, str], run_dir: Path, resume: str) -> None:
    recorded = atomic_files.read_object(run_dir / RECORD_FILE) or {}
    for override, content in contents.items():
        if resume == "auto" and recorded.get(override, content) != content:
            raise UserError(f"{override} has other content than when {run_dir.name} started: type "
                            "checkpoint.resume=never to start over, or name=NAME for another run")
    if is_main_process() and run_dir.is_dir():
        atomic_files.write_json(run_dir / RECORD_FILE, contents)
