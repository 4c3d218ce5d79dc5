"""The adapters of a server by name: fixed ones, or those in a folder, where new ones are seen while the server runs."""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.serialization.export_layout import locate_adapter

SCAN_INTERVAL = 1.0  # seconds for which the content of the folder is taken as known


class Adapters:
    """Names and paths of adapters.

    Args:
        adapters: None; a dictionary from name to path; or a folder. In a folder, each run or adapter folder and each
            .safetensors file is an adapter, named like the folder, or like the file without its ending.

    Raises:
        UserError: the folder, or the path of a name, does not exist.
    """

    def __init__(self, adapters: Any) -> None:
        self._folder = Path(adapters).expanduser() if isinstance(adapters, str) else None
        self._paths: dict[str, str] = {}
        self._scanned = -SCAN_INTERVAL
        if self._folder and not self._folder.is_dir():
            raise UserError(f"there is no folder {self._folder}: type adapters=DIR, a folder of runs or LoRA files")
        if isinstance(adapters, Mapping):
            self._paths = {str(name): str(Path(path).expanduser()) for name, path in adapters.items()}
            for name, path in self._paths.items():
                if not Path(path).exists():
                    raise UserError(f"there is no adapter {name} in {path}: type adapters.{name}=PATH")

    def paths(self) -> Mapping[str, str]:
        """Return the path of each adapter by name, in the order of the names.

        If the folder cannot be read now, these are the adapters of the last time.
        """
        now = time.monotonic()
        if self._folder and now - self._scanned >= SCAN_INTERVAL:
            self._scanned = now
            with suppress(OSError):
                self._paths = _scan(self._folder)
        return self._paths

    def has(self, name: str) -> bool:
        """Return whether there is an adapter of this name, also if it has come a moment ago."""
        if name not in self._paths:
            self._scanned = min(self._scanned, time.monotonic() - SCAN_INTERVAL)
        return name in self.paths()


def _scan(folder: Path) -> dict[str, str]:
    """Return the adapters in a folder. An entry that cannot be read, or whose name is not UTF-8, is left out."""
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        with suppress(OSError, UnicodeEncodeError):
            path.name.encode()
            if path.suffix == ".safetensors" and path.is_file():
                found[path.stem] = str(path)
            elif path.is_dir() and locate_adapter(path):
                found[path.name] = str(path)
    return found
