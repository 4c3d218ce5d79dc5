"""A server with workers that draw nothing: it runs in a thread, and a test decides when a picture is finished."""

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import requests
import uvicorn

from dreambooth.serving.app import create_app
from dreambooth.serving.options import Serve
from dreambooth.serving.service import Service
from dreambooth.serving.worker_process import Handler

INFO = {"model": "toy", "family": "Toy", "sampler": "none", "resolution": 64, "guidance_scale": 7.5, "multiple": 8,
        "own_adapter": None}
JSON = {"Content-Type": "application/json"}


def png(width: int = 64, height: int = 64, mark: str = "") -> bytes:
    """A PNG file without pixels, with a mark among its settings."""
    settings = b"dreambooth\0" + json.dumps({"mark": mark}).encode()
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", width, height, 8, 2, 0, 0, 0, 0)
            + struct.pack(">I4s", len(settings), b"tEXt") + settings + b"\0\0\0\0")


def wait_until(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


class FakeWorker:
    """Draws a batch in `seconds`; with `steps`, as many events say so before.

    Attributes:
        batches: the requests of all batches of all fake workers.
    """

    seconds = 0.01
    steps = 2
    prompts_to_crash: tuple[str, ...] = ()
    refusal: dict[str, Any] | None = None
    crash_at_start = False
    running: ClassVar[list["FakeWorker"]] = []
    batches: ClassVar[list[list[dict[str, Any]]]] = []
    stops = 0

    def __init__(self, on_event: Handler, gpu: str | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = self.loop.create_future()
        self.on_event, self.gpu, self.drawing = on_event, gpu, False
        self.running.append(self)

    def send(self, message: dict[str, Any]) -> None:
        if message["do"] == "open":
            self.loop.call_soon(self._open)
        elif message["do"] == "draw":
            self.batches.append(message["requests"])
            self.drawing = True
            self.loop.create_task(self._draw(message["requests"]))
        else:
            type(self).stops += 1
            self.drawing = False

    def kill(self) -> None:
        self.end(-9)

    def end(self, code: int) -> None:
        self.drawing = False
        if not self.ended.done():
            self.ended.set_result(code)
            self.running.remove(self)

    def _open(self) -> None:
        if self.crash_at_start:
            self.end(3)
        elif self.refusal:
            self.event("refused", **self.refusal)
            self.end(0)
        else:
            self.event("source", source={"folder": "."})
            self.event("ready", info=INFO)

    async def _draw(self, batch: list[dict[str, Any]]) -> None:
        jobs = list(range(len(batch)))
        for step in range(self.steps):
            await asyncio.sleep(self.seconds / self.steps)
            if not self.drawing:
                break
            self.event("step", jobs=jobs, done=step + 1, total=self.steps)
        if self.ended.done():
            return
        if any(one["prompt"] in self.prompts_to_crash for one in batch):
            self.end(-9)
            return
        if self.drawing:
            self.on_event({"event": "drawn", "jobs": jobs},
                          [png(one["width"] or 64, one["height"] or 64, f"{one['prompt']} {one['seed']}")
                           for one in batch])
        else:
            self.event("failed", jobs=jobs, status=499, sentence="stopped")
        self.event("idle", seconds=self.seconds, pictures=len(batch), loaded=0)

    def event(self, kind: str, **more: Any) -> None:
        self.on_event({"event": kind, **more}, [])


class FakeServer:
    """A server on a free port of this machine."""

    def __init__(self, **options: Any) -> None:
        self.options = Serve(base="toy", **{"max_wait_ms": 0.0, "request_timeout": 5.0} | options)
        self.worker: Any = type("Worker", (FakeWorker,), {"running": [], "batches": []})
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.failure: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def post(self, path: str, json: Any, **more: Any) -> requests.Response:
        return requests.post(self.url + path, json=json, timeout=20, **more)

    def get(self, path: str, **more: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=20, **more)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call a function in the event loop of the server."""
        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def wait_until(self, condition: Callable[[], Any]) -> None:
        wait_until(condition)

    def start(self) -> None:
        self._thread.start()
        self._started.wait(10)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    async def _run(self) -> None:
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self.service = Service(self.options, [None] * (self.options.workers or 1), self.worker)
        server = uvicorn.Server(uvicorn.Config(create_app(self.service), log_level="error", lifespan="off",
                                               timeout_graceful_shutdown=1))
        http = asyncio.ensure_future(server.serve(sockets=[self.listener]))
        self.pool = asyncio.ensure_future(self.service.pool.run())
        self._started.set()
        await self._end.wait()
        self.pool.cancel()
        [self.failure] = await asyncio.gather(self.pool, return_exceptions=True)
        server.should_exit = True
        await http


@contextmanager
def serving(prepare: Callable[[Any], None] = lambda worker: None, ready: bool = True, **options: Any
            ) -> Iterator[FakeServer]:
    """Yield a running server. `prepare` changes the class of its workers before it starts."""
    server = FakeServer(**options)
    prepare(server.worker)
    server.start()
    try:
        if ready:
            server.wait_until(lambda: server.get("/ping").status_code == 200)
        yield server
    finally:
        server.stop()


