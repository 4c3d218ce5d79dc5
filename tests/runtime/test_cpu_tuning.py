"""Tests of CPU tuning: OpenMP threads spin long only on idle cores, and freed memory stays with the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth import cli
from dreambooth.config.schema import Config
from dreambooth.runtime import cpu_tuning
from dreambooth.runtime.cpu_tuning import LONG_SPIN, SHORT_SPIN, CpuTimes
from tests.support.faults import FAST

START = CpuTimes(clock=10.0, busy=100.0, own=1.0)


@pytest.mark.parametrize("until, spins", [
    (CpuTimes(11.0, 100.95, 1.9), LONG_SPIN),  # only this process
    (CpuTimes(11.0, 101.9, 1.9), SHORT_SPIN),  # another process uses a core
    (CpuTimes(10.1, 100.1, 1.1), SHORT_SPIN),  # too short an interval
    (CpuTimes(11.0, None, 1.9), SHORT_SPIN),  # no /proc
])
def test_threads_spin_long_only_if_other_processes_are_idle(until: CpuTimes, spins: str) -> None:
    assert cpu_tuning.openmp_environment(START, until) == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": spins}


def test_busy_time_is_read_from_proc_stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stat").write_text("cpu  100 200 300 9999 8888 10 20 30 0 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n", "ascii")
    monkeypatch.setattr(cpu_tuning, "PROC_STAT", tmp_path / "stat")
    monkeypatch.setattr(cpu_tuning.os, "sysconf", lambda name: 100)
    assert cpu_tuning.read_cpu_times().busy == pytest.approx(6.6)
    monkeypatch.setattr(cpu_tuning, "PROC_STAT", tmp_path / "none")
    assert cpu_tuning.read_cpu_times().busy is None


SCRIPT = """
import resource, sys, torch
from dreambooth.runtime import cpu_tuning
print(cpu_tuning.keep_freed_memory() if sys.argv[1] == "kept" else None)
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step(): return [torch.ones(2**24) for _ in range(4)]  # larger than any block that glibc keeps by default
for _ in range(8): step()
before = faults()
step()
print(faults() - before)
"""


def pages(how: str, **environment: str) -> tuple[str, int]:
    """What keep_freed_memory returned, and the page faults of allocating 256 MiB of tensors again."""
    process = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    returned, count = process.stdout.split()
    return returned, int(count)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_used_again_without_a_page_fault() -> None:
    returned, kept = pages("kept")
    _, mapped = pages("plain")
    assert returned == "True" and kept < mapped / 2 and mapped > 60_000


RELEASE_SCRIPT = """
import psutil, torch
from dreambooth.runtime import cpu_tuning
def resident(): return psutil.Process().memory_info().rss / 2**20
assert cpu_tuning.keep_freed_memory(), "the environment has settings of malloc"
before = resident()
tensors = [torch.ones(2**24) for _ in range(4)]
del tensors
kept = resident()
cpu_tuning.release_freed_memory()
print(round(kept - before), round(resident() - before))
"""


ORDER_SCRIPT = """
import sys
from dreambooth import train
from dreambooth.runtime import cpu_tuning, module_offload
from dreambooth.serialization import export
def tell(module, name, kinds=lambda *arguments: []):
    original = getattr(module, name)
    setattr(module, name, lambda *arguments: print("calls", name, *kinds(*arguments)) or original(*arguments))
tell(module_offload, "release_pages", lambda modules: [type(module).__name__ for module in modules])
tell(cpu_tuning, "release_freed_memory")
tell(export, "export")
sys.argv[0] = "dreambooth/train.py"
train.main()
"""


@pytest.mark.slow
def test_a_run_releases_idle_weights_before_it_trains_and_freed_memory_before_its_export(tmp_path: Path) -> None:
    words = [f"run_root={tmp_path}", *FAST, "train.max_train_steps=1", "sample.every=null"]
    process = subprocess.run([sys.executable, "-c", ORDER_SCRIPT, *words], capture_output=True, text=True, check=True)
    assert [line.split()[1:] for line in process.stdout.splitlines() if line.startswith("calls ")] == [
        ["release_pages", "UNet2DConditionModel"], ["release_pages", "AutoencoderKL"], ["release_freed_memory"],
        ["export"]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_returned() -> None:
    process = subprocess.run([sys.executable, "-c", RELEASE_SCRIPT], capture_output=True, text=True, check=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    kept, after = map(int, process.stdout.split())
    assert kept > 240 and after < 16, "MiB; the tensors have 256"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_the_users_malloc_settings_take_precedence() -> None:
    assert pages("kept", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"


def test_the_load_of_the_machine_is_read_when_the_job_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the start of the command and the job, Hydra composes the configuration: long enough to see the load."""
    readings: list[str] = []
    monkeypatch.setattr(cpu_tuning, "openmp_environment", lambda: readings.append("read") or {})
    monkeypatch.setattr(sys, "argv", ["dreambooth/train.py"])
    cli.run_hydra(lambda: readings.append("composed"), Config)
    assert readings == ["composed"]
    cli.run_job(lambda: readings.append("job"), sweep=False)
    assert readings == ["composed", "read", "job"]
