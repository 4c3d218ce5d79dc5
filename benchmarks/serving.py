"""Measures `python -m dreambooth.serve` with the shipped tiny base on this machine's CPU.

    python benchmarks/serving.py start|batching|load|adapters [NUMBER]

start: seconds from the command to the first 200 of /ping, NUMBER times.
batching: pictures per second with batches of at most 1, 2, 4, 8 and 16, in turn, NUMBER rounds.
load: NUMBER requests by 16 clients on a short queue: status codes, and the slope of the memory of both processes.
adapters: NUMBER adapters of one base in turn, with at most 4 in memory; each picture is compared with generate's.
"""

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from http_load import run_load, wait_until_ready

ROOT = Path(__file__).parents[1]
PORT = 8431
CLIENTS = 16
BATCHES = (1, 2, 4, 8, 16)
TOKENLESS: dict[str, str] = {"Accept": "image/png"}


@contextmanager
def serving(*options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server on PORT."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dreambooth.serve", "base=package:tiny-sd", f"port={PORT}", *options], cwd=ROOT,
        stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def measure_start(rounds: int) -> None:
    """Print the seconds from the command to the first 200 of /ping."""
    seconds = []
    for _ in range(rounds):
        began = time.monotonic()
        with serving():
            wait_until_ready(PORT, "/ping")
            seconds.append(time.monotonic() - began)
    print(f"start: {', '.join(f'{value:.1f}' for value in seconds)} s")


def measure_batching(rounds: int) -> None:
    """Print the pictures per second of each batch size; all sizes run in each round, one server at a time.

    On a shared machine, pictures per CPU second of the worker are the better measure.
    """
    rates: dict[int, list[tuple[float, float]]] = {size: [] for size in BATCHES}
    for _ in range(rounds):
        for size in BATCHES:
            with serving(f"max_batch={size}") as process:
                wait_until_ready(PORT, "/ping")
                [worker] = psutil.Process(process.pid).children()
                run_load(PORT, "/invocations", CLIENTS, CLIENTS, request, TOKENLESS)  # warm up
                before = sum(worker.cpu_times()[:2])
                load = run_load(PORT, "/invocations", 4 * CLIENTS, CLIENTS, request, TOKENLESS)
                cpu_rate = 4 * CLIENTS / (sum(worker.cpu_times()[:2]) - before)
                rates[size].append((load.rate, cpu_rate))
                print(f"batches of at most {size}: {load.rate:.2f} pictures/s, {cpu_rate:.2f} per CPU second, "
                      f"p50 {load.quantile(0.5):.2f} s, p99 {load.quantile(0.99):.2f} s", flush=True)
    print("| largest batch | pictures/s | times one at a time | pictures per CPU second | times one at a time |")
    print("|---" * 5 + "|")
    for size, found in rates.items():
        cells = []
        for column in (0, 1):
            values = [one[column] for one in found]
            ratio = statistics.median(one / single[column] for one, single in zip(values, rates[1], strict=True))
            cells += [f"{statistics.median(values):.2f}", f"{ratio:.2f}"]
        print(f"| {size} | {' | '.join(cells)} |")


def measure_load(count: int) -> None:
    """Send requests faster than they are drawn, with a queue of 8; print status codes and the slope of memory."""
    with serving("max_batch=4", "max_queue=8") as process:
        wait_until_ready(PORT, "/ping")
        run_load(PORT, "/invocations", 100, CLIENTS, lambda number: request(number, 4), TOKENLESS)  # warm up
        front = psutil.Process(process.pid)
        [worker] = front.children()
        samples: list[tuple[float, float, float]] = []
        done = threading.Event()

        def sample() -> None:
            began = time.monotonic()
            while not done.wait(1.0):
                samples.append((time.monotonic() - began, *(one.memory_info().rss / 2**20 for one in (front, worker))))

        thread = threading.Thread(target=sample)
        thread.start()
        load = run_load(PORT, "/invocations", count, CLIENTS, lambda number: request(number, 4), TOKENLESS,
                        patience=1.0)
        done.set()
        thread.join()
    total = sum(load.codes.values())
    print(f"{count} requests in {load.seconds:.0f} s: {dict(sorted(load.codes.items()))}, {total} answers, "
          f"{load.without_retry_after} refusals without Retry-After; {load.rate:.2f} pictures/s")
    for name, column in (("front process", 1), ("worker", 2)):
        values = [one[column] for one in samples]
        slope = statistics.linear_regression([one[0] for one in samples], values).slope * load.seconds / count * 1000
        print(f"{name}: {values[0]:.0f} MiB at the start, {values[-1]:.0f} MiB at the end, highest {max(values):.0f} "
              f"MiB, slope {slope:+.2f} MiB per 1000 requests")


def measure_adapters(count: int) -> None:
    """Draw with `count` adapters in turn, twice, and compare each picture with the one that generate writes."""
    sys.path.insert(0, str(ROOT))
    import requests

    from dreambooth.config.generate import Generate
    from dreambooth.inference.generate_images import draw
    from dreambooth.utils.signals import StopRequest
    from tests.support.weights import make_adapter

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(count):
            make_adapter(folder / "adapters" / f"adapter-{number:02d}", number)
        digests: list[list[str]] = []
        highest, seconds = 0.0, []
        with serving(f"adapters={folder}/adapters", "max_adapters=4"):
            wait_until_ready(PORT, "/ping")
            url = f"http://127.0.0.1:{PORT}"
            for _ in range(2):
                digests.append([])
                for number in range(count):
                    began = time.monotonic()
                    body = {"prompt": "a toy", "num_inference_steps": 2, "adapter": f"adapter-{number:02d}"}
                    answer = requests.post(f"{url}/invocations", json=body, headers=TOKENLESS, timeout=60)
                    answer.raise_for_status()
                    seconds.append(time.monotonic() - began)
                    digests[-1].append(hashlib.sha256(answer.content).hexdigest())
                    lines = requests.get(f"{url}/metrics", timeout=60).text.splitlines()
                    [loaded] = [line for line in lines if line.startswith("dreambooth_adapters_loaded ")]
                    highest = max(highest, float(loaded.split()[1]))
        expected = []
        for number in range(count):
            out = folder / f"out-{number}"
            draw(Generate(base="package:tiny-sd", prompt="a toy", num_images=1, num_inference_steps=2, out=str(out),
                          lora=str(folder / "adapters" / f"adapter-{number:02d}")), StopRequest())
            expected.append(hashlib.sha256((out / "a-toy-seed0.png").read_bytes()).hexdigest())
    same = sum(one == other for one, other in zip(digests[0], expected, strict=True))
    print(f"{count} adapters twice in turn: {same} of {count} pictures equal generate's, second round equals the "
          f"first: {digests[0] == digests[1]}, {len(set(expected))} different pictures, at most {highest:.0f} "
          f"adapters in memory, median {statistics.median(seconds):.2f} s per request")


def request(number: int, steps: int = 10) -> dict[str, Any]:
    """The body of request number n: the same shape, another prompt and seed."""
    return {"prompt": f"a photo of toy {number}", "seed": number, "num_inference_steps": steps}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    what, number = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    measures = {"start": (measure_start, 5), "batching": (measure_batching, 3), "load": (measure_load, 1000),
                "adapters": (measure_adapters, 50)}
    function, default = measures[what]
    function(number or default)
