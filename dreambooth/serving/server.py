"""Runs the server: the socket, the signals, the workers, and their common end."""

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import uvicorn

from dreambooth.container.cluster import count_gpus
from dreambooth.errors import UserError
from dreambooth.serving.app import create_app
from dreambooth.serving.options import TOKEN_VARIABLE, Serve
from dreambooth.serving.service import Service

BACKLOG = 1024  # connections that wait for the front process
LAST_ANSWERS = 5  # seconds to send answers after the last picture


def serve(options: Serve) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        UserError: the address cannot be used, or the model cannot be opened.
    """
    with _listen(options) as listener:
        asyncio.run(_serve(options, listener))


async def _serve(options: Serve, listener: socket.socket) -> None:
    service = Service(options, _choose_gpus(options.workers))
    server = _Server(uvicorn.Config(create_app(service), log_level="warning", access_log=False, lifespan="off",
                                    ws="none", server_header=False, timeout_keep_alive=75,
                                    timeout_graceful_shutdown=LAST_ANSWERS))
    address = _address(options.host, listener.getsockname()[1])
    print(f"dreambooth: listening on {address}, and opening the model", flush=True)
    if not options.is_loopback and options.token is None:
        print(f"dreambooth: everyone who reaches {options.host} may draw: set {TOKEN_VARIABLE} to require a token",
              file=sys.stderr, flush=True)
    http = asyncio.ensure_future(server.serve(sockets=[listener]))
    pool = asyncio.ensure_future(service.pool.run())
    told = asyncio.ensure_future(_tell_when_ready(service, address))
    stop = asyncio.ensure_future(server.stop_requested.wait())
    try:
        await asyncio.wait({http, pool, stop}, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            print("dreambooth: stopping: what is drawn now is still delivered", flush=True)
            again = asyncio.ensure_future(server.second_signal.wait())
            drain = asyncio.ensure_future(service.drain())
            await asyncio.wait({again, drain, pool}, return_when=asyncio.FIRST_COMPLETED)
            for task in (again, drain):
                task.cancel()
        service.stopping = True
        service.refuse_waiting()  # also after a second signal, or if no worker is left
        server.should_exit = True
        if pool.done():
            pool.result()
    finally:
        for task in (pool, told, stop):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(pool, return_exceptions=True)
        server.should_exit = True
        await http


class _Server(uvicorn.Server):
    """uvicorn's server; signals set events instead of ending it."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stop_requested, self.second_signal = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Receive SIGTERM or Ctrl-C."""
        event = self.second_signal if self.stop_requested.is_set() else self.stop_requested
        self._loop.call_soon_threadsafe(event.set)


def _listen(options: Serve) -> socket.socket:
    """Open the socket before the model is opened, so that a wrong address is found at once."""
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"the server cannot listen on {options.host}, port {options.port} ({reason}): type port=PORT "
                        "of a free port, or host=127.0.0.1") from error


def _choose_gpus(workers: int | None) -> Sequence[str | None]:
    """Return the GPU of each worker. Workers that share a GPU, or the CPU, are possible."""
    count = count_gpus()
    if count <= 1:
        return [None] * (workers or 1)
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = visible or [str(number) for number in range(count)]
    return [names[number % len(names)] for number in range(workers or len(names))]


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _tell_when_ready(service: Service, address: str) -> None:
    while not service.is_ready or service.pool.info is None:
        await asyncio.sleep(0.05)
    adapters = len(service.adapters.paths())
    print(f"dreambooth: ready: {service.pool.info['model']} with {adapters} adapters on {address}", flush=True)
