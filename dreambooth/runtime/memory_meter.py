"""Memory by phase of a run (load, class_images, caching, step, sample, save), and what to say when it runs out."""

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import psutil
import torch

from dreambooth.errors import OutOfMemory
from dreambooth.utils.hardware import GIB

PROBE = 2**30  # bytes; a machine with room for more than this is not full


class Meter:
    """Reads peaks: the CUDA allocator's on a GPU, the process's resident set (named so) on a CPU."""

    def __init__(self, device: torch.device, advice: Callable[[str], str] = lambda phase: "memory=lowest",
                 predicted: Mapping[str, float] | None = None, kept: str = "earlier checkpoints are kept") -> None:
        """Args:
            advice: phase -> the overrides to type when memory runs out in it.
            predicted: peaks by phase in GiB, from the planner; a phase may be missing.
            kept: what is not lost when memory runs out.
        """
        self.device = device
        self.advice = advice
        self.predicted = predicted or {}
        self.kept = kept
        self.current = "start"
        self.peaks: dict[str, float] = {}
        self._process = psutil.Process()  # once: it looks up when it began

    @property
    def expected(self) -> dict[str, float]:
        """What was predicted, by metric name: beside `vram/<phase>/reserved_gib`, which is seen."""
        return {f"predicted_vram/{phase}/reserved_gib": value for phase, value in self.predicted.items()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Account what follows to `name`; phases may nest.

        Raises:
            OutOfMemory: memory ran out inside.
        """
        outer, self.current = self.current, name
        self._reset()
        try:
            yield
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(self._sentence(name)) from error
        finally:
            self.read(name)
            self._reset()
            self.current = outer

    def read(self, name: str) -> dict[str, float]:
        """Peaks of phase `name` so far, GiB, by metric name."""
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

    def _sentence(self, name: str) -> str:
        expected = f"predicted {self.predicted[name]:.2f} GiB, " if name in self.predicted else ""
        self.read(name)
        seen = ", ".join(f"{key} {value:.2f}" for key, value in self.peaks.items() if f"/{name}" in key)
        return f"out of memory during {name} ({expected}seen {seen}); {self.kept}: type {self.advice(name)}"


def _is_out_of_memory(error: BaseException | None) -> bool:
    """True if the error, or the one that it was made from, says so: of PyTorch, of Python, of the system."""
    if error is None or isinstance(error, OutOfMemory):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    said = str(error).lower()
    known = ("can't allocate memory", "not enough memory", "cannot allocate memory", "std::bad_alloc",
             "failed to allocate memory", "cublas_status_alloc_failed")
    return any(words in said for words in known) or ("could not create a primitive" in said and _refused()) \
        or _is_out_of_memory(error.__cause__)


def _refused() -> bool:
    """Whether the system gives no memory now: oneDNN says the same of that as of what it cannot compute."""
    try:
        mmap(-1, PROBE, MAP_PRIVATE | MAP_ANONYMOUS).close()  # as malloc asks: shared memory has limits of its own
    except OSError:
        return True
    return False
