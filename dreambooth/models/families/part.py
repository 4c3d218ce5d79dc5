"""The parts of a base model that have weights: how the classes of diffusers and transformers are loaded and built.

Imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Part(ABC):
    """A part of a base model that has weights: its name, its class, and how it is loaded or built."""

    name: str  # its subfolder, its argument of the pipeline, and the prefix of its weights in checkpoints
    module: str  # the Python module that defines the class
    class_name: str

    @property
    def type(self) -> Any:
        """The class of the part, imported on first use."""
        return getattr(import_module(self.module), self.class_name)

    @abstractmethod
    def load(self, source: str, dtype: torch.dtype | Literal["auto"], **options: Any) -> Any:
        """Load the part with its weights.

        Args:
            source: a diffusers folder or hub id.
            dtype: precision of the loaded weights; "auto", for text encoders only: that of the files.
            options: subfolder, revision, variant and local_files_only, as in from_pretrained.

        Raises:
            OSError, ValueError, SafetensorError: `source` does not contain the part, or its files are damaged.
        """

    @abstractmethod
    def configuration(self, source: str | Path, **options: Any) -> dict[str, Any]:
        """Read the part's configuration (config.json).

        Raises:
            OSError, ValueError: `source` contains no configuration of the part.
        """

    @abstractmethod
    def build(self, configuration: Mapping[str, Any]) -> Any:
        """Build the part from a configuration alone, with random weights."""


class DiffusersPart(Part):
    """A part whose class belongs to diffusers."""

    def load(self, source: str, dtype: torch.dtype | Literal["auto"], **options: Any) -> Any:
        return self.type.from_pretrained(source, torch_dtype=dtype, **options)

    def configuration(self, source: str | Path, **options: Any) -> dict[str, Any]:
        return dict(self.type.load_config(source, **options))

    def build(self, configuration: Mapping[str, Any]) -> Any:
        return self.type.from_config(configuration)


class TransformersPart(Part):
    """A part whose class belongs to transformers."""

    def load(self, source: str, dtype: torch.dtype | Literal["auto"], **options: Any) -> Any:
        return self.type.from_pretrained(source, dtype=dtype, **options)

    def configuration(self, source: str | Path, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.type.config_class.from_pretrained(source, **options).to_dict()
        return found

    def build(self, configuration: Mapping[str, Any]) -> Any:
        return self.type(self.type.config_class(**configuration))
