"""Messages between the front process and a worker: JSON objects, each with files attached. No pickle."""

import json
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any


class Channel:
    """One end of a two-way pipe. A message is a JSON object and a list of files (bytes), which may be empty."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection

    def send(self, message: dict[str, Any], files: Sequence[bytes] = ()) -> None:
        """Send a message. OSError (BrokenPipeError) if the other process has ended."""
        self._connection.send_bytes(json.dumps(message | {"files": len(files)}).encode())
        for file in files:
            self._connection.send_bytes(file)

    def receive(self) -> tuple[dict[str, Any], list[bytes]]:
        """Wait for a message. EOFError or OSError if the other process has ended."""
        message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return message, [self._connection.recv_bytes() for _ in range(message.pop("files"))]

    def has_message(self) -> bool:
        """Return whether `receive` would return at once, with a message or with an error."""
        return self._connection.poll(0)

    def close(self) -> None:
        """Close this end."""
        self._connection.close()
