"""The journal of a run, `metrics.jsonl`: what was measured and made, one JSON object a line, only ever appended to.

It is the source of truth; trackers send copies of it elsewhere and remember how far they got. Every line has "time"
(milliseconds since 1970) and one of:

    {"time": ..., "step": 5, "metrics": {"loss": 0.25, "lr": "nan"}}       nan, inf, -inf are texts
    {"time": ..., "step": 5, "image": "samples/5.png", "key": "samples/prompt_0"}
    {"time": ..., "artifact": "result.json", "folder": "", "state": [size, mtime]}
    {"time": ..., "params": {...}}    {"time": ..., "tags": {...}}    {"time": ..., "status": "FINISHED"}
    {"time": ..., "input": {"name": ..., "digest": ..., "source": ..., "photos": "5"}}

A path is relative to the run folder when the file is inside it. A line is one write; a line that a kill cut short is
removed when the journal is opened again, and a resumed run that computes a step again adds no second point for it.
"""

import errno
import json
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

EXPERIMENT = "EXPERIMENT_ID"  # in a tag: stands for the number that MLflow gives the experiment, for links
STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED")


class Journal:
    """Appends entries to `path` and knows which ones are already there. Safe to call from several threads.

    A write that fails (a full disk) raises OSError and leaves the file as it was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._steps: dict[tuple[str, str], set[int]] = {}  # ("metrics" | "image", key) -> steps
        self._latest: dict[tuple[str, str], object] = {}  # ("params" | "tags" | "artifact" | "input", key) -> value
        self._lock = threading.Lock()
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size = _whole_lines(path)
        os.ftruncate(self._file, self._size)
        for entry, _ in read(path):
            self._remember(entry)

    def metrics(self, step: int, values: Mapping[str, float]) -> bool:
        """Journal the values that this step does not have yet. False: it had them all."""
        with self._lock:
            new = {k: _number(v) for k, v in values.items() if step not in self._steps.get(("metrics", k), ())}
            return bool(new) and self._append({"step": step, "metrics": new})

    def image(self, step: int, key: str, path: Path) -> bool:
        """Journal an image file under a key; one image a key and step."""
        with self._lock:
            if step in self._steps.get(("image", key), ()):
                return False
            return self._append({"step": step, "image": self._relative(path), "key": key})

    def artifact(self, path: Path, folder: str = "") -> bool:
        """Journal a file or folder to be kept beside the run; again when it has changed since."""
        with self._lock:
            name, state = self._relative(path), _state(path)
            if self._latest.get(("artifact", f"{folder}:{name}")) == state:
                return False
            return self._append({"artifact": name, "folder": folder, "state": state})

    def params(self, values: Mapping[str, str]) -> bool:
        """Journal the settings that are new or differ from what was journalled last."""
        return self._texts("params", values)

    def tags(self, values: Mapping[str, str]) -> bool:
        """Journal the tags that are new or differ from what was journalled last."""
        return self._texts("tags", values)

    def input(self, values: Mapping[str, str]) -> bool:
        """Journal what the run is trained on, unless that is what was journalled last."""
        with self._lock:
            if self._latest.get(("input", "")) == dict(values):
                return False
            return self._append({"input": dict(values)})

    def status(self, value: str) -> None:
        """Journal how the run stands: one of STATUSES."""
        with self._lock:
            self._append(_status(value))

    @property
    def ended(self) -> bool:
        """Whether the last status is that of a run which is over."""
        return self._latest.get(("status", ""), "RUNNING") != "RUNNING"

    def close(self, status: str | None = None) -> None:
        """Journal a last status, if one is given, and close the file. A second call does nothing."""
        with self._lock:
            if self._file is None:
                return
            try:
                if status is not None:
                    self._append(_status(status))
            finally:
                os.close(self._file)
                self._file = None

    def _texts(self, kind: str, values: Mapping[str, str]) -> bool:
        with self._lock:
            new = {k: str(v) for k, v in values.items() if self._latest.get((kind, k)) != str(v)}
            return bool(new) and self._append({kind: new})

    def _append(self, body: dict[str, Any]) -> bool:
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        entry = {"time": time.time_ns() // 1_000_000, **body}
        line = json.dumps(entry, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)
        self._remember(entry)
        return True

    def _remember(self, entry: dict[str, Any]) -> None:
        for key in entry.get("metrics", ()):
            self._steps.setdefault(("metrics", key), set()).add(entry["step"])
        if "image" in entry:
            self._steps.setdefault(("image", entry["key"]), set()).add(entry["step"])
        if "artifact" in entry:
            self._latest["artifact", f"{entry['folder']}:{entry['artifact']}"] = entry["state"]
        for kind in ("input", "status"):
            if kind in entry:
                self._latest[kind, ""] = entry[kind]
        for kind in ("params", "tags"):
            for key, value in entry.get(kind, {}).items():
                self._latest[kind, key] = value

    def _relative(self, path: Path) -> str:
        path, folder = path.resolve(), self.path.parent.resolve()
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


class NullTracker(Journal):
    """Journals to `metrics.jsonl` and nothing else. A later MlflowTracker on the same folder sends all of it.

    Args:
        trains: False for who only looks at a run: how and when it ended stays what it was, whatever happens now.
    """

    def __init__(self, run_dir: Path, trains: bool = True) -> None:
        super().__init__(run_dir / "metrics.jsonl")
        self._trains = trains

    def close(self, status: str | None = None) -> None:
        super().close(status if self._trains or not self.ended else None)

    def url(self) -> str | None:
        return None


class Tracker(Protocol):
    """What the run tells the world. The methods return False when the journal had the entry already."""

    def metrics(self, step: int, values: Mapping[str, float]) -> bool: ...
    def image(self, step: int, key: str, path: Path) -> bool: ...
    def artifact(self, path: Path, folder: str = "") -> bool: ...
    def params(self, values: Mapping[str, str]) -> bool: ...
    def tags(self, values: Mapping[str, str]) -> bool: ...
    def input(self, values: Mapping[str, str]) -> bool: ...
    def url(self) -> str | None: ...
    def close(self, status: str) -> None: ...


def read(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Each entry from the byte `offset` on, with the offset after it.

    Stops before a line that is still being written. A line that is no entry (a disk that lost power) is passed over.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        while (line := file.readline()).endswith(b"\n"):
            offset += len(line)
            try:
                entry = json.loads(line)
                if "metrics" in entry:
                    entry["metrics"] = {key: float(value) for key, value in entry["metrics"].items()}
            except (ValueError, TypeError, AttributeError):
                continue
            if isinstance(entry, dict):
                yield entry, offset


def parcels(entries: Iterable[tuple[dict[str, Any], int]]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Metrics that follow each other go together, up to 1000 values; any other entry goes alone."""
    parcel: list[dict[str, Any]] = []
    size = end = 0
    for entry, after in entries:
        count = len(entry.get("metrics", ()))
        if parcel and (not count or size + count > 1000):
            yield parcel, end
            parcel, size = [], 0
        parcel, size, end = [*parcel, entry], size + count, after
        if not count:
            yield parcel, end
            parcel, size = [], 0
    if parcel:
        yield parcel, end


def starts_line(journal: Path, offset: int) -> bool:
    """Whether an entry can begin at this byte: false for a journal that lost its end or is another one."""
    with journal.open("rb") as file:
        file.seek(max(offset - 1, 0))
        return offset == 0 or file.read(1) == b"\n"


def _whole_lines(path: Path) -> int:
    """Size of the file up to the end of its last complete line."""
    return path.read_bytes().rfind(b"\n") + 1


def _status(value: str) -> dict[str, Any]:
    if value not in STATUSES:
        raise ValueError(f"a run's status is one of {', '.join(STATUSES)}, not {value!r}")
    return {"status": value}


def _number(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _state(path: Path) -> list[int]:
    """What changes when the content does: total size and newest change, [-1, 0] for a file that is not there."""
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    try:
        stats = [file.stat() for file in files]
    except FileNotFoundError:
        return [-1, 0]
    return [sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]
