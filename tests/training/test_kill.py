"""A run killed with SIGKILL, or stopped by a full disk, and repeated gives the result of an uninterrupted run."""

import re
from pathlib import Path

import pytest

from tests.support.faults import FAULTS, train
from tests.support.runs import KILLED, assert_same, the_run

FAULT_POINTS = [name for name in FAULTS if name not in ("random_moment", "checkpoint_rename")]


def kill_and_repeat(tmp_path: Path, uninterrupted: Path, *faults: tuple[str, int]) -> None:
    for fault, seed in faults:
        assert train(tmp_path, fault=fault, seed=seed) == KILLED, f"the fault {fault} did not happen"
    assert train(tmp_path) == 0
    assert_same(the_run(tmp_path), uninterrupted)


@pytest.mark.parametrize("fault", ["checkpoint_rename", pytest.param("random_moment", marks=pytest.mark.slow)])
def test_killed_run_repeated_is_bit_equal(fault: str, tmp_path: Path, uninterrupted: Path) -> None:
    kill_and_repeat(tmp_path, uninterrupted, (fault, 3))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULT_POINTS)
def test_killed_at_a_fault_point(fault: str, tmp_path: Path, uninterrupted: Path) -> None:
    kill_and_repeat(tmp_path, uninterrupted, (fault, 0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 4, 5])
def test_killed_at_a_random_moment(seed: int, tmp_path: Path, uninterrupted: Path) -> None:
    kill_and_repeat(tmp_path, uninterrupted, ("random_moment", seed))


@pytest.mark.slow
def test_killed_twice(tmp_path: Path, uninterrupted: Path) -> None:
    kill_and_repeat(tmp_path, uninterrupted, ("checkpoint_write", 0), ("checkpoint_rotate", 0))


@pytest.mark.slow
def test_a_disk_that_is_full_while_an_image_is_written_has_its_exit_code(
    tmp_path: Path, uninterrupted: Path
) -> None:
    for name in (r"\d+\.png", "step-000000"):  # the second class image, then the first sample
        log = tmp_path / f"{name}.txt"
        assert train(tmp_path, fault="full_disk", seed=1, log=log) == 3
        assert re.search(rf"the disk is full \(.*/{name}'\): free some space and repeat", log.read_text())
        assert "Traceback" not in log.read_text() and "Logging error" not in log.read_text()
    assert train(tmp_path) == 0
    assert_same(the_run(tmp_path), uninterrupted)
    assert not list(tmp_path.rglob(".writing-*"))
