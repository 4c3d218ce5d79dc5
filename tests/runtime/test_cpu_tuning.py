"""CPU tuning: OpenMP threads spin long only on idle cores, and freed memory stays with the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth.runtime import cpu_tuning
from dreambooth.runtime.cpu_tuning import LONG, SHORT, Moment

BEGAN = Moment(clock=10.0, busy=100.0, own=1.0)


@pytest.mark.parametrize("until, spins", [
    (Moment(11.0, 100.95, 1.9), LONG),  # this process alone
    (Moment(11.0, 101.9, 1.9), SHORT),  # a neighbour takes a core
    (Moment(10.1, 100.1, 1.1), SHORT),  # too short to tell
    (Moment(11.0, None, 1.9), SHORT),  # no /proc
])
def test_who_else_is_at_work_decides(until: Moment, spins: str) -> None:
    assert cpu_tuning.waiting(BEGAN, until) == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": spins}


def test_the_kernels_seconds_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stat").write_text("cpu  100 200 300 9999 8888 10 20 30 0 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n", "ascii")
    monkeypatch.setattr(cpu_tuning, "STAT", tmp_path / "stat")
    monkeypatch.setattr(cpu_tuning.os, "sysconf", lambda name: 100)
    assert cpu_tuning.now().busy == pytest.approx(6.6)
    monkeypatch.setattr(cpu_tuning, "STAT", tmp_path / "none")
    assert cpu_tuning.now().busy is None


SCRIPT = """
import resource, sys, torch
from dreambooth.runtime import cpu_tuning
print(cpu_tuning.keep_freed_memory() if sys.argv[1] == "kept" else None)
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
