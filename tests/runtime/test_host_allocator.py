"""What a CPU run frees stays the process's own."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from dreambooth import heap
print(heap.keep() if sys.argv[1] == "kept" else None)
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step(): return [torch.ones(2**24) for _ in range(4)]  # larger than what glibc ever keeps by itself
for _ in range(8): step()
before = faults()
step()
print(faults() - before)
"""


def pages(how: str, **environment: str) -> tuple[str, int]:
    """What `keep` said, and how many pages the kernel made for 256 MiB of tensors that had been there before."""
    ran = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    said, count = ran.stdout.split()
    return said, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_used_again_without_a_page_fault() -> None:
    said, kept = pages("kept")
    _, mapped = pages("plain")
    assert said == "True" and kept < mapped / 2 and mapped > 60_000


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_what_the_user_has_set_wins() -> None:
    assert pages("kept", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"
