"""Where SageMaker puts things and takes them from; all of it below one folder, which SAGEMAKER_BASE_DIR may move."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError

BASE = "/opt/ml"


@dataclass(frozen=True)
class Places:
    """The folders of a job."""

    base: Path

    @classmethod
    def found(cls, environment: Mapping[str, str] = os.environ) -> "Places":
        return cls(Path(environment.get("SAGEMAKER_BASE_DIR") or BASE).absolute())

    @property
    def data(self) -> Path:
        """A folder a channel; read-only."""
        return self.base / "input/data"

    @property
    def model(self) -> Path:
        """What is kept of a finished job."""
        return self.base / "model"

    @property
    def checkpoints(self) -> Path:
        """Sent to S3 all the time, and there again when a spot instance is replaced: whole runs live here."""
        return self.base / "checkpoints"

    @property
    def cache(self) -> Path:
        """What is read from s3://. Not with the checkpoints: that is sent to S3 again, and fetched at every start."""
        folder = self.base / "cache"
        writable = os.access(folder if folder.exists() else self.base, os.W_OK)
        return folder if writable else Path(tempfile.gettempdir()) / "dreambooth-s3"

    @property
    def failure(self) -> Path:
        """Why the job failed; SageMaker shows the first 1024 characters."""
        return self.base / "output/failure"

    def check(self) -> None:
        """Make sure that what comes out can be written.

        Raises:
            UserError: it cannot.
        """
        for folder in (self.model, self.checkpoints):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                writable = os.access(folder, os.W_OK)
            except OSError:
                writable = False
            if not writable:
                raise UserError(f"{folder} cannot be written by user {os.getuid()}: give a folder that it owns, "
                                f"such as docker run -v ./out:{self.base}")

    def meant(self, path: str) -> str:
        """A path below /opt/ml is meant below the base folder."""
        inside = Path(path).is_absolute() and Path(path).is_relative_to(BASE)
        return str(self.base / Path(path).relative_to(BASE)) if inside else path

    def config(self, name: str) -> dict[str, Any]:
        """A JSON file of input/config; empty where there is none, as on a laptop.

        Raises:
            UserError: it is not a JSON object.
        """
        path = self.base / "input/config" / name
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): give a JSON object") from error
        if not isinstance(found, dict):
            raise UserError(f"{path} holds no JSON object: give names and values, such as {{\"hardware\": \"cpu\"}}")
        return found

    def channels(self) -> dict[str, Path]:
        """Name -> folder of the data that came along: as inputdataconfig.json has it, else the folders that are there.

        Raises:
            UserError: a channel streams, which photos cannot.
        """
        told = self.config("inputdataconfig.json")
        for name, settings in told.items():
            if isinstance(settings, dict) and settings.get("TrainingInputMode") == "Pipe":
                raise UserError(f"channel {name} has the input mode Pipe: give it File, or FastFile")
        there = [entry.name for entry in self.data.iterdir() if entry.is_dir()] if self.data.is_dir() else []
        return {name: self.data / name for name in sorted(told or there)}
