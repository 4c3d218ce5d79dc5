"""A dictionary in a file of JSON lines, to which new entries are appended. It is a cache: losing it costs only time."""

import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from dreambooth.utils import atomic_files

FOLDER = "photo_index"  # in the run root


class Records:
    """JSON values by key. Entries in the file that cannot be read are ignored, and files that cannot be written too.

    `save` appends whole lines, so that several processes may add to one file, and a killed process leaves at most one
    partial line. Of several lines with the same key, the last one counts.
    """

    def __init__(self, path: Path | None, key_end: str = "") -> None:
        """Args:
            path: the file; None: the entries are only in memory.
            key_end: the end of the keys that are used. Other entries are left out of the file when it is rewritten.
        """
        self._path = path
        self._lock = threading.Lock()
        self._pending: list[str] = []
        self._entries, lines = _read(path, key_end) if path else ({}, 0)
        if path and lines > 2 * len(self._entries) + 1000:  # mostly entries that are replaced or not used
            with suppress(OSError), atomic_files.write_file(path) as temporary:
                temporary.write_text("".join(map(_line, self._entries.items())), encoding="utf-8")

    def get(self, key: str) -> Any:
        """Return the value of a key, or None."""
        return self._entries.get(key)

    def add(self, key: str, value: Any) -> None:
        """Add or replace an entry, which `save` writes."""
        with self._lock:
            self._entries[key] = value
            self._pending.append(_line((key, value)))

    def save(self) -> None:
        """Append the new entries to the file, if the folder that holds the file's folder exists. Never raises."""
        if not self._path or not self._pending:
            return
        with self._lock, suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)  # fails if the folder around it does not exist
            with self._path.open("a+b") as file:
                if file.tell():
                    file.seek(-1, 2)
                    if file.read(1) != b"\n":  # a killed process wrote a part of a line
                        self._pending.insert(0, "\n")
                file.write("".join(self._pending).encode())
            self._pending.clear()


def _line(entry: tuple[str, Any]) -> str:
    return json.dumps(entry, separators=(",", ":")) + "\n"


def _read(path: Path, key_end: str) -> tuple[dict[str, Any], int]:
    """Return the entries of a file whose keys have the given end, and its number of lines."""
    entries: dict[str, Any] = {}
    lines = 0
    with suppress(OSError), path.open("rb") as file:
        for line in file:
            lines += 1
            with suppress(ValueError, TypeError, AttributeError, RecursionError):
                key, value = json.loads(line)
                if key.endswith(key_end):
                    entries[key] = value
    return entries, lines
