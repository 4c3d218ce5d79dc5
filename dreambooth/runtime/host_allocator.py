"""Memory of a CPU run that is freed stays the process's own, for the next tensor.

glibc maps a tensor of more than 32 MiB anew and gives it back when it is freed; the kernel then clears each page
again. A step of Stable Diffusion 1.5 makes and frees gigabytes of gradients and activations: 3.5 of its 19 CPU
seconds went there, 0.1 with this (docs/benchmarks.md). The numbers of a run do not change; its resident memory does
not sink between phases.
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>
CHOSEN = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")  # by the user


def keep() -> bool:
    """Tell glibc so; False: there is none, or the user has set it up."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or os.environ.keys() & set(CHOSEN):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
