"""The folders and configuration files that SageMaker provides for a job, below /opt/ml or SAGEMAKER_BASE_DIR."""

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
        """Read-only folder of the input data, with one subfolder per channel."""
        return self.base / "input/data"

    @property
    def model(self) -> Path:
        """Output folder that SageMaker uploads to S3 as the model when the job has finished."""
        return self.base / "model"

    @property
    def checkpoints(self) -> Path:
        """Folder that SageMaker keeps in sync with S3 and restores when a spot instance is replaced.

        Run folders are therefore created in this folder.
        """
        return self.base / "checkpoints"

    @property
    def cache(self) -> Path:
        """Folder for downloads from S3. It is outside `checkpoints`, so that SageMaker does not upload it."""
        folder = self.base / "cache"
        writable = os.access(folder if folder.exists() else self.base, os.W_OK)
        return folder if writable else Path(tempfile.gettempdir()) / "dreambooth-s3"

    @property
    def failure(self) -> Path:
        """File that contains the reason if the job fails. SageMaker shows the first 1024 characters."""
        return self.base / "output/failure"

    def check_writable(self) -> None:
        """Create the output folders `model` and `checkpoints` if they are missing, and check that both are writable.

        Raises:
            UserError: an output folder cannot be created or written.
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

    def check_outputs(self, outputs: Mapping[str, Path]) -> None:
        """Check that a run writes its files below `checkpoints`, where they survive a spot interruption.

        Args:
            outputs: path of each file or folder that the run writes, by the override that sets the path.

        Raises:
            UserError: a path is not below `checkpoints`. The message names the override.
        """
        root = self.checkpoints.resolve()
        for override, path in outputs.items():
            absolute = path.resolve()
            if not absolute.is_relative_to(root) or (absolute == root and override != "run_root"):
                raise UserError(f"{override} would make the job write to {absolute}, which is not below "
                                f"{self.checkpoints}, so that a spot interruption would lose it: leave {override} out")

    def relocate(self, path: str) -> str:
        """Replace the prefix /opt/ml of a path by the base folder. Return any other path unchanged."""
        inside = Path(path).is_absolute() and Path(path).is_relative_to(DEFAULT_BASE)
        return str(self.base / Path(path).relative_to(DEFAULT_BASE)) if inside else path

    def read_config(self, name: str) -> dict[str, Any]:
        """Read a JSON file from input/config. Return {} if the file does not exist, for example outside SageMaker.

        Raises:
            UserError: the file cannot be read or does not contain a JSON object.
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
        """Return the folder of each channel, by channel name.

        inputdataconfig.json lists the channels. If this file lists no channels, each folder in input/data is a channel.

        Raises:
            UserError: a channel has the input mode Pipe, which streams data instead of providing files.
        """
        config = self.read_config("inputdataconfig.json")
        for name, settings in config.items():
            if isinstance(settings, dict) and settings.get("TrainingInputMode") == "Pipe":
                raise UserError(f"channel {name} has the input mode Pipe: use the input mode File, or FastFile")
        folders = [entry.name for entry in self.data.iterdir() if entry.is_dir()] if self.data.is_dir() else []
        return {name: self.data / name for name in sorted(config or folders)}
