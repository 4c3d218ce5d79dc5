"""Outputs of frozen text encoders for the prompts of a run, kept on disk.

A text encoder with billions of weights and the denoiser do not fit on a small card together. A run of a family with
`Family.encodes_ahead` therefore loads its text encoders first, encodes all its prompts, and releases the encoders
before it loads the denoiser. The encodings are stored in the folder `prompts/` of the run root, one file per prompt. If
no file is missing, the text encoders are not loaded.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreambooth.utils import atomic_files

log = logging.getLogger(__name__)
FOLDER = "prompts"  # in the run root
CHECKSUM = "sha256"  # key of a file's metadata: a hash of the encoding
Encode = Callable[[Sequence[str]], Iterator[Tensor]]  # yields the text encoders' output (1, ...) of each prompt


class PromptEncodings:
    """The text encoders' outputs for prompts, by prompt. Missing ones are computed, which loads the text encoders."""

    def __init__(self, folder: Path, key: str, encode: Encode, device: torch.device) -> None:
        """Args:
            folder: folder of the files; created when the first file is written.
            key: text that identifies everything that determines an encoding, except its prompt.
            encode: computes encodings; called only for prompts without an intact file.
            device: device of the tensors that `encodings[prompt]` returns.
        """
        self.folder, self.key, self.encode, self.device = folder, key, encode, device
        self._encodings: dict[str, Tensor] = {}

    def ensure(self, prompts: Iterable[str]) -> None:
        """Make the encodings of all `prompts` available: read them from their files, or compute and store them.

        Raises:
            UserError: a prompt has more tokens than the model reads.
            DoesNotFit: the disk is full.
        """
        missing = []
        for prompt in sorted(set(prompts) - self._encodings.keys()):
            if (found := _read(self.path(prompt))) is None:
                missing.append(prompt)
            else:
                self._encodings[prompt] = found
        if missing:
            for prompt, encoding in zip(missing, self.encode(missing), strict=True):
                self._encodings[prompt] = encoding.detach().cpu().contiguous()
                self._write(prompt)

    def __getitem__(self, prompt: str) -> Tensor:
        """Return the encoding of a prompt, (1, ...), on `device`, in the precision of the text encoders."""
        self.ensure([prompt])
        return self._encodings[prompt].to(self.device)

    def path(self, prompt: str) -> Path:
        """Return the path of the file with the encoding of a prompt."""
        name = sha256("\n".join([self.key, prompt]).encode()).hexdigest()[:20]
        return self.folder / f"{name}.safetensors"

    def _write(self, prompt: str) -> None:
        path, encoding = self.path(prompt), self._encodings[prompt]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_files.write_file(path) as temporary:
                save_file({"text": encoding}, temporary, metadata={CHECKSUM: _checksum(encoding)})
        except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError, which is not an OSError
            raise atomic_files.write_failure(f"the encoded prompt {path}", error,
                                             "make the folder writable and repeat the command") from error


def _read(path: Path) -> Tensor | None:
    """Read an encoding. Return None if there is no file, or if it is damaged, which is logged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            encoding: Tensor = file.get_tensor("text")
            if (file.metadata() or {}).get(CHECKSUM) == _checksum(encoding):
                return encoding
    except (OSError, SafetensorError, RuntimeError):
        pass
    log.warning("the encoded prompt %s is damaged: the prompt is encoded again", path)
    return None


def _checksum(encoding: Tensor) -> str:
    return sha256(encoding.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
