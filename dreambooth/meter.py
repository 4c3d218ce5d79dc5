"""Memory by phase of a run (load, class_images, caching, step, sample, save), and what to say when it runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from dreambooth.errors import OutOfMemory
from dreambooth.machine import GIB


class Meter:
    """Reads peaks: the CUDA allocator's on a GPU, the process's resident set (named so) on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.current = "start"
        self.peaks: dict[str, float] = {}

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
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(self._advice(name)) from error
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
            now = {f"process_rss/{name}_gib": psutil.Process().memory_info().rss / GIB}
        for key, value in now.items():
            self.peaks[key] = max(value, self.peaks.get(key, 0.0))
        return now

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _advice(self, name: str) -> str:
        smaller = {
            "class_images": "prior.sample_batch_size=1", "sample": "sample.images_per_prompt=1",
            "evaluate": "prior.sample_batch_size=1",
        }.get(name, "memory=low, optimizer=adamw8bit or train.train_batch_size=1")
        seen = ", ".join(f"{key} {value:.2f}" for key, value in self.read(name).items())
        return f"out of memory during {name} ({seen}); earlier checkpoints are kept: type {smaller}"


def _is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)
