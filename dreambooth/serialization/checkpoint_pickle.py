"""Reads .ckpt files. Such a file is a pickle, or a zip archive that contains one, and a pickle is a program.

PyTorch executes only the operations that build tensors (weights_only=True), and rejects a file that contains other
operations. This module adds one operation, which builds the NumPy numbers that training tools store beside the weights.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreambooth.errors import UserError

# Published checkpoints have less than 1 MB of pickle, and PyTorch stores their archives uncompressed.
MAX_PICKLE = 8 * 2**20  # bytes; objects in memory take up to 60 times the space of their pickle
MAX_RATIO = 4  # unpacked size of an archive, divided by the size of the file


class NumberType:
    """Takes the place of numpy.dtype while a pickle is read. A pickle can build only types of numbers with it."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        """Args:
            code: kind of number and size in bytes, such as f8.
            align, copy: arguments of numpy.dtype, without effect here.

        Raises:
            ValueError: `code` names no type of numbers.
        """
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise ValueError(f"{code!r} is not allowed")
        self.code = code
        self.order: Any = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Set the byte order.

        Args:
            state: the state of a pickled numpy.dtype; its second element is the byte order.
        """
        self.order = state[1]


def read_number(kind: NumberType, data: bytes) -> float | int | bool:
    """Return the number that a pickled NumPy scalar contains: its type is `kind`, and its bytes are `data`."""
    number: float | int | bool = np.frombuffer(data, np.dtype(kind.code).newbyteorder(kind.order), count=1)[0].item()
    return number


# The names in pickles of NumPy 1 and 2, and what is called in their place.
NUMBERS: list[Any] = [(NumberType, "numpy.dtype"), (read_number, "numpy.core.multiarray.scalar"),
                      (read_number, "numpy._core.multiarray.scalar")]


def read(path: Path) -> Any:
    """Return the object in a .ckpt file, with its tensors on the CPU.

    Raises:
        UserError: the file is damaged, contains code, or would be much larger when unpacked.
    """
    with path.open("rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # a zip archive, or a pickle of protocol 2 or newer
            raise UserError(f"{path} is damaged (it does not begin as a checkpoint does): fetch it again")
    try:
        _check_unpacked_size(path)
        with torch.serialization.safe_globals(NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch.load raises many types; the message contains the reason
        wants = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        if wants or re.search(r"Unsupported|Trying to|not allowed", str(error)):
            raise UserError(f"{path} is a pickle that wants more than weights ({wants[1] if wants else 'code'}), which "
                            "could be anything, and nothing of it was run: type a .safetensors file of the same "
                            "model") from error
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path} is damaged ({reason}): fetch it again") from error


def _check_unpacked_size(path: Path) -> None:
    """If a file is a zip archive, check the sizes in its directory before anything is unpacked.

    Raises:
        UserError: the archive would be much larger when unpacked.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    pickles = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    total = sum(entry.file_size for entry in entries)
    if pickles > MAX_PICKLE or total > MAX_RATIO * path.stat().st_size:
        raise UserError(f"{path} would take {total / 2**20:.0f} MiB when it is unpacked, which no model's checkpoint "
                        "does, and nothing of it was unpacked: type a .safetensors file of the same model")
