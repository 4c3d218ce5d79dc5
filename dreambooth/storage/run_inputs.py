"""The S3 inputs of a run: downloads everything that the run reads from s3:// before it starts.

The name of a run folder depends only on the S3 addresses, not on their content. `remote.json` in the run folder records
hashes of the downloaded content, so that a run is not resumed with other content.
"""

import json
import os
from contextlib import suppress
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
    ("evaluate", "lpips"): False}  # (section, key) -> whether the S3 folder must have a manifest
RECORD_FILE = "remote.json"


def is_main_process() -> bool:
    """Return whether this process is the first (rank 0) of the processes of a distributed run."""
    return os.environ.get("RANK", "0") == "0"


def download_if_remote(path: str | None, cache: str = "runs/s3") -> str | None:
    """Return a local path unchanged, or download an S3 address and return its local path.

    An S3 folder must be complete; a single file needs no manifest.
    """
    if not is_remote(path):
        return path
    from dreambooth.storage import folders

    console = Console(quiet=not is_main_process())
    return str(folders.download(str(path), Path(cache), console, complete=not is_single_file(path)))


def possible_inputs(config: Config) -> list[tuple[str, Any, str, bool]]:
    """List the keys of a config that may name an S3 address.

    Returns:
        For each key: its section as a user types it, the object that holds it, the key, and whether the S3 folder must
        have a manifest.
    """
    inputs: list[tuple[str, Any, str, bool]] = [
        (section, subject, key, False) for section, subject in config.dataset.keyed_subjects for key in FOLDERS]
    return inputs + [(section, getattr(config, section), key, complete)
                     for (section, key), complete in REMOTE_KEYS.items()]


def fetch_inputs(config: Config, run_dir: Path | None) -> Config:
    """Download everything that a run reads from s3://.

    Args:
        run_dir: the run folder in which to record the downloaded content; None: do not record it.

    Returns:
        A copy of the config with local folders in place of S3 addresses.

    Raises:
        UserError: an input cannot be downloaded, or differs from the one that this run folder started with.
    """
    config = deepcopy(config)
    contents: dict[str, str] = {}
    for section, owner, key, complete in possible_inputs(config):
        if is_remote(uri := getattr(owner, key)):
            from dreambooth.storage import folders

            folder = folders.download(uri, Path(config.storage.cache).absolute(),
                                      Console(quiet=not is_main_process()), config.storage.parallel,
                                      complete=complete and not is_single_file(uri))
            # The name of a downloaded folder has a hash of its content; a single file is inside such a folder.
            named_by_content = folder.parent if section == "model" and folder.is_file() else folder
            contents[f"{section}.{key}={uri}"] = named_by_content.name
            setattr(owner, key, str(model_folder(folder) if section == "model" else folder))
    if contents and run_dir:
        _record_contents(contents, run_dir, config.checkpoint.resume)
    return config


def model_folder(folder: Path) -> Path:
    """Return the model inside a run's result, or the folder itself if it is a model."""
    inner = folder / "model"
    return inner if inner.is_dir() else folder


def _record_contents(contents: dict[str, str], run_dir: Path, resume: str) -> None:
    recorded: dict[str, str] = {}
    with suppress(OSError, ValueError):
        recorded = json.loads((run_dir / RECORD_FILE).read_text(encoding="utf-8"))
    for override, content in contents.items():
        if resume == "auto" and recorded.get(override, content) != content:
            raise UserError(f"{override} has other content than when {run_dir.name} started: type "
                            "checkpoint.resume=never to start over, or name=NAME for another run")
    if is_main_process() and run_dir.is_dir():
        atomic_files.write_json(run_dir / RECORD_FILE, contents)
