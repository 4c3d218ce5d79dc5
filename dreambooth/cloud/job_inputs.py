"""Inputs of SageMaker jobs: checks that S3 paths exist, and uploads the local folders that jobs read.

A job reads a folder through one of SageMaker's input channels, which make the folder available in the container.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path

from dreambooth.cloud.training_job_request import CHANNELS
from dreambooth.config.schema import Config
from dreambooth.config.storage import S3_SCHEME, is_remote, is_single_file
from dreambooth.storage import folders, run_inputs
from dreambooth.storage.folders import RemoteContent
from dreambooth.utils.assets import ASSET_SCHEME
from dreambooth.utils.console import Console
from dreambooth.utils.quoting import shell_word

HUB_KEYS = ("model.source", "model.vae")  # keys whose value is a hub id or a path
FILE_KEYS = ("evaluate.prompts", "evaluate.lpips")  # keys whose value may be a file
KEYWORDS = {"mask": ("alpha",), "resume": ("auto", "never")}  # last part of a key -> values that are not paths


class Inputs:
    """The inputs of all jobs of a sweep. Each local folder is hashed once, and each S3 path is inspected once."""

    def __init__(self, mode: str) -> None:
        self._jobs_are_local = mode == "docker"  # containers on this machine read local folders directly
        self._digests: dict[str, str] = {}  # local folder or S3 path -> digest of its content
        self._job_paths: dict[str, str] = {}  # local folder -> path or address from which jobs read it
        self._remote_contents: dict[str, RemoteContent | None] = {}

    def find_problems(self, run: Config) -> Iterator[str]:
        """Yield one sentence for each S3 path of a run where nothing is stored, or a required manifest is missing."""
        for key, uri, needs_manifest in _input_paths(run):
            if not is_remote(uri):
                continue
            if uri not in self._remote_contents:
                self._remote_contents[uri] = folders.inspect(uri)
            content = self._remote_contents[uri]
            is_file = is_single_file(uri) or key in FILE_KEYS
            if content is None or (not content.is_folder and not is_file):
                yield f"there is nothing in {uri}: type {key}=s3://BUCKET/{'FILE' if is_file else 'FOLDER'}"
            elif needs_manifest and not content.is_complete and not is_file:
                yield (f"{uri} is half uploaded, or was not uploaded by dreambooth: type python -m dreambooth.storage "
                       f"upload FOLDER {shell_word(uri)}")
            else:
                self._digests[uri] = content.digest

    def channels(self, run: Config, s3: str) -> dict[str, str]:
        """Return the local or S3 folder that a job reads through each channel, by name of the channel.

        Args:
            s3: hydra.launcher.s3, the S3 folder to which `upload` copies local folders.
        """
        return {CHANNELS[key]: path if is_remote(path) else self._job_path(path, s3)
                for key, path in _channel_folders(run).items()}

    def contents(self, run: Config) -> dict[str, str]:
        """Return a digest of the content of each input folder or file of a run, by config key.

        The digest does not depend on the path.
        """
        for path in _channel_folders(run).values():
            self._digest(path)
        return {key: self._digests[path] for key, path, _ in _input_paths(run) if path in self._digests}

    def upload(self) -> None:
        """Upload the local folders that are not in S3 yet."""
        for folder, path in self._job_paths.items():
            if is_remote(path):
                folders.upload(Path(folder), path, Console())

    def _job_path(self, folder: str, s3: str) -> str:
        if folder not in self._job_paths:
            path = Path(folder).absolute()
            self._job_paths[folder] = str(path) if self._jobs_are_local else (
                f"{s3.rstrip('/')}/inputs/{path.name}-{self._digest(folder)}")
        return self._job_paths[folder]

    def _digest(self, path: str) -> str:
        if path not in self._digests:
            self._digests[path] = folders.digest(Path(path))
        return self._digests[path]


def find_local_paths(run: Config) -> Iterator[str]:
    """Yield one sentence for each path that a job cannot read.

    A job cannot read a local path that has no input channel. It cannot read the encoders DINO and CLIP from any path,
    because it downloads them from the hub.
    """
    replaced = _channel_folders(run)
    for key, path, _ in _input_paths(run):
        if not is_portable(path) and key not in replaced and _is_local_path(key, path):
            kind = "file" if Path(path).is_file() or is_single_file(path) else "folder"
            yield f"{key}={path} is a {kind} on this machine: type {key}=s3://BUCKET/{kind.upper()}"
    for encoder in sorted({"dino", "clip"} & {*run.evaluate.encoders}):
        path = getattr(run.evaluate, encoder)
        if is_remote(path) or Path(path).exists():
            yield f"a job cannot read evaluate.{encoder}={path}: type evaluate.{encoder}=HUB_ID"


def without_s3_paths(run: Config) -> Config:
    """Return a copy of a configuration whose rules can be checked without downloads.

    In the copy, default values replace the S3 paths of the groups checkpoint and evaluate.
    """
    run = deepcopy(run)
    for section in (run.checkpoint, run.evaluate):
        for key, default in vars(type(section)()).items():
            if isinstance(path := getattr(section, key), str) and is_remote(path):
                setattr(section, key, default)
    return run


def is_portable(path: str) -> bool:
    """Return whether a path has the same meaning on every machine: an S3 address, or a file of the package."""
    return path.startswith((S3_SCHEME, ASSET_SCHEME))


def _is_local_path(key: str, path: str) -> bool:
    if key in HUB_KEYS or key == "evaluate.prompts":  # otherwise a hub id, or the name of a list of prompts
        return Path(path).exists()
    return key not in CHANNELS and path not in KEYWORDS.get(key.rpartition(".")[2], ())


def _channel_folders(run: Config) -> Mapping[str, str]:
    """Return the local and S3 folders that a job reads through channels, by config key.

    An input that is a single file in S3 has no channel: the job gets the S3 address of the file.
    """
    return {key: path for key, path, _ in _input_paths(run)
            if key in CHANNELS and not path.startswith(ASSET_SCHEME) and (
                Path(path).is_dir() or (is_remote(path) and not is_single_file(path)))}


def _input_paths(run: Config) -> Iterator[tuple[str, str, bool]]:
    """Yield one triple per input of a run: its config key, its path, and whether the path must have a manifest."""
    for section_name, section, key, needs_manifest in run_inputs.possible_inputs(run):
        if path := getattr(section, key):
            yield f"{section_name}.{key}", str(path), needs_manifest
