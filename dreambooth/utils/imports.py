"""Context managers that shorten the import of large libraries. Their blocks contain the import statements."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Switch off garbage collection inside the block, which makes an import of large libraries a fifth faster.

    Such an import creates no garbage that a collection could free.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Hide bitsandbytes, as if it were not installed. This makes the start of each command 0.8 s faster.

    If bitsandbytes is installed, diffusers and peft import it for quantised models, and bitsandbytes imports torch's
    compiler. The few runs that use bitsandbytes import it after the block. If bitsandbytes has already been imported,
    do nothing.
    """
    from diffusers.utils import import_utils

    if "bitsandbytes" in sys.modules:
        yield
        return
    available = import_utils._bitsandbytes_available
    import_utils._bitsandbytes_available = False
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # makes `import bitsandbytes` raise ImportError
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        import_utils._bitsandbytes_available = available
        if "peft" in sys.modules:
            from peft.import_utils import is_bnb_4bit_available, is_bnb_available

            for cached_check in (is_bnb_available, is_bnb_4bit_available):
                cached_check.cache_clear()
