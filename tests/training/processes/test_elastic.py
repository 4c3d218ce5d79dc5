"""Elastic data parallel: a run goes on with fewer processes, with the same photos per step and the same result."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from dreambooth.runtime.engine import Engine
from dreambooth.training.step import Objective, train_step
from tests.support.toy_model import ToyModel, make_batches, make_state
from tests.training.processes.elastic_worker import PHOTOS, SCHEDULE, STEPS

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_run_that_loses_one_of_three_processes_equals_an_undisturbed_one_in_fp64(tmp_path: Path) -> None:
    """The two that are left go on from the last checkpoint.

    One process and two, or three, sum the same 7 x 64 fp64 terms in another order: the error is 448 eps per gradient.
    AdamW with lr 1e-2 turns it into less than 1e-9 per step, for gradients above 1e-6, as in test_distributed.py.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with agents(3, port, tmp_path) as processes:
        wait_for(lambda: (tmp_path / f"checkpoints/step-{STEPS // 2:06d}/state.json").exists())
        kill(processes[2])
        assert [process.wait(timeout=600) for process in processes] == [0, 0, -signal.SIGKILL]
    text = (tmp_path / "log-0.txt").read_text()
    assert "3 processes, after step 0" in text and f"2 processes, after step {STEPS // 2}" in text
    assert "dreambooth: another process of this run has ended" in text and "Traceback" not in text
    expected = train_alone()
    for name, weight in torch.load(tmp_path / "weights.pt", weights_only=True).items():
        assert torch.allclose(expected[name], weight, atol=STEPS * 1e-9, rtol=0), name


@contextmanager
def agents(count: int, port: int, run_dir: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start one agent of PyTorch's launcher per node, all on this machine, with one training process each."""
    command = [sys.executable, "-m", "dreambooth.container.torchrun", f"--nnodes=2:{count}", "--nproc-per-node=1",
               "--max-restarts=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
               "--rdzv-conf=last_call_timeout=30,keep_alive_interval=1,keep_alive_max_attempt=2",
               str(ROOT / "tests/training/processes/elastic_worker.py"), str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = []
    try:
        for number in range(count):
            with (run_dir / f"log-{number}.txt").open("wb") as log:
                processes.append(subprocess.Popen(command, cwd=run_dir, stdout=log, stderr=log, env=environment))
            time.sleep(0.5)  # the first one must not find its port in use
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                kill(process)
                process.wait()


def kill(agent: subprocess.Popen[bytes]) -> None:
    """Kill an agent and its training process, as the loss of a node does."""
    node = psutil.Process(agent.pid)
    for process in (node, *node.children(recursive=True)):
        process.kill()


def wait_for(happened: object, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def train_alone() -> dict[str, torch.Tensor]:
    """The weights of one process whose step is one batch."""
    model = ToyModel()
    state, batches = make_state(model), make_batches(batch=PHOTOS)
    step = partial(train_step, objective=Objective(SCHEDULE, 0.5), engine=Engine(), max_grad_norm=1.0)
    while state.step < STEPS:
        step(state, batches(state.step)).check()
    return model.state_dict()
