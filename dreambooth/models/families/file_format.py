"""The interface of single-file formats. A single file holds a whole model under key names that its publisher chose.

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
    """An open single file. `read` reads the tensor with the given key."""

    path: Path
    names: frozenset[str]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str]  # the metadata of a .safetensors file, or global_step of a .ckpt file


class Form(Enum):
    """How a tensor of a single file differs from the corresponding tensors of a diffusers folder."""

    plain = "plain"  # equal
    convolution = "convolution"  # weight of a linear layer in the folder, of a 1 x 1 convolution in the file
    stacked = "stacked"  # several tensors in the folder, concatenated along the first dimension in the file
    transposed = "transposed"  # a matrix, transposed
    swapped = "swapped"  # the first and the second half of the rows are swapped


@dataclass(frozen=True)
class Entry:
    """One tensor of a single file, and the corresponding tensors of a diffusers folder."""

    key: str  # the tensor's key in the file
    part: str  # name of the part: unet, vae, text_encoder, ...
    names: tuple[str, ...]  # keys of the corresponding tensors in the state dict of the part
    form: Form = Form.plain

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape of the tensor in the file, given the shapes of the corresponding tensors in the folder."""
        match self.form:
            case Form.plain | Form.swapped:
                return shapes[0]
            case Form.convolution:
                return (*shapes[0], 1, 1)
            case Form.stacked:
                return (sum(shape[0] for shape in shapes), *shapes[0][1:])
            case Form.transposed:
                return shapes[0][::-1]


class SingleFileFormat(ABC):
    """How a family's models are stored in one file: key names, metadata and marks.

    A mark is an empty tensor. Its presence states a property of the model, such as zero terminal SNR.
    """

    whole = True  # whether a file contains all parts of the model; False: the denoiser alone
    denoiser_key: str  # a key that every file of this format has
    vae_prefix: str  # prefix of the VAE's keys
    marks: frozenset[str]  # names of empty tensors whose presence carries information

    @abstractmethod
    def matches(self, names: frozenset[str]) -> bool:
        """Return whether a file with these keys is a model of the family."""

    def check(self, file: ModelFile) -> None:  # noqa: B027  most formats have nothing to refuse
        """Check that training supports the model in a file. `matches` has already accepted the keys of the file.

        Raises:
            UserError: training does not support the model.
        """

    def canonical_key(self, name: str) -> str:
        """Return the current form of a key. Older tools wrote some keys differently."""
        return name

    @abstractmethod
    def prediction_type(self, file: ModelFile) -> tuple[str, str]:
        """Return the prediction type in diffusers' notation, and the evidence for it, such as 'its metadata'."""

    def scheduler_changes(self, prediction_type: str) -> dict[str, Any]:
        """Return the entries of the scheduler's configuration that state a model's prediction type."""
        return {"prediction_type": prediction_type}

    @abstractmethod
    def resolution(self, file: ModelFile, prediction_type: str, typed: bool) -> tuple[int, str]:
        """Return the side of the model's pictures in pixels, and the evidence for it, such as 'its name'.

        This method is called if the metadata of the file contains no resolution.

        Args:
            typed: whether `prediction_type` comes from the user, not from the file.
        """

    @abstractmethod
    def is_zero_terminal_snr(self, file: ModelFile) -> bool:
        """Return whether the file is marked as a model with zero terminal SNR."""

    @abstractmethod
    def entries(self, part: str, names: Iterable[str], config: Any) -> Iterator[Entry]:
        """Yield the entries of one part of the model.

        Args:
            part: name of the part: unet, vae, text_encoder, ...
            names: keys of the part's state dict.
            config: the part's configuration (`module.config`).
        """

    @abstractmethod
    def is_ignored(self, key: str, encoders: Sequence[Any]) -> bool:
        """Return whether a tensor of a file is not needed.

        Such tensors are averaged weights, constants, and weights of layers that the model does not use.

        Args:
            key: the tensor's key in the file.
            encoders: the text encoders.
        """

    @abstractmethod
    def constants(self, encoders: Sequence[Any]) -> dict[str, Tensor]:
        """Return the tensors, by key, that single files of the family contain and diffusers folders do not."""

    @abstractmethod
    def marks_of(self, scheduler_config: Mapping[str, Any]) -> set[str]:
        """Return the marks that a file must contain if its model has this scheduler configuration.

        A mark is an empty tensor that states a property of the model; the elements are names of `marks`.

        Raises:
            UserError: this format cannot represent the model's prediction type.
        """

    @abstractmethod
    def modelspec(self, prediction_type: str) -> dict[str, str]:
        """Return the family's ModelSpec metadata: version, architecture, implementation, prediction type."""
