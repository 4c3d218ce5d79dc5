"""Detection of this machine's GPU. Before a run starts, no other module queries devices through torch."""

from dataclasses import dataclass

from dreambooth.utils.imports import without_garbage_collection

GIB = 2**30  # bytes


@dataclass(frozen=True)
class Machine:
    """A machine, described by its first CUDA GPU. Every field is None if the machine has no CUDA GPU.

    Attributes:
        gpu: name of the GPU.
        vram_gib: memory of the GPU in GiB.
        compute_capability: CUDA compute capability of the GPU, such as 7.5.
    """

    gpu: str | None = None
    vram_gib: float | None = None
    compute_capability: float | None = None

    @property
    def cuda(self) -> bool:
        """Whether the machine has a CUDA GPU."""
        return self.gpu is not None


def detect_machine() -> Machine:
    """Return a description of this machine's first CUDA GPU. Imports torch."""
    with without_garbage_collection():
        import torch

    if not torch.cuda.is_available():
        return Machine()
    gpu = torch.cuda.get_device_properties(0)
    return Machine(gpu=gpu.name, vram_gib=gpu.total_memory / GIB, compute_capability=gpu.major + gpu.minor / 10)
