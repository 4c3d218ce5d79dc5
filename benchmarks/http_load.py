"""Loads an HTTP server with clients in threads, and measures answers and latencies. Used by the serving benchmarks."""

import http.client
import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Bodies = Callable[[int], dict[str, Any]]


@dataclass
class Load:
    """What a load gave: the seconds that it took, the latencies of all 200 answers, and how often each status came."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)
    without_retry_after: int = 0  # answers 429 or 503 that do not say when to try again

    @property
    def rate(self) -> float:
        """Answers with status 200 per second."""
        return self.codes[200] / self.seconds

    def quantile(self, share: float) -> float:
        """The latency in seconds that this share of the 200 answers does not exceed."""
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[round(share * 100) - 1]


def run_load(port: int, path: str, count: int, clients: int, body: Bodies, headers: dict[str, str] | None = None,
             patience: float = 0.0) -> Load:
    """Send `count` requests by `clients` threads, each with one connection at a time.

    Args:
        body: the JSON body of request number n.
        patience: seconds that a client waits after 429 or 503 before it sends its next request.
    """
    load, lock, numbers = Load(), threading.Lock(), iter(range(count))

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                connection.close()
                return
            began = time.monotonic()
            try:
                connection.request("POST", path, json.dumps(body(number)),
                                   {"Content-Type": "application/json"} | (headers or {}))
                answer = connection.getresponse()
                answer.read()
                code, told = answer.status, answer.headers["Retry-After"]
            except (OSError, http.client.HTTPException):
                code, told = 0, None
                connection.close()
            with lock:
                load.codes[code] += 1
                if code == 200:
                    load.latencies.append(time.monotonic() - began)
                elif code in (429, 503) and not told:
                    load.without_retry_after += 1
            if code in (429, 503) and patience:
                time.sleep(patience)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.monotonic() - began
    return load


def wait_until_ready(port: int, path: str, seconds: float = 120.0) -> float:
    """Wait until GET `path` answers 200; return the seconds that it took."""
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return time.monotonic() - began
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.02)
    raise SystemExit(f"no server is ready on port {port}")
