"""Gives back the memory of weights that are mapped from files, until they are read again."""

import ctypes
import mmap
import sys
from collections.abc import Iterable

import psutil
from torch import nn


def release_pages(modules: Iterable[nn.Module]) -> int:
    """Release the resident pages of the files from which the weights of `modules` are mapped.

    Weights in the precision of their file are a private mapping of this file. The system keeps each page that was read
    in the resident memory of the process. A released page is read again, usually from the page cache, when it is next
    used. A mapping with a page that was written to is left alone, because its content is no longer that of the file.

    Returns:
        Released bytes; 0 on other systems than Linux, and where a process may not read its own memory map.
    """
    addresses = [tensor.data_ptr() for module in modules for tensor in (*module.parameters(), *module.buffers())
                 if tensor.device.type == "cpu"]
    if not addresses or sys.platform != "linux":
        return 0
    try:
        areas = psutil.Process().memory_maps(grouped=False)
    except (psutil.Error, OSError, AttributeError, ValueError):  # no or an unknown smaps; the saving is optional
        return 0
    madvise, released = ctypes.CDLL(None).madvise, 0
    for area in areas:
        start, end = (int(bound, 16) for bound in area.addr.split("-"))
        is_clean = area.rss and not area.anonymous and not area.swap  # the rss of anonymous huge pages is 0
        if (is_clean and area.path.startswith("/") and any(start <= address < end for address in addresses)
                and madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED) == 0):
            released += area.rss
    return released
