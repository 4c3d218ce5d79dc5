"""Keeps the workers running, and gives each the next batch of the queue as soon as it is free."""

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Protocol

from dreambooth.errors import DreamBoothError
from dreambooth.serving.adapter_folder import Adapters
from dreambooth.serving.metrics import Metrics
from dreambooth.serving.queue import Job, PictureQueue
from dreambooth.serving.refusals import Refused
from dreambooth.serving.worker_process import Handler, WorkerProcess

CRASHES = 3  # crashes in a row, before a worker was ready, that end the server
LAST_MOMENT = 5.0  # seconds that a killed process has to end
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between a crash and the next start; the pause doubles


class CannotServe(DreamBoothError):
    """The model cannot be served; the server ends with this sentence."""

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.exit_code = code


class Worker(Protocol):
    """What the pool needs of a WorkerProcess."""

    ended: "asyncio.Future[int]"

    def send(self, message: dict[str, Any]) -> None: ...
    def kill(self) -> None: ...


StartWorker = Callable[[Handler, str | None], Worker]


class Slot:
    """One worker after the other: starts it, gives it batches, and starts the next after a crash.

    Attributes:
        ready: whether the worker has opened the model.
        batch: the jobs that the worker draws now.
    """

    def __init__(self, pool: "Pool", gpu: str | None) -> None:
        self.pool, self.gpu = pool, gpu
        self.ready = False
        self.batch: list[Job] = []
        self._known_adapters: Mapping[str, str] | None = None
        self._refusal: CannotServe | None = None
        self._event: asyncio.Event = asyncio.Event()
        self._idle = False

    async def run(self) -> None:
        """Run until the pool is stopped.

        Raises:
            CannotServe: the model cannot be opened, or the worker has crashed CRASHES times before it was ready.
        """
        crashes, pause = 0, FIRST_PAUSE
        while True:
            self._event, self._idle, self._known_adapters = asyncio.Event(), False, None
            worker = self.pool.start_worker(self._handle, self.gpu)
            try:
                worker.send({"do": "open", **self.pool.describe_model()})
                await self._run_worker(worker)
                was_ready = self.ready
            finally:
                self.ready = False
                worker.kill()
                self._give_up_batch()
                self.pool.report_state()
                await asyncio.wait({worker.ended}, timeout=LAST_MOMENT)
            code = worker.ended.result() if worker.ended.done() else -signal.SIGKILL
            if self._refusal:
                raise self._refusal
            crashes = 0 if was_ready else crashes + 1
            pause = FIRST_PAUSE if was_ready else min(2 * pause, LONGEST_PAUSE)
            reason = _describe_exit(code)
            if crashes == CRASHES:
                raise CannotServe(f"the worker process ended {CRASHES} times before the model was open ({reason}): "
                                  "the log above has the reason, such as an error, or type a smaller model")
            print(f"dreambooth: a worker process ended ({reason}): starting another one in {pause:g} s",
                  file=sys.stderr, flush=True)
            self.pool.metrics.restarts.inc()
            await asyncio.sleep(pause)

    async def _run_worker(self, worker: Worker) -> None:
        """Give the worker batches until it ends."""
        while not worker.ended.done():
            if not self.ready:
                await self._wait(worker, None)
                continue
            take = asyncio.ensure_future(self.pool.queue.next_batch())
            waiting: set[asyncio.Future[Any]] = {take, worker.ended}
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                taken = take.done() and not take.cancelled()
                take.cancel()
            if not taken:
                continue
            if worker.ended.done():
                self.pool.queue.put_back(take.result())
            else:
                await self._draw(worker, take.result())

    async def _draw(self, worker: Worker, batch: list[Job]) -> None:
        batch = [job for job in batch if not job.result.done()]
        if not batch:
            return
        self.batch, self._idle = batch, False
        if not self.pool.has_time_for_batch():
            self._give_up_batch(Refused(503, "the server is stopping: try again", self.pool.retry_after()))
            return
        adapters = self.pool.adapters.paths()
        changed, self._known_adapters = adapters != self._known_adapters, dict(adapters)
        self.pool.metrics.batches.observe(len(batch))
        worker.send({"do": "draw", "requests": [asdict(job.request) for job in batch],
                     "adapters": dict(adapters) if changed else None})
        for job in batch:
            job.result.add_done_callback(self._wake)
        stopped = False
        while not self._idle and not worker.ended.done():
            if not await self._wait(worker, self.pool.hang_seconds):
                print(f"dreambooth: a worker has made no step for {self.pool.hang_seconds:g} s: it is killed",
                      file=sys.stderr, flush=True)
                worker.kill()
                await worker.ended
            results = [job.result for job in batch]
            if not stopped and all(result.done() for result in results) and any(
                    result.cancelled() for result in results):
                stopped = True
                worker.send({"do": "stop"})
        self._give_up_batch()

    async def _wait(self, worker: Worker, seconds: float | None) -> bool:
        """Wait until the worker has sent an event, has ended, or a result is done. Return False after `seconds`."""
        event = asyncio.ensure_future(self._event.wait())
        waiting: set[asyncio.Future[Any]] = {event, worker.ended}
        try:
            done, _ = await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            event.cancel()
        self._event.clear()
        return bool(done)

    def _wake(self, _: object = None) -> None:
        self._event.set()

    def _give_up_batch(self, reason: Refused | None = None) -> None:
        """Refuse the jobs that the worker has left without an answer."""
        reason = reason or Refused(503, "the process that drew the picture has ended: try again",
                                   self.pool.retry_after())
        for job in self.batch:
            if not job.result.done():
                job.result.set_exception(reason)
        self.batch = []

    def _handle(self, message: dict[str, Any], files: Sequence[bytes]) -> None:
        """Handle one message of the worker, see worker.py."""
        kind = message["event"]
        jobs = [self.batch[number] for number in message.get("jobs", ()) if number < len(self.batch)]
        if kind == "source":
            self.pool.set_source(message["source"])
        elif kind == "ready":
            self.ready = True
            self.pool.set_info(message["info"])
        elif kind == "refused":
            self._refusal = CannotServe(message["sentence"], message["code"])
        elif kind == "step":
            for job in jobs:
                job.on_step(message["done"], message["total"])
        elif kind == "drawn":
            for job, file in zip(jobs, files, strict=True):
                if not job.result.done():
                    job.result.set_result(file)
        elif kind == "failed":
            for job in jobs:
                if not job.result.done():
                    job.result.set_exception(Refused(message["status"], message["sentence"]))
        elif kind == "idle":
            self._idle = True
            self.pool.record_batch(message["seconds"], message["pictures"], message["loaded"])
        self._event.set()


class Pool:
    """All workers.

    Attributes:
        info: what the workers told of the model (RendererInfo as a dictionary); None before the first is ready.

    Args:
        gpus: the number of the GPU of each worker; [None]: one worker that uses what it finds.
        model: the options of the message "open", see worker.py.
        hang_seconds: a worker that sends nothing for so long while it draws is killed.
    """

    def __init__(self, queue: PictureQueue, metrics: Metrics, adapters: Adapters, model: dict[str, Any],
                 gpus: Sequence[str | None], hang_seconds: float, start_worker: StartWorker = WorkerProcess) -> None:
        self.queue, self.metrics, self.adapters, self.hang_seconds = queue, metrics, adapters, hang_seconds
        self.start_worker = start_worker
        self.info: dict[str, Any] | None = None
        self._model, self._source = model, None
        self._source_known = asyncio.Event()
        self._slots = [Slot(self, gpu) for gpu in gpus]
        self._seconds_per_batch = 0.0  # moving average
        self._deadline: float | None = None

    async def run(self) -> None:
        """Run all workers until the call is cancelled. The second worker starts when the first has found the model.

        Raises:
            CannotServe: no worker can open the model. As long as one can, the server goes on with fewer.
        """
        tasks = [asyncio.ensure_future(self._slots[0].run())]
        known = asyncio.ensure_future(self._source_known.wait())
        try:
            await asyncio.wait({known, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            if known.done():
                tasks += [asyncio.ensure_future(slot.run()) for slot in self._slots[1:]]
            await _wait_for_all_or_bug(tasks)
        finally:
            known.cancel()
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError, CannotServe):
                    await task

    @property
    def ready_workers(self) -> int:
        """The number of workers that can draw."""
        return sum(slot.ready for slot in self._slots)

    def stop_at(self, deadline: float) -> None:
        """Begin no batch that would probably not end before `deadline`, in seconds of the monotonic clock."""
        self._deadline = deadline

    def has_time_for_batch(self) -> bool:
        """Return whether a batch that begins now will probably end before the deadline, if there is one."""
        return self._deadline is None or time.monotonic() + self._seconds_per_batch <= self._deadline

    def retry_after(self) -> int:
        """Return after how many seconds a refused client should try again: when the queue is probably half empty."""
        if not self.ready_workers:
            return 5
        batches = len(self.queue) / 2 / self.queue.max_batch / self.ready_workers
        return max(1, min(120, round(batches * self._seconds_per_batch)))

    def describe_model(self) -> dict[str, Any]:
        """Return the fields of the message that makes a worker open the model."""
        return {**self._model, "source": self._source, "adapters": dict(self.adapters.paths())}

    def set_source(self, source: Any) -> None:
        """Store where the model is. Every later worker opens the same one, also if an alias has moved meanwhile."""
        self._source = source
        self._source_known.set()

    def set_info(self, info: dict[str, Any]) -> None:
        """Store what a worker told of the model."""
        self.info = info
        self.report_state()

    def record_batch(self, seconds: float, pictures: int, loaded: int) -> None:
        """Record the duration of a batch, and how many adapters its worker has in memory."""
        if pictures:
            past = self._seconds_per_batch or seconds
            self._seconds_per_batch = 0.7 * past + 0.3 * seconds
            self.metrics.picture_seconds.observe(seconds / pictures)
            self.metrics.pictures.inc(pictures)
        self.metrics.adapters.set(loaded)

    def report_state(self) -> None:
        """Update the number of ready workers in the metrics."""
        self.metrics.workers.set(self.ready_workers)


async def _wait_for_all_or_bug(tasks: Sequence["asyncio.Task[None]"]) -> None:
    """Wait until no slot is left, and raise the last one's CannotServe; or raise any other error at once."""
    pending = set(tasks)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = task.exception()
            if not pending or not isinstance(error, CannotServe):
                task.result()
            print(f"dreambooth: a worker has ended, {len(pending)} are left ({error})", file=sys.stderr, flush=True)


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name}, perhaps because the system's memory ran out" if -code == signal.SIGKILL else name
