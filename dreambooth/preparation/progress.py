"""Records what the command prepare has written, so that a repeated command continues and keeps what a user has edited.

The record is a file with one JSON object per line, to which lines are only appended. A line that a killed process left
incomplete is ignored.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.utils import atomic_files, quoting

RECORD = "progress.jsonl"


@dataclass(frozen=True)
class Entry:
    """One output of the command."""

    photo: str  # digest of the photo that the output describes
    settings: str  # what determines the output beside the photo, such as the model
    output: str  # digest of the output
    value: Any = None  # the output itself, if it is in no file


class Progress:
    """The record of a folder, see this file's docstring."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source: str | None = None  # the folder of photos that the outputs were made from
        self._entries: dict[tuple[str, str], Entry] = {}
        for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
            try:
                content = json.loads(line)
                if "source" in content:
                    self.source = str(content["source"])
                else:
                    entry = Entry(content["photo"], content["settings"], content["output"], content.get("value"))
                    self._entries[content["kind"], content["name"]] = entry
            except (ValueError, KeyError, TypeError):
                continue

    def start(self, source: Path) -> None:
        """Begin the record of outputs made from the photos in `source`, or continue it.

        Raises:
            UserError: the outputs were made from another folder, or there are files that this command did not write.
        """
        out = self.path.parents[1]
        if self.source is None:
            if out.is_dir() and any(not path.is_dir() for path in out.rglob("*")):
                raise UserError(f"{out} has files that this command did not write, and is left as it is: type out=DIR "
                                "with a new folder")
            self._append({"source": str(source.resolve())})
            self.source = str(source.resolve())
        elif Path(self.source) != source.resolve():
            raise UserError(f"{out} was prepared from {self.source}: type {quoting.override('in', self.source)}, or "
                            "out=DIR with a new folder")

    def find(self, kind: str, name: str) -> Entry | None:
        """Return the last entry of an output, or None. `kind` is copy, caption, mask or faces."""
        return self._entries.get((kind, name))

    def add(self, kind: str, name: str, entry: Entry) -> None:
        """Record an output that was written."""
        self._entries[kind, name] = entry
        self._append({"kind": kind, "name": name, **vars(entry)})

    def _append(self, content: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            torn = file.tell() > 0 and _last_byte(self.path) != b"\n"
            file.write(b"\n" * torn + json.dumps(content).encode() + b"\n")


def is_due(current: str | None, entry: Entry | None, photo: str, settings: str, overwrite: bool) -> bool:
    """Return whether an output must be made, again or for the first time.

    An output that the user has edited, or that was made with other settings, is kept unless `overwrite` is set. An
    output that this command made of an earlier version of the photo is made again.

    Args:
        current: digest of the output that exists; None if there is none.
        entry: the record of the output.
        photo: digest of the photo.
        settings: what determines the output beside the photo.
        overwrite: the user's setting.
    """
    if current is None or entry is None:
        return current is None or overwrite
    untouched = entry.output == current
    if untouched and entry.photo != photo:
        return True
    return overwrite and not (untouched and entry.settings == settings)


def digest(content: bytes) -> str:
    """Return the SHA-256 of bytes, in hex."""
    return sha256(content).hexdigest()


def file_digest(path: Path) -> str | None:
    """Return the SHA-256 of a file, in hex; None if there is no such file."""
    return atomic_files.full_digest(path) if path.is_file() else None


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1)
