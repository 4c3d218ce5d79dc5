"""Background thread that passes the entries of a journal to a backend on this machine, such as TensorBoard's files.

MLflow has a sender of its own, because a server can be down and answer twice, see mlflow_shipper.py.
"""

import atexit
import logging
import threading
from pathlib import Path
from typing import Any, Protocol

from dreambooth.tracking.journal import read

POLL_INTERVAL = 2.0  # seconds between two reads of the journal
CLOSE_TIMEOUT = 60.0  # seconds that `finish` waits for the remaining entries
log = logging.getLogger(__name__)


class Backend(Protocol):
    """Receives the entries of one journal, in one thread.

    Attributes:
        name: name of the product, for messages.
    """

    name: str

    def open(self) -> int:
        """Open the backend, and return the byte of the journal at which the first entry that it lacks begins."""

    def write(self, entry: dict[str, Any]) -> None:
        """Write one entry, see journal.py.

        Raises:
            ValueError: the entry cannot be written, for example because its image does not exist.
        """

    def flush(self, offset: int) -> None:
        """Make what was written visible. `offset` is the byte of the journal after the last entry."""

    def close(self) -> None:
        """Close the backend. Later entries are written after the next `open`."""


class JournalFollower(threading.Thread):
    """Thread that passes every entry of a journal to a backend, in order.

    A failure is logged once and ends the thread. The run goes on, and the journal keeps everything for the next start.
    """

    def __init__(self, journal: Path, backend: Backend) -> None:
        super().__init__(name=backend.name, daemon=True)
        self._journal, self._backend = journal, backend
        self._closing, self._abandoned = threading.Event(), False

    def start(self) -> None:
        """Start the thread, unless it has been started."""
        if self.ident is None:
            atexit.register(self._abandon)  # a thread in C code may crash the interpreter at exit
            super().start()

    def run(self) -> None:
        try:
            offset, closing = self._backend.open(), False
            try:
                while not closing and not self._abandoned:
                    closing = self._closing.is_set()  # read first: this round includes what was written before it
                    offset = self._pass_entries(offset)
                    if not closing:
                        self._closing.wait(POLL_INTERVAL)
            finally:
                self._backend.close()
        except Exception as error:
            log.warning("%s fails (%s: %s); the run continues, and %s keeps everything", self._backend.name,
                        type(error).__name__, error, self._journal.name)

    def finish(self) -> None:
        """Pass the remaining entries, and end the thread. Wait at most CLOSE_TIMEOUT seconds."""
        self.start()
        self._closing.set()
        self.join(CLOSE_TIMEOUT)
        if self.is_alive():
            log.warning("%s has not received everything in %g s; it stays in %s", self._backend.name, CLOSE_TIMEOUT,
                        self._journal.name)
        atexit.unregister(self._abandon)

    def _pass_entries(self, offset: int) -> int:
        """Pass all entries from the byte `offset` on, and return the byte after the last one."""
        start = offset
        for entry, offset in read(self._journal, start):
            if self._abandoned:
                return offset
            try:
                self._backend.write(entry)
            except ValueError as error:
                log.warning("%s does not accept an entry (%s); it stays in %s", self._backend.name, error,
                            self._journal.name)
        if offset != start:
            self._backend.flush(offset)
        return offset

    def _abandon(self) -> None:
        self._abandoned = True
        self._closing.set()
        self.join(1.0)
