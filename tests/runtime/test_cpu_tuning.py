"""Threads spin long before they sleep only where nobody else wants the cores."""

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
