"""The journal of a run, `metrics.jsonl`: an append-only log of metrics, images and settings, one JSON object per line.

The journal is the source of truth. A tracker sends the entries of the journal to MLflow, and records the offset in
bytes up to which entries were sent. Every entry has the key "time" (milliseconds since 1970) and the keys of one of
these kinds:

    {"time": ..., "step": 5, "metrics": {"loss": 0.25, "lr": "nan"}}       nan, inf, -inf are strings
    {"time": ..., "step": 5, "image": "samples/5.png", "key": "samples/prompt_0"}
    {"time": ..., "artifact": "result.json", "folder": "", "state": [size, mtime]}
    {"time": ..., "params": {...}}    {"time": ..., "tags": {...}}    {"time": ..., "status": "FINISHED"}
    {"time": ..., "input": {"name": ..., "digest": ..., "source": ..., "photos": "5"}}

The path of a file inside the run folder is relative to the run folder. Each line is written with one system call. If
the process is killed and the last line is incomplete, the next opening of the journal removes this line. If a resumed
run repeats a step, no second value is written for this step.
"""

import errno
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dreambooth.utils.masking import mask_urls
from dreambooth.utils.plurals import counted

EXPERIMENT = "EXPERIMENT_ID"  # placeholder in tag values; replaced by the ID of the MLflow experiment
STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED")
MAX_BATCH = 1000  # maximum number of metric values per batch
# The keys of an entry by kind, and their types. The key of a kind is the first of its keys. "state" may have any type.
KINDS: dict[str, dict[str, type]] = {
    "metrics": {"metrics": dict, "step": int}, "image": {"image": str, "key": str, "step": int},
    "artifact": {"artifact": str, "folder": str, "state": object}, "params": {"params": dict}, "tags": {"tags": dict},
    "status": {"status": str}, "input": {"input": dict}}
log = logging.getLogger(__name__)


class Journal:
    """Appends entries to the journal file `path`, unless the file already has them. Thread-safe.

    The `log_*` methods and `set_tags` return whether they wrote a line. If a write fails, for example because the disk
    is full, OSError is raised and the file does not change.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._steps: dict[tuple[str, str], set[int]] = {}  # the key is ("metrics" | "image", name)
        self._latest: dict[tuple[str, str], object] = {}  # the key is (kind of entry, name)
        self._lock = threading.Lock()
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        content = path.read_bytes()
        self._size, damaged = content.rfind(b"\n") + 1, content.count(b"\n")
        os.ftruncate(self._file, self._size)
        for entry, _ in read(path):
            self._remember(entry)
            damaged -= 1
        if damaged:
            log.warning("%s of %s cannot be read and will be ignored", counted(damaged, "line"), path)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> bool:
        """Write the metrics for which the journal has no value at this step yet."""
        with self._lock:
            new = {k: _json_number(v) for k, v in values.items() if step not in self._steps.get(("metrics", k), ())}
            return bool(new) and self._append({"step": step, "metrics": new})

    def log_image(self, step: int, key: str, path: Path) -> bool:
        """Write the path of an image file under a key, unless the journal has an image for this key and step."""
        with self._lock:
            if step in self._steps.get(("image", key), ()):
                return False
            return self._append({"step": step, "image": self._relative(path), "key": key})

    def log_artifact(self, path: Path, folder: str = "") -> bool:
        """Write the path of an artifact (a file or folder), if the artifact is new or its content has changed."""
        with self._lock:
            name, state = self._relative(path), _file_state(path)
            if self._latest.get(("artifact", f"{folder}:{name}")) == state:
                return False
            return self._append({"artifact": name, "folder": folder, "state": state})

    def log_params(self, values: Mapping[str, str]) -> bool:
        """Write the parameters that are new or have changed."""
        return self._append_changed("params", values)

    def set_tags(self, values: Mapping[str, str]) -> bool:
        """Write the tags that are new or have changed."""
        return self._append_changed("tags", values)

    def log_dataset(self, values: Mapping[str, str]) -> bool:
        """Write the description of the training photos, if it has changed.

        Args:
            values: the keys are name, digest (fingerprint of the photos), source (a folder or address) and photos (the
                number of photos).
        """
        with self._lock:
            if self._latest.get(("input", "")) == dict(values):
                return False
            return self._append({"input": dict(values)})

    def count_missing(self, name: str, last: int) -> int:
        """Return for how many of the steps 1 to `last` the journal has no value of the metric `name`."""
        return len(set(range(1, last + 1)) - self._steps.get(("metrics", name), set()))

    def set_status(self, value: str) -> None:
        """Write the status of the run, which must be one of STATUSES."""
        with self._lock:
            self._append(_status_entry(value))

    @property
    def ended(self) -> bool:
        """Whether the last status of the run is final, that is, not RUNNING."""
        return self._latest.get(("status", ""), "RUNNING") != "RUNNING"

    def close(self, status: str | None = None) -> None:
        """Write the final status `status` unless it is None, and close the file. A second call does nothing."""
        with self._lock:
            if self._file is None:
                return
            try:
                if status is not None:
                    self._append(_status_entry(status))
            finally:
                os.close(self._file)
                self._file = None

    def _append_changed(self, kind: str, values: Mapping[str, str]) -> bool:
        with self._lock:
            texts = {key: mask_urls(str(value)) for key, value in values.items()}
            changed = {key: text for key, text in texts.items() if self._latest.get((kind, key)) != text}
            return bool(changed) and self._append({kind: changed})

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


def read(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the entries of a journal from the byte `offset` on, each with the offset of the byte after the entry.

    An incomplete last line ends the iteration, because another thread may not have finished writing this line. Lines
    that are not valid entries are skipped: a power failure may leave such lines.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        while (line := file.readline()).endswith(b"\n"):
            offset += len(line)
            try:
                entry = json.loads(line)
                if not _is_valid(entry):
                    continue
                if "metrics" in entry:
                    entry["metrics"] = {key: float(value) for key, value in entry["metrics"].items()}
            except (ValueError, TypeError, RecursionError):
                continue
            yield entry, offset


def batches(entries: Iterable[tuple[dict[str, Any], int]]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Group entries into batches for sending. Yield each batch with the offset of the byte after its last entry.

    Consecutive metrics entries form one batch of up to MAX_BATCH values. Each entry of another kind is a batch of one
    entry.
    """
    batch: list[dict[str, Any]] = []
    size = end = 0
    for entry, offset in entries:
        count = len(entry.get("metrics", ()))
        if batch and (not count or size + count > MAX_BATCH):
            yield batch, end
            batch, size = [], 0
        batch, size, end = [*batch, entry], size + count, offset
        if not count:
            yield batch, end
            batch, size = [], 0
    if batch:
        yield batch, end


def is_line_start(path: Path, offset: int) -> bool:
    """Return whether a line of the journal begins at the byte `offset`.

    False means that the offset was recorded for another journal, or that the end of the file was lost.
    """
    if not 0 <= offset <= path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(max(offset - 1, 0))
        return offset == 0 or file.read(1) == b"\n"


def _is_valid(entry: Any) -> bool:
    """Return whether the JSON content of a line is a valid entry.

    An entry must have the key "time". If one of its keys is the name of a kind in KINDS, the entry must have all keys
    of this kind, with values of the types in KINDS.
    """
    if not isinstance(entry, dict) or type(entry.get("time")) is not int:
        return False
    if not all(key in entry and isinstance(entry[key], wanted) and not isinstance(entry[key], bool)
               for kind, keys in KINDS.items() if kind in entry for key, wanted in keys.items()):
        return False
    return all(isinstance(text, str) for kind in ("params", "tags", "input") for text in entry.get(kind, {}).values())


def _status_entry(value: str) -> dict[str, Any]:
    if value not in STATUSES:
        raise ValueError(f"a run's status is one of {', '.join(STATUSES)}, not {value!r}")
    return {"status": value}


def _json_number(value: float) -> float | str:
    """Return the value as a float, or as a string if it is not finite, because JSON has no nan and inf."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _file_state(path: Path) -> list[int]:
    """Return [total size in bytes, newest modification time in ns] of a file or folder.

    A changed file or folder is detected by comparing these numbers. Return [-1, 0] if the file does not exist.
    """
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    try:
        stats = [file.stat() for file in files]
    except FileNotFoundError:
        return [-1, 0]
    return [sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]
