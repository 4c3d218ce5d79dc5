"""What jobs read: a folder of this machine is made complete in S3, a place in S3 is looked at before anybody pays."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path

from dreambooth.cloud.training_job_request import CHANNELS
from dreambooth.config.schema import Config
from dreambooth.config.storage import SCHEME, is_remote, is_single
from dreambooth.storage import folders, run_inputs
from dreambooth.storage.folders import Held
from dreambooth.utils.console import Console

HUB = ("model.source", "model.vae")  # a hub id, or a path
FILES = ("evaluate.prompts", "evaluate.lpips")
WORDS = {"mask": ("alpha",), "resume": ("auto", "never")}  # no paths


class Inputs:
    """Of all jobs of a sweep: each folder is read once, and each place in S3 looked at once."""

    def __init__(self, mode: str) -> None:
        self._here = mode == "docker"  # jobs find the folders of this machine where they are
        self._digests: dict[str, str] = {}  # folder of this machine, or place in S3 -> its content
        self._places: dict[str, str] = {}  # folder of this machine -> where jobs find it
        self._seen: dict[str, Held | None] = {}

    def problems(self, run: Config) -> Iterator[str]:
        """What is not in S3 as the run reads it."""
        for key, uri, complete in _read(run):
            if not is_remote(uri):
                continue
            if uri not in self._seen:
                self._seen[uri] = folders.held(uri)
            found = self._seen[uri]
            file = is_single(uri) or key in FILES
            if found is None or (not found.folder and not file):
                yield f"there is nothing in {uri}: type {key}=s3://BUCKET/{'FILE' if file else 'FOLDER'}"
            elif complete and not found.complete and not file:
                yield (f"{uri} is half uploaded, or was put there by something else: type python -m dreambooth.storage "
                       f"upload FOLDER {uri}")
            else:
                self._digests[uri] = found.digest

    def channels(self, run: Config, s3: str) -> dict[str, str]:
        """Channel -> the folder that it carries."""
        return {CHANNELS[key]: path if is_remote(path) else self._place(path, s3)
                for key, path in _carried(run).items()}

    def contents(self, run: Config) -> dict[str, str]:
        """Key -> what is behind it, whatever its path is called."""
        for path in _carried(run).values():
            self._digest(path)
        return {key: self._digests[path] for key, path, _ in _read(run) if path in self._digests}

    def upload(self) -> None:
        """Make the folders of this machine complete in S3."""
        for folder, place in self._places.items():
            if is_remote(place):
                folders.upload(Path(folder), place, Console())

    def _place(self, folder: str, s3: str) -> str:
        if folder not in self._places:
            path = Path(folder).absolute()
            self._places[folder] = str(path) if self._here else (
                f"{s3.rstrip('/')}/inputs/{path.name}-{self._digest(folder)}")
        return self._places[folder]

    def _digest(self, path: str) -> str:
        if path not in self._digests:
            self._digests[path] = folders.digest(Path(path))
        return self._digests[path]


def unsent(run: Config) -> Iterator[str]:
    """Paths of this machine that no channel carries: a job would look for them, at the price of its instance."""
    carried = _carried(run)
    for key, path, _ in _read(run):
        if not elsewhere(path) and key not in carried and _path_here(key, path):
            kind = "file" if Path(path).is_file() or is_single(path) else "folder"
            yield f"{key}={path} is a {kind} of this machine: type {key}=s3://BUCKET/{kind.upper()}"
    for encoder in sorted({"dino", "clip"} & {*run.evaluate.encoders}):
        path = getattr(run.evaluate, encoder)
        if is_remote(path) or Path(path).exists():
            yield f"evaluate.{encoder}={path} is nothing that a job can read: type evaluate.{encoder}=HUB_ID"


def without_s3(run: Config) -> Config:
    """A run as its rules may look at it here, where nothing of S3 is fetched."""
    run = deepcopy(run)
    for section in (run.checkpoint, run.evaluate):
        for key, value in vars(type(section)()).items():
            if isinstance(path := getattr(section, key), str) and is_remote(path):
                setattr(section, key, value)
    return run


def elsewhere(path: str) -> bool:
    """Whether a path means the same on every machine."""
    return path.startswith((SCHEME, "package:"))


def _path_here(key: str, path: str) -> bool:
    if key in HUB or key == "evaluate.prompts":  # else a hub id, the name of a list
        return Path(path).exists()
    return key not in CHANNELS and path not in WORDS.get(key.rpartition(".")[2], ())


def _carried(run: Config) -> Mapping[str, str]:
    """Key -> folder of this machine or of S3, of what a channel carries. One file goes by its address."""
    found = {}
    for key, path, _ in _read(run):
        if key in CHANNELS and not path.startswith("package:") and (
                Path(path).is_dir() or (is_remote(path) and not is_single(path))):
            found[key] = path
    return found


def _read(run: Config) -> Iterator[tuple[str, str, bool]]:
    """Key, path and whether it must have a manifest, of everything that a run reads."""
    for place, part, key, complete in run_inputs.wanted(run):
        if path := getattr(part, key):
            yield f"{place}.{key}", str(path), complete
