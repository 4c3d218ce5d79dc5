"""Single files that hold a diffusion transformer alone, in the key names of its publisher, as ComfyUI reads them.

The VAE and the text encoders have files of their own. Imports no torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreambooth.models.families.file_format import Entry, ModelFile, SingleFileFormat

if TYPE_CHECKING:
    from torch import Tensor


class TransformerFile(SingleFileFormat):
    """Base class: the file of a family of flow matching, which contains the transformer alone."""

    vae_prefix = "vae."
    marks: frozenset[str] = frozenset()
    architecture: str  # in ModelSpec metadata
    implementation: str  # in ModelSpec metadata: whose module names the keys contain
    required_keys: frozenset[str]  # keys that only files of this family have

    def matches(self, names: frozenset[str]) -> bool:
        return self.required_keys <= names

    def prediction_type(self, file: ModelFile) -> tuple[str, str]:
        return "flow_prediction", "the family"

    def resolution(self, file: ModelFile, prediction_type: str, typed: bool) -> tuple[int, str]:
        return 1024, "the family"

    def is_zero_terminal_snr(self, file: ModelFile) -> bool:
        return False

    def entries(self, part: str, names: Iterable[str], config: Any) -> Iterator[Entry]:
        """Yield the entries of the transformer. Other parts are not in the file and have no entries."""
        if part == "transformer":
            yield from self.transformer_entries(list(names), config)

    @abstractmethod
    def transformer_entries(self, names: Sequence[str], config: Any) -> Iterator[Entry]:
        """Yield the entries of the transformer, for the keys of its state dict."""

    def is_ignored(self, key: str, encoders: Sequence[Any]) -> bool:
        return False

    def constants(self, encoders: Sequence[Any]) -> dict[str, Tensor]:
        return {}

    def marks_of(self, scheduler_config: Mapping[str, Any]) -> set[str]:
        return set()

    def modelspec(self, prediction_type: str) -> dict[str, str]:
        return {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": self.architecture,
                "modelspec.implementation": self.implementation}
