"""The interface of a family's single files: one file that holds a whole model under its publisher's own key names.

Imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelFile:
    """An open single file; a tensor is read when `read` is called."""

    path: Path
    names: frozenset[str]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str]  # of a .safetensors; of a .ckpt its global_step


class Form(Enum):
    """How a tensor in a file differs from the same tensor in a diffusers folder."""

    plain = "plain"  # equal
    convolution = "convolution"  # a linear layer in the folder, a 1 x 1 convolution in the file
    stacked = "stacked"  # several tensors in the folder, concatenated along the first dimension in the file
    transposed = "transposed"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, and the tensors of a diffusers folder that it corresponds to."""

    key: str  # in the file
    part: str  # name of the part: unet, vae, text_encoder, ...
    names: tuple[str, ...]  # in the state dict of that part
    form: Form = Form.plain

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape in the file, given the shapes of `names`."""
        match self.form:
            case Form.plain:
                return shapes[0]
            case Form.convolution:
                return (*shapes[0], 1, 1)
            case Form.stacked:
                return (sum(shape[0] for shape in shapes), *shapes[0][1:])
            case Form.transposed:
                return shapes[0][::-1]


class SingleFileFormat(ABC):
    """How a family's models are stored in one file: key names, marks and metadata."""

    denoiser_key: str  # a key that every file of this format has
    vae_prefix: str  # how the keys of the VAE begin
    marks: frozenset[str]  # names of empty tensors that only say something

    @abstractmethod
    def matches(self, names: frozenset[str]) -> bool:
        """Whether a file with these keys is a model of the family."""

    def check(self, file: ModelFile) -> None:  # noqa: B027  most formats have nothing to refuse
        """Refuse a file that has the keys of the family and cannot be trained as one of its models.

        Raises:
            UserError: it is such a file.
        """

    def canonical_key(self, name: str) -> str:
        """Return a key as the format writes it now; older tools wrote some keys differently."""
        return name

    @abstractmethod
    def prediction_type(self, file: ModelFile) -> tuple[str, str]:
        """Return what the model predicts (a prediction_type of diffusers) and what that was concluded from."""

    @abstractmethod
    def resolution(self, file: ModelFile, prediction_type: str, typed: bool) -> tuple[int, str]:
        """Return the pixels of a side and what that was concluded from, for a file whose metadata does not say.

        Args:
            typed: whether the user has typed `prediction_type`.
        """

    @abstractmethod
    def is_zero_terminal_snr(self, file: ModelFile) -> bool:
        """Whether the file is marked as one with zero terminal SNR."""

    @abstractmethod
    def entries(self, part: str, names: Iterable[str], config: Any) -> Iterator[Entry]:
        """Yield the entries of one part.

        Args:
            names: keys of its state dict.
            config: its configuration (`module.config`).
        """

    @abstractmethod
    def is_ignored(self, key: str, encoders: Sequence[Any]) -> bool:
        """Whether a key of a file is not needed: averages, constants, layers that nothing is computed from."""

    @abstractmethod
    def constants(self, encoders: Sequence[Any]) -> dict[str, Tensor]:
        """Return tensors that files of the family hold and folders do not."""

    @abstractmethod
    def marks_of(self, scheduler_config: Mapping[str, Any]) -> set[str]:
        """Return the marks of a model with this scheduler.

        Raises:
            UserError: no file of this format can say what the model predicts.
        """

    @abstractmethod
    def modelspec(self, prediction_type: str) -> dict[str, str]:
        """Return the family's metadata by the ModelSpec standard: architecture, implementation, prediction type."""
