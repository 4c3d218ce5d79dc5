"""A worker as the front process sees it: starts the process, sends messages, and passes its events on."""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from dreambooth.serving.channel import Channel

LAST_WORDS = 2.0  # seconds from the moment that a worker closes its pipe to the end of its process
Handler = Callable[[dict[str, Any], list[bytes]], None]


class WorkerProcess:
    """A running worker.

    Attributes:
        ended: gets the exit code when the process has ended and all of its events have been handled.

    Args:
        on_event: called in the event loop for each message of the worker, with the message and its files.
        gpu: number of the GPU that the worker may use; None: all that this process may use.
    """

    def __init__(self, on_event: Handler, gpu: str | None = None, command: Sequence[str] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self.ended: asyncio.Future[int] = self._loop.create_future()
        ours, theirs = multiprocessing.Pipe()
        environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        words = command or [sys.executable, "-m", "dreambooth.serving.worker"]
        with theirs:
            self._process = subprocess.Popen([*words, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                                             env=environment, stdin=subprocess.DEVNULL)
        self._channel = Channel(ours)
        threading.Thread(target=self._read, daemon=True, name=f"worker {self._process.pid}").start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. If the process has ended, nothing happens: `ended` says so."""
        with suppress(OSError):
            self._channel.send(message)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def _read(self) -> None:
        with suppress(EOFError, OSError, RuntimeError):  # RuntimeError: the event loop is closed
            while True:
                message, files = self._channel.receive()
                self._loop.call_soon_threadsafe(self._on_event, message, files)
        try:
            code = self._process.wait(LAST_WORDS)
        except subprocess.TimeoutExpired:  # a worker that has closed its pipe is of no use
            self._process.kill()
            code = self._process.wait()
        self._channel.close()
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._set_ended, code)

    def _set_ended(self, code: int) -> None:
        if not self.ended.done():
            self.ended.set_result(code)
