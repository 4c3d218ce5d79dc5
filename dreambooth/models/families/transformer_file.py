"""Single files that hold a diffusion transformer alone, in the key names of its publisher, as ComfyUI reads them.

The VAE and the text encoders have files of their own. Some files contain them, too, and are read without them. Imports
no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreambooth.models.families.file_format import Entry, Form, ModelFile, SingleFileFormat

if TYPE_CHECKING:
    from torch import Tensor


PREFIXES = "model.diffusion_model.", "diffusion_model."  # of the transformer's keys
OTHER_PARTS = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.")  # prefixes of keys


class TransformerFile(SingleFileFormat):
    """Base class: the file of a family of flow matching, which contains the transformer alone."""

    whole = False
    vae_prefix = "vae."
    marks: frozenset[str] = frozenset()
    architecture: str  # in ModelSpec metadata
    implementation: str  # in ModelSpec metadata: whose module names the keys contain
    required_keys: frozenset[str]  # keys that only files of this family have, without a prefix
    top_names: frozenset[str]  # the first component of every key without a prefix
    key_prefix = ""  # of all keys in files that this project writes
    stacks: Mapping[str, str]  # name of a query layer, with a dot -> key of the matrix of query, key and value
    rules: tuple[tuple[str, str], ...]  # (pattern of a name, its key): the first pattern that matches a name decides
    swapped: tuple[str, ...] = ()  # patterns of the names whose first and second half are swapped in the file

    def matches(self, names: frozenset[str]) -> bool:
        return self.required_keys <= names

    def canonical_key(self, name: str) -> str:
        """Return the key without the prefix that some files have."""
        for prefix in PREFIXES:
            bare = name.removeprefix(prefix)
            if bare != name and bare.partition(".")[0] in self.top_names:
                return bare
        return name

    def prediction_type(self, file: ModelFile) -> tuple[str, str]:
        return "flow_prediction", "the family"

    def scheduler_changes(self, prediction_type: str) -> dict[str, Any]:
        return {}

    def resolution(self, file: ModelFile, prediction_type: str, typed: bool) -> tuple[int, str]:
        return 1024, "the family"

    def is_zero_terminal_snr(self, file: ModelFile) -> bool:
        return False

    def entries(self, part: str, names: Iterable[str], config: Any) -> Iterator[Entry]:
        """Yield the entries of the transformer. Other parts are not in the file and have no entries."""
        if part != "transformer":
            return
        for name in names:
            rows = self.stack(name)
            if not rows:
                form = Form.swapped if self.is_swapped(name, config) else Form.plain
                yield Entry(self.key_prefix + self._key(name), part, (name,), form)
            elif name == rows[0]:  # the key and the value are part of the entry of their query
                query = next(layer for layer in self.stacks if layer in name)
                yield Entry(self.key_prefix + self._key(name.replace(query, self.stacks[query])), part, rows,
                            Form.stacked)

    def stack(self, name: str) -> tuple[str, ...]:
        """Return the names of the query, key and value that are one tensor in the file, if `name` is one; else ()."""
        for query in self.stacks:
            layers = [query.replace("_q", f"_{letter}") for letter in "qkv"]
            if layer := next((layer for layer in layers if layer in name), None):
                return tuple(name.replace(layer, other) for other in layers)
        return ()

    def is_swapped(self, name: str, config: Any) -> bool:
        """Return whether the file has the second half of a weight's rows first."""
        return any(re.fullmatch(pattern, name) for pattern in self.swapped)

    def _key(self, name: str) -> str:
        for pattern, key in self.rules:
            if match := re.fullmatch(pattern, name):
                return match.expand(key)
        return name

    def is_ignored(self, key: str, encoders: Sequence[Any]) -> bool:
        return key.startswith(OTHER_PARTS)

    def constants(self, encoders: Sequence[Any]) -> dict[str, Tensor]:
        return {}

    def marks_of(self, scheduler_config: Mapping[str, Any]) -> set[str]:
        return set()

    def modelspec(self, prediction_type: str) -> dict[str, str]:
        return {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": self.architecture,
                "modelspec.implementation": self.implementation}
