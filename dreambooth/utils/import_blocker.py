"""Libraries that others import and nobody has asked for."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """diffusers and peft import bitsandbytes for quantised models if it is installed, and it torch's compiler: 0.8 s of
    every start, for nothing. Who needs it imports it later."""
    from diffusers.utils import import_utils

    if "bitsandbytes" in sys.modules:
        yield
        return
    there = import_utils._bitsandbytes_available
    import_utils._bitsandbytes_available = False
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # "not installed", to whom it may concern
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        import_utils._bitsandbytes_available = there
        if "peft" in sys.modules:
            from peft.import_utils import is_bnb_4bit_available, is_bnb_available

            for remembered in (is_bnb_available, is_bnb_4bit_available):
                remembered.cache_clear()
