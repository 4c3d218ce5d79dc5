"""The worker process: opens the model, and draws the batches that the front process sends.

    python -m dreambooth.serving.worker DESCRIPTOR

DESCRIPTOR is the number of an inherited socket, through which all messages go. Messages to the worker, as JSON:

    {"do": "open", "source", "adapters": {name: path}, and options}         first message
    {"do": "draw", "requests": [...], "adapters": {name: path} or null}     null: as before
    {"do": "stop"}                                                          stop drawing the present batch

Messages of the worker:

    {"event": "source", "source"}                  the model was found; a later worker opens the same one
    {"event": "ready", "info"}                     the model is open
    {"event": "refused", "code", "sentence"}       the model cannot be opened; the process ends
    {"event": "step", "jobs", "done", "total"}     progress of some jobs, given by their positions in "requests"
    {"event": "drawn", "jobs"}, with one file per job
    {"event": "failed", "jobs", "status", "sentence"}
    {"event": "idle", "seconds", "pictures", "loaded"}   the batch has ended

The process ends when the front process ends. It ignores SIGTERM and Ctrl-C, which the front process handles.
"""

import errno
import gc
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.errors import Diverged, DoesNotFit, DreamBoothError, Interrupted, OutOfMemory, UserError
from dreambooth.inference.picture_request import PictureRequest
from dreambooth.models.inference_memory import PLAIN, InferenceMemory, read_memory
from dreambooth.serving.channel import Channel
from dreambooth.utils.masking import mask_urls

if TYPE_CHECKING:
    from dreambooth.inference.model_sources import Source
    from dreambooth.inference.renderer import Renderer
    from dreambooth.runtime.memory_meter import MemoryMeter


def main() -> None:
    """Run the worker until the front process closes the pipe."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")  # of several adapters on a model
    for category in (FutureWarning, DeprecationWarning):  # warnings for library developers
        warnings.simplefilter("ignore", category)
    channel = Channel(Connection(int(sys.argv[1])))
    try:
        _work(channel)
    except (EOFError, ConnectionError):  # the front process has ended
        pass
    except DreamBoothError as error:
        channel.send({"event": "refused", "code": error.exit_code, "sentence": mask_urls(str(error))})
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise
        channel.send({"event": "refused", "code": UserError.exit_code, "sentence":
                      f"{error.filename} cannot be read ({error.strerror}): change its permissions"})


def _work(channel: Channel) -> None:
    start, _ = channel.receive()
    renderer, meter = _open(start, channel)
    channel.send({"event": "ready", "info": asdict(renderer.info)})
    while True:
        message, _ = channel.receive()
        if message["do"] != "draw":
            continue  # "stop" of a batch that has ended meanwhile
        if message["adapters"] is not None:
            renderer.set_adapters({name: Path(path) for name, path in message["adapters"].items()})
        began = time.monotonic()
        batch = Batch(renderer, meter, channel, [PictureRequest(**request) for request in message["requests"]])
        batch.draw()
        channel.send({"event": "idle", "seconds": time.monotonic() - began, "pictures": batch.drawn,
                      "loaded": renderer.loaded_adapters})


def _open(start: dict[str, Any], channel: Channel) -> "tuple[Renderer, MemoryMeter]":
    """Find and open the model; return its renderer, and the meter that knows when memory has run out."""
    from dreambooth.inference.model_sources import Source

    if start["source"] is None:
        source = find_model(start["run"], start["base"], start["uri"], start["cache"])
    else:
        source = Source(**start["source"] | {"folder": Path(start["source"]["folder"])})
    channel.send({"event": "source", "source": asdict(source) | {"folder": str(source.folder)}})
    from dreambooth.models.loading import import_libraries

    import_libraries()
    import torch

    from dreambooth.inference.renderer import Renderer
    from dreambooth.runtime.memory_meter import MemoryMeter

    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapters = {name: Path(path) for name, path in start["adapters"].items()}
    meter = MemoryMeter(torch.device(device), lambda phase: "the same on a machine with more memory",
                        saved_notice="nothing was served")
    memory = read_memory(start["memory_options"])
    if memory is None:
        memory = _choose_memory(source, start, list(adapters.values())) if device == "cuda" else PLAIN
    with meter.phase("loading"):
        return Renderer(source, device, adapters, start["max_adapters"], memory=memory), meter


def _choose_memory(source: "Source", start: dict[str, Any], adapters: Sequence[Path]) -> InferenceMemory:
    """Return the memory options with which the model fits this machine's GPU.

    Raises:
        DoesNotFit: the planner finds none.
    """
    from dreambooth.planner.serving_plan import plan_this_machine

    plan = plan_this_machine(source, start["max_batch"], adapters, start["max_adapters"],
                             start["workers_per_gpu"])
    if not plan.fits:
        raise DoesNotFit(f"{plan.shortfall}; or memory_options=[], to try it nevertheless")
    print(f"dreambooth: memory_options=auto: {plan.explanation}", flush=True)
    return plan.memory


def find_model(run: str | None, base: str | None, uri: str | None, cache: str) -> "Source":
    """Return the source of the model: downloaded if `run` or `base` is an address in S3 or in MLflow's registry.

    Args:
        uri: MLflow server of models:/ addresses; None: see `registered_models.local_path`.
        cache: folder for downloads, also for that of an adapter's base model in S3.
    """
    from dreambooth.config.generate import Generate
    from dreambooth.inference.model_sources import fetch_base, find_source
    from dreambooth.tracking.registered_models import local_path

    source = find_source(Generate(run=local_path(run, uri, cache=cache), base=local_path(base, uri, cache=cache)))
    return fetch_base(source, cache=f"{cache}/s3")


class Batch:
    """The drawing of one batch.

    Attributes:
        drawn: number of pictures that were sent.
        stopped: whether nobody waits for any picture of the batch, or of its halves.
    """

    def __init__(self, renderer: "Renderer", meter: "MemoryMeter", channel: Channel,
                 requests: Sequence[PictureRequest]) -> None:
        self.renderer, self.meter, self.channel, self.requests = renderer, meter, channel, requests
        self.drawn, self.stopped = 0, False

    def draw(self) -> None:
        """Draw the batch, and send a picture or a failure for each request."""
        valid: list[int] = []
        for number, request in enumerate(self.requests):
            with self._reporting([number]):
                self.renderer.check(request)
                valid.append(number)
        if valid:
            self._draw(valid)

    def _draw(self, jobs: list[int]) -> None:
        """Draw some requests in one go, or in two halves if memory runs out."""
        with self._reporting(jobs):
            try:
                files = self._draw_at_once(jobs)
            except OutOfMemory:
                if len(jobs) == 1:
                    raise
            else:
                self.drawn += len(jobs)
                self.channel.send({"event": "drawn", "jobs": jobs}, files)
                return
            print(f"dreambooth: out of memory with {len(jobs)} pictures in a batch: drawing half as many at a time",
                  file=sys.stderr, flush=True)
            _free_memory()  # not in the handler above, where the error still holds the tensors
            middle = (len(jobs) + 1) // 2
            self._draw(jobs[:middle])
            self._draw(jobs[middle:])

    @contextmanager
    def _reporting(self, jobs: list[int]) -> Iterator[None]:
        """Send a failure of these jobs if the block raises an error. The worker continues after it."""
        try:
            yield
        except (EOFError, ConnectionError):  # the front process has ended
            raise
        except UserError as error:  # such as a prompt that is too long, or an adapter of another model
            self._fail(jobs, 422, mask_urls(str(error)))
        except OutOfMemory:
            self._fail(jobs, 507, "the picture does not fit into the server's memory: ask for a smaller size")
        except Interrupted:
            self._fail(jobs, 499, "nobody waits for the picture")
        except Diverged as error:
            self._fail(jobs, 500, str(error))
        except Exception as error:
            sys.stderr.write(mask_urls(traceback.format_exc()))
            self._fail(jobs, 500, f"internal error in dreambooth ({type(error).__name__}): see the server's log")

    def _draw_at_once(self, jobs: list[int]) -> list[bytes]:
        if self.stopped:
            raise Interrupted("stopped before the first step")

        def on_step(done: int, total: int) -> bool:
            self.channel.send({"event": "step", "jobs": jobs, "done": done, "total": total})
            while self.channel.has_message():
                message, _ = self.channel.receive()
                self.stopped |= message["do"] == "stop"
            return not self.stopped

        with self.meter.phase("drawing"):
            return self.renderer.draw([self.requests[number] for number in jobs], on_step)

    def _fail(self, jobs: list[int], status: int, sentence: str) -> None:
        self.channel.send({"event": "failed", "jobs": jobs, "status": status, "sentence": sentence})


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
