"""Measures the memory of each phase of a run (load, caching, step, ...), and composes the out-of-memory message."""

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import psutil
import torch

from dreambooth.errors import OutOfMemory
from dreambooth.utils.hardware import GIB

PROBE_BYTES = 2**30  # a machine that can still allocate this much is not out of memory


class MemoryMeter:
    """Measures the memory of each phase: on a GPU the CUDA allocator's peak, on a CPU the process's resident set size.

    Phases are load, class_images, caching, step, sample, save and others.
    """

    def __init__(self, device: torch.device, advice: Callable[[str], str] = lambda phase: "memory=lowest",
                 predicted: Mapping[str, float] | None = None,
                 saved_notice: str = "earlier checkpoints are kept") -> None:
        """Args:
            device: the device whose memory is measured.
            advice: returns the overrides that the user should type if memory runs out. Its argument is the phase.
            predicted: the planner's prediction of the peak in GiB, by phase. Phases without a prediction are left out.
            saved_notice: the clause of the out-of-memory message that says which results are kept.
        """
        self.device = device
        self.advice = advice
        self.predicted = predicted or {}
        self.saved_notice = saved_notice
        self.peaks: dict[str, float] = {}  # highest values in GiB, by metric name
        self._process = psutil.Process()  # created once, because psutil then looks up the start time

    @property
    def predicted_metrics(self) -> dict[str, float]:
        """The predicted peaks in GiB by metric name, to compare with the measured `vram/<phase>/reserved_gib`."""
        return {f"predicted_vram/{phase}/reserved_gib": value for phase, value in self.predicted.items()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the memory use inside the block to phase `name`. Phases may be nested.

        Raises:
            OutOfMemory: memory ran out inside the block.
        """
        self._reset()
        try:
            yield
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(self._message(name)) from error
        finally:
            self.read(name)
            self._reset()

    def read(self, name: str) -> dict[str, float]:
        """Measure phase `name`, update `peaks`, and return the measured values in GiB by metric name."""
        if self.device.type == "cuda":
            now = {f"vram/{name}/allocated_gib": torch.cuda.max_memory_allocated(self.device) / GIB,
                   f"vram/{name}/reserved_gib": torch.cuda.max_memory_reserved(self.device) / GIB}
        else:
            now = {f"process_rss/{name}_gib": self._process.memory_info().rss / GIB}
        for key, value in now.items():
            self.peaks[key] = max(value, self.peaks.get(key, 0.0))
        return now

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _message(self, name: str) -> str:
        predicted = f"predicted {self.predicted[name]:.2f} GiB, " if name in self.predicted else ""
        self.read(name)
        measured = ", ".join(f"{key} {value:.2f}" for key, value in self.peaks.items() if f"/{name}" in key)
        return (f"out of memory during {name} ({predicted}measured {measured}); {self.saved_notice}: "
                f"type {self.advice(name)}")


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether `error`, or an error that caused it, says that PyTorch, Python or the system is out of memory."""
    if error is None or isinstance(error, OutOfMemory):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    message = str(error).lower()
    phrases = ("can't allocate memory", "not enough memory", "cannot allocate memory", "std::bad_alloc",
               "failed to allocate memory", "cublas_status_alloc_failed")
    return any(phrase in message for phrase in phrases) \
        or ("could not create a primitive" in message and _host_memory_exhausted()) \
        or _is_out_of_memory(error.__cause__)


def _host_memory_exhausted() -> bool:
    """Return whether the system refuses an allocation of PROBE_BYTES now.

    oneDNN reports a failed allocation and an unsupported shape with the same message. Only a trial
    allocation distinguishes the two cases.
    """
    try:
        mmap(-1, PROBE_BYTES, MAP_PRIVATE | MAP_ANONYMOUS).close()  # as malloc does; shared memory has other limits
    except OSError:
        return True
    return False
