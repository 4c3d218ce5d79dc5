"""What all routes share: the state of the server, the limits of a request, and the queue."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.inference.picture_request import Limits, PictureRequest, batch_key
from dreambooth.serving.adapter_folder import Adapters
from dreambooth.serving.metrics import Metrics
from dreambooth.serving.options import Serve
from dreambooth.serving.pool import Pool, StartWorker
from dreambooth.serving.queue import Job, PictureQueue, ignore_step
from dreambooth.serving.refusals import Refused
from dreambooth.serving.worker_process import WorkerProcess

StepListener = Callable[[int, int, int], None]  # position of the picture, steps that are done, all steps


@dataclass(frozen=True)
class SizeLimits:
    """The largest picture, in pixels."""

    max_side: int
    max_pixels: int


class Service:
    """The server without HTTP.

    Attributes:
        stopping: whether the server accepts no new requests because it ends soon.
        started: the time of the start, in seconds since 1970.
    """

    def __init__(self, options: Serve, gpus: Sequence[str | None] = (None,),
                 start_worker: StartWorker = WorkerProcess) -> None:
        self.options = options
        self.metrics = Metrics()
        self.adapters = Adapters(options.adapters)
        self.queue = PictureQueue(options.max_queue, options.max_batch, options.max_wait_ms / 1000)
        self.metrics.queue.set_function(lambda: len(self.queue))
        model = {key: getattr(options, key) for key in (
            "run", "base", "uri", "cache", "memory_options", "max_adapters", "max_batch")}
        model["workers_per_gpu"] = max(map(list(gpus).count, gpus))
        self.pool = Pool(self.queue, self.metrics, self.adapters, model, gpus, options.request_timeout, start_worker)
        self._jobs: set[Job] = set()  # of which nobody has got the result yet
        self.stopping = False
        self.started = int(time.time())

    @property
    def is_ready(self) -> bool:
        """Whether a new request would be accepted, if the queue has room."""
        return not self.stopping and self.pool.ready_workers > 0

    def info(self) -> dict[str, Any]:
        """Return what is known of the model, see RendererInfo.

        Raises:
            Refused: the server cannot draw now (status 503).
        """
        if self.stopping:
            raise Refused(503, "the server is stopping: try again in some seconds", 5)
        if not self.is_ready or self.pool.info is None:
            raise Refused(503, "the model is being opened: try again in some seconds", 5)
        return self.pool.info

    def limits(self) -> Limits:
        """Return the limits for the number of pictures and steps, and for the sides of pictures."""
        return Limits(max_side=self.size_limits().max_side, max_steps=self.options.max_steps,
                      max_images=self.options.max_images)

    def size_limits(self) -> SizeLimits:
        """Return the limits for the size of a picture. Without options they follow from the model's resolution."""
        resolution = int(self.info()["resolution"])
        return SizeLimits(self.options.max_side or 2 * resolution, self.options.max_pixels or 2 * resolution ** 2)

    def submit(self, requests: Sequence[PictureRequest], on_step: StepListener | None = None) -> list[Job]:
        """Put requests into the queue and return their jobs. The caller passes the jobs to `abandon` at the end.

        Raises:
            Refused: a request is invalid (422), the queue is full (429), or the server cannot draw now (503).
        """
        info, sizes = self.info(), self.size_limits()
        loop = asyncio.get_running_loop()
        jobs = []
        for position, request in enumerate(requests):
            self._check(request, info, sizes)
            jobs.append(Job(request, batch_key(request), loop.create_future(),
                            _bind(on_step, position) if on_step else ignore_step))
        self.queue.put(jobs, self.pool.retry_after())
        self._jobs.update(jobs)
        return jobs

    def abandon(self, jobs: Sequence[Job]) -> None:
        """Forget jobs: those that are not drawn yet will not be drawn."""
        self._jobs.difference_update(jobs)
        for job in jobs:
            self.queue.discard(job)
            job.result.cancel()
            if job.result.done() and not job.result.cancelled():
                job.result.exception()  # mark it as retrieved

    async def drain(self) -> None:
        """Accept no new requests, and wait until the accepted ones are drawn, at most grace_seconds.

        What does not fit into this time is refused with status 503.
        """
        self.stopping = True
        self.pool.stop_at(time.monotonic() + self.options.grace_seconds)
        if results := {job.result for job in self._jobs}:
            await asyncio.wait(results, timeout=self.options.grace_seconds)
        self.refuse_waiting()

    def refuse_waiting(self) -> None:
        """Refuse all pictures that are not drawn yet with status 503."""
        for job in self._jobs:
            if not job.result.done():
                job.result.set_exception(Refused(503, "the server is stopping: try again in some seconds", 5))

    def _check(self, request: PictureRequest, info: dict[str, Any], sizes: SizeLimits) -> None:
        if request.adapter is not None and not self.adapters.has(request.adapter):
            raise Refused(422, f"adapter must be {self._choices()}, not {request.adapter!r}")
        if request.width or request.height:  # without a size it is that of the model or adapter
            side, multiple = int(info["resolution"]), int(info["multiple"])
            width, height = request.width or side, request.height or side
            if width % multiple or height % multiple:
                raise Refused(422, f"size must have sides that are multiples of {multiple}, not {width}x{height}")
            if width * height > sizes.max_pixels:
                raise Refused(422, f"size must have at most {sizes.max_pixels} pixels in all, not {width}x{height}")

    def _choices(self) -> str:
        names = list(self.adapters.paths())
        if not names:
            return "left out, because the server has no adapters"
        return "one of " + ", ".join(names[:20]) + (f" and {len(names) - 20} others" if len(names) > 20 else "")


def page(name: str) -> str:
    """Return the text of an HTML page of this package."""
    return (Path(__file__).parents[1] / "assets" / name).read_text(encoding="utf-8")


def _bind(on_step: StepListener, position: int) -> Callable[[int, int], None]:
    return lambda done, total: on_step(position, done, total)
