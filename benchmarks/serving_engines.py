"""Compares HTTP engines in front of one worker process: this package's server, and LitServe.

    python benchmarks/serving_engines.py [ROUNDS]

LitServe is no dependency: `pip install litserve` first, in an environment of its own, and name its interpreter in
LITSERVE_PYTHON. Each engine passes a request to a worker process that sleeps (0 or 20 ms) and returns 1 KB. The bare
handlers of FastAPI and Starlette, without a worker process, show what HTTP alone costs.
"""

import base64
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from http_load import Load, run_load, wait_until_ready

try:
    import litserve
except ImportError:
    litserve = None

HERE = Path(__file__)
CLIENTS = 16
CASES = {"ours": (0, 20), "litserve": (0, 20), "starlette": (0,), "fastapi": (0,)}
REQUESTS = {0: 2000, 20: 300}
REPLY = b"x" * 1024


class Api(litserve.LitAPI if litserve else object):  # type: ignore[misc]
    """LitServe's handler. The class is copied to the worker by name."""

    delay = 0  # ms

    def setup(self, device: str) -> None:
        """Open no model."""

    def predict(self, request: dict[str, str]) -> dict[str, list[str]]:
        """Sleep, and answer 1 KB."""
        time.sleep(self.delay / 1000)
        return {"predictions": [base64.b64encode(REPLY).decode()]}


def main() -> None:
    """Measure all engines in turn, and print a table of medians."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    results: dict[tuple[str, int], list[tuple[float, float, Load]]] = {}
    for _ in range(rounds):
        for engine, delays in CASES.items():
            for delay in delays:
                results.setdefault((engine, delay), []).append(measure(engine, delay))
    print("| engine | handler | requests/s | p50, ms | p99, ms | start, s | memory, MiB |")
    print("|---" * 7 + "|")
    for (engine, delay), found in results.items():
        cells = [statistics.median(values) for values in zip(*(
            (load.rate, load.quantile(0.5) * 1000, load.quantile(0.99) * 1000, start, memory)
            for start, memory, load in found), strict=True)]
        print(f"| {engine} | {delay} ms | " + " | ".join(f"{cell:.{1 if 1 <= cell < 100 else 0}f}" for cell in cells),
              "|")


def measure(engine: str, delay: int) -> tuple[float, float, Load]:
    """Start an engine and load it; return the seconds of its start, its memory in MiB, and the load."""
    import psutil

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    python = os.environ.get("LITSERVE_PYTHON", sys.executable) if engine == "litserve" else sys.executable
    process = subprocess.Popen([python, str(HERE), engine, str(port), str(delay)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(HERE.parents[1])})
    try:
        start = wait_until_ready(port, "/health" if engine == "litserve" else "/ping")
        path = "/predict" if engine == "litserve" else "/invocations"
        run_load(port, path, 50, CLIENTS, lambda number: {"prompt": "a"})  # warm up
        load = run_load(port, path, REQUESTS[delay], CLIENTS, lambda number: {"prompt": "a"})
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        memory = sum(one.memory_info().rss for one in family) / 2**20
        if load.codes[200] != REQUESTS[delay]:
            raise SystemExit(f"{engine}: {load.codes}")
        return start, memory, load
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in children:
            if child.is_running():
                child.kill()


def serve_ours(port: int, delay: int) -> None:
    """Serve with this package; the worker is this file."""
    from functools import partial

    from dreambooth.serving import server, service
    from dreambooth.serving.options import Serve
    from dreambooth.serving.worker_process import WorkerProcess

    service.Service.__init__.__defaults__ = (
        (None,), partial(WorkerProcess, command=[sys.executable, str(HERE), "worker", str(delay)]))
    server.serve(Serve(base="none", port=port, max_batch=1, max_wait_ms=0))


def run_worker(delay: int, descriptor: int) -> None:
    """Answer as dreambooth.serving.worker does, without a model."""
    from multiprocessing.connection import Connection

    from dreambooth.serving.channel import Channel

    channel = Channel(Connection(descriptor))
    channel.receive()
    channel.send({"event": "source", "source": None})
    channel.send({"event": "ready", "info": {"model": "none", "resolution": 64, "multiple": 8, "guidance_scale": 1.0}})
    while True:
        message, _ = channel.receive()
        time.sleep(delay / 1000)
        jobs = list(range(len(message["requests"])))
        channel.send({"event": "drawn", "jobs": jobs}, [REPLY] * len(jobs))
        channel.send({"event": "idle", "seconds": delay / 1000, "pictures": len(jobs), "loaded": 0})


def serve_litserve(port: int, delay: int) -> None:
    """Serve with LitServe's defaults: one worker."""
    api = Api()
    api.delay = delay
    litserve.LitServer(api, accelerator="cpu").run(port=port, host="127.0.0.1", generate_client_file=False,
                                                     log_level="warning")


def serve_bare(engine: str, port: int) -> None:
    """Serve a handler that reads JSON and answers 1 KB, without a worker process."""
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    async def answer(request: Request) -> JSONResponse:
        await request.json()
        return JSONResponse({"predictions": [base64.b64encode(REPLY).decode()]})

    async def ping(request: Request) -> JSONResponse:
        return JSONResponse({})

    if engine == "fastapi":
        from fastapi import FastAPI

        app = FastAPI()
        app.add_api_route("/invocations", answer, methods=["POST"])
        app.add_api_route("/ping", ping)
    else:
        from starlette.applications import Starlette
        from starlette.routing import Route

        app = Starlette(routes=[Route("/invocations", answer, methods=["POST"]), Route("/ping", ping)])  # type: ignore[assignment]
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["worker"]:
        run_worker(int(words[1]), int(words[2]))
    elif words[:1] == ["ours"]:
        serve_ours(int(words[1]), int(words[2]))
    elif words[:1] == ["litserve"]:
        serve_litserve(int(words[1]), int(words[2]))
    elif words[:1] in (["starlette"], ["fastapi"]):
        serve_bare(words[0], int(words[1]))
    else:
        main()
