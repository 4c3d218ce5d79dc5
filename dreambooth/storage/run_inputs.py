"""s3:// in a run: what it reads is fetched before, what it makes is copied there while it runs and after.

A run folder is named by the text s3://..., so `remote.json` in it remembers which content that was.
"""

import json
import os
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from dreambooth.config.dataset import FOLDERS
from dreambooth.config.schema import Config
from dreambooth.config.storage import is_remote, is_single
from dreambooth.errors import UserError
from dreambooth.utils import atomic_files
from dreambooth.utils.console import Console

READ = {("model", "source"): True, ("model", "vae"): False,
        ("checkpoint", "resume"): True, ("evaluate", "reference_dir"): False, ("evaluate", "prompts"): False,
        ("evaluate", "lpips"): False}  # key -> whether it must have a manifest
RECORD = "remote.json"


def first() -> bool:
    """Whether this is the first of the processes that train together."""
    return os.environ.get("RANK", "0") == "0"


def local(path: str | None, cache: str = "runs/s3") -> str | None:
    """The path itself, or the local copy of a complete folder in S3."""
    if not is_remote(path):
        return path
    from dreambooth.storage import folders

    return str(folders.download(str(path), Path(cache), Console(quiet=not first()), complete=not is_single(path)))


def wanted(config: Config) -> list[tuple[str, Any, str, bool]]:
    """What a run may read from S3: where the key is typed, what holds it, the key, whether it must have a manifest."""
    found: list[tuple[str, Any, str, bool]] = [
        (place, subject, key, False) for place, subject in config.dataset.places for key in FOLDERS]
    return found + [(section, getattr(config, section), key, complete) for (section, key), complete in READ.items()]


def fetched(config: Config, run_dir: Path | None) -> Config:
    """The config with local folders for everything that it reads from s3://.

    Args:
        run_dir: where to remember what that was; None: nowhere.

    Raises:
        UserError: it cannot be had, or is not what this run folder began with.
    """
    config = deepcopy(config)
    found: dict[str, str] = {}
    for section, part, key, complete in wanted(config):
        if is_remote(getattr(part, key)):
            from dreambooth.storage import folders

            folder = folders.download(getattr(part, key), Path(config.storage.cache).absolute(),
                                      Console(quiet=not first()), config.storage.parallel,
                                      complete=complete and not is_single(getattr(part, key)))
            named = folder.parent if section == "model" and folder.is_file() else folder  # by its content
            found[f"{section}.{key}={getattr(part, key)}"] = named.name
            setattr(part, key, str(model_in(folder) if section == "model" else folder))
    if found and run_dir:
        _remember(found, run_dir, config.checkpoint.resume)
    return config


def model_in(folder: Path) -> Path:
    """The model in a run's result, or the folder itself."""
    inner = folder / "model"
    return inner if inner.is_dir() else folder


def _remember(found: dict[str, str], run_dir: Path, resume: str) -> None:
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        known = json.loads((run_dir / RECORD).read_text(encoding="utf-8"))
    for what, content in found.items():
        if resume == "auto" and known.get(what, content) != content:
            raise UserError(f"{what} holds something else than when {run_dir.name} began: type checkpoint.resume=never "
                            "to start over, or name=NAME for a run of its own")
    if first() and run_dir.is_dir():
        atomic_files.write_json(run_dir / RECORD, found)
