"""The folders and configuration files of SageMaker's training contract, below /opt/ml or SAGEMAKER_BASE_DIR."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError

DEFAULT_BASE = "/opt/ml"


@dataclass(frozen=True)
class SageMakerPaths:
    """The folders of a training job, all below one base folder."""

    base: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "SageMakerPaths":
        return cls(Path(environment.get("SAGEMAKER_BASE_DIR") or DEFAULT_BASE).absolute())

    @property
    def data(self) -> Path:
        """Input data, one folder per channel; read-only."""
        return self.base / "input/data"

    @property
    def model(self) -> Path:
        """SageMaker uploads this folder when the job has finished."""
        return self.base / "model"

    @property
    def checkpoints(self) -> Path:
        """SageMaker keeps this folder in sync with S3 and restores it when a spot instance is replaced.

        Run folders are therefore created here.
        """
        return self.base / "checkpoints"

    @property
    def cache(self) -> Path:
        """Downloads from s3://. Not below `checkpoints`: SageMaker would upload and restore them as well."""
        folder = self.base / "cache"
        writable = os.access(folder if folder.exists() else self.base, os.W_OK)
        return folder if writable else Path(tempfile.gettempdir()) / "dreambooth-s3"

    @property
    def failure(self) -> Path:
        """File with the reason of a failure; SageMaker shows its first 1024 characters."""
        return self.base / "output/failure"

    def check_writable(self) -> None:
        """Check that the output folders can be written; create them if they are missing.

        Raises:
            UserError: one cannot be created or written.
        """
        for folder in (self.model, self.checkpoints):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                writable = os.access(folder, os.W_OK)
            except OSError:
                writable = False
            if not writable:
                raise UserError(f"{folder} cannot be written by user {os.getuid()}: mount a folder that this user "
                                f"owns, such as docker run -v ./out:{self.base}")

    def relocate(self, path: str) -> str:
        """Move a path below /opt/ml to the base folder; return any other path unchanged."""
        inside = Path(path).is_absolute() and Path(path).is_relative_to(DEFAULT_BASE)
        return str(self.base / Path(path).relative_to(DEFAULT_BASE)) if inside else path

    def read_config(self, name: str) -> dict[str, Any]:
        """Read a JSON file of input/config; empty if it does not exist, as on a laptop.

        Raises:
            UserError: the file does not hold a JSON object.
        """
        path = self.base / "input/config" / name
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): give a JSON object") from error
        if not isinstance(config, dict):
            raise UserError(f"{path} is not a JSON object: give names and values, such as {{\"hardware\": \"cpu\"}}")
        return config

    def channels(self) -> dict[str, Path]:
        """Folder of each channel by its name: those of inputdataconfig.json, else every folder in input/data.

        Raises:
            UserError: a channel has the input mode Pipe, which streams and has no files.
        """
        config = self.read_config("inputdataconfig.json")
        for name, settings in config.items():
            if isinstance(settings, dict) and settings.get("TrainingInputMode") == "Pipe":
                raise UserError(f"channel {name} has the input mode Pipe: give it File, or FastFile")
        folders = [entry.name for entry in self.data.iterdir() if entry.is_dir()] if self.data.is_dir() else []
        return {name: self.data / name for name in sorted(config or folders)}
