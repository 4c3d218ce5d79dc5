"""Loads the networks and processors that describe photos, with transformers, from the hub or from a folder.

Weights are read from safetensors files only, and code of a model's repository is never run. A model whose weights do
not fit transformers' own class is refused, because transformers would give the missing ones random values.
"""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError

from dreambooth.errors import UserError
from dreambooth.models import hub


@dataclass(frozen=True)
class Pretrained:
    """Where a model comes from."""

    source: str  # hub id or folder
    revision: str | None
    offline: bool  # never contact the hub
    key: str  # the key of the configuration, such as captions.model
    examples: str  # what the user can type instead
    device: torch.device

    def model_type(self) -> str:
        """Return the architecture by transformers' name, such as "blip".

        Raises:
            UserError: there is no model, or transformers does not know its architecture.
        """
        from transformers import AutoConfig

        return str(self.load(AutoConfig).model_type)

    def load(self, kind: Any, **more: Any) -> Any:
        """Call `kind.from_pretrained` with the options of this source; `kind` is a class of transformers.

        Raises:
            UserError: what is needed is missing, damaged, or needs code of the repository.
        """
        try:
            return kind.from_pretrained(
                self.source, revision=self.revision or "main", trust_remote_code=False,
                local_files_only=hub.local_files_only(self.source, self.offline), **more)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(self._describe(hub.failure_reason(error, self.source, self.offline), error)) from error

    def load_network(self, kind: Any, half: bool = False) -> Any:
        """Return a network on the device, without gradients.

        Args:
            kind: class of transformers.
            half: whether a GPU computes in half precision: bf16 if it supports it, else fp16.

        Raises:
            UserError: see `load`, or the weights do not fit the network.
        """
        dtype = torch.float32
        if half and self.device.type == "cuda":
            dtype = torch.bfloat16 if torch.cuda.get_device_capability(self.device)[0] >= 8 else torch.float16
        network, loaded = self.load(kind, dtype=dtype, use_safetensors=True, output_loading_info=True)
        if unfit := [*loaded["missing_keys"], *loaded["mismatched_keys"]]:
            raise UserError(self._describe(f"{len(unfit)} of its weights do not fit {type(network).__name__} of "
                                           "transformers"))
        return network.requires_grad_(False).eval().to(self.device)

    def _describe(self, reason: str, error: Exception | None = None) -> str:
        if error is not None and hub.is_gated(error):
            advice = f"accept its license on https://huggingface.co/{self.source}, then type hf auth login"
        elif self.offline and not hub.is_local(self.source):
            advice = f"type offline=false to ask the hub, or {self.key}=DIR"
        else:
            advice = f"type {self.key}=DIR with a folder of transformers, or a hub id such as {self.examples}"
        return f"the model {self.source} could not be loaded ({reason}): {advice}"

    def refuse(self, reason: str) -> UserError:
        """Return the error for a model that was found and cannot be used."""
        return UserError(f"{self.source} {reason}: type {self.key}={self.examples}")
