"""Locks on file systems without flock: never two holders, and a killed holder does not lock for ever."""

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.runs.run_folder import find_resume_point, locked, remove_if_unused
from dreambooth.utils import file_lock
from dreambooth.utils.file_lock import Locked, hold
from tests.tracking.mlflow_servers import wait_for

FOREIGN = {"machine": "another", "host": "node-7", "pid": 1, "start": "5", "beats": "000000000000"}


def fail_with(monkeypatch, number: int) -> None:
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without flock, and short times."""
    fail_with(monkeypatch, errno.ENOLCK)
    for name, seconds in (("HEARTBEAT", 0.02), ("LEASE", 0.5), ("POLL", 0.01)):
        monkeypatch.setattr(file_lock, name, seconds)


@pytest.fixture
def lost(monkeypatch):
    """The message of a holder that has lost its lock, instead of the end of the process."""
    messages = []
    monkeypatch.setattr(file_lock, "_stop", messages.append)
    return messages


def claims(path: Path) -> list[Path]:
    return list(path.with_name(f"{path.name}.leases").iterdir())


def write_claim(path: Path, **owner: object) -> Path:
    claim = path.with_name(f"{path.name}.leases") / "0123456789abcdef"
    claim.parent.mkdir(exist_ok=True)
    claim.write_text(json.dumps(FOREIGN | owner))
    return claim


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, 524])
def test_a_lock_works_without_flock_and_is_released(tmp_path, monkeypatch, number):
    fail_with(monkeypatch, number)
    for _ in range(2):
        with locked(tmp_path / "run"):
            assert len(claims(tmp_path / "run/.lock")) == 1
    assert claims(tmp_path / "run/.lock") == []


def test_a_holder_on_this_machine_is_known_at_once(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(file_lock, "LEASE", 100.0)
    with locked(tmp_path), pytest.raises(UserError, match=rf"another process \(process {os.getpid()} on \S+\) is "
                                                            "training in .*: wait"), locked(tmp_path):
        pass


def test_a_killed_holder_on_this_machine_loses_its_lock_at_once(tmp_path, no_flock, monkeypatch):
    """Also if its process ID belongs to another process now, and if it is a zombie."""
    monkeypatch.setattr(file_lock, "LEASE", 100.0)
    dead = subprocess.Popen(["true"])
    wait_for(lambda: Path(f"/proc/{dead.pid}/stat").read_text().split()[2] == "Z", 5)
    for pid, start in ((os.getpid(), "1"), (dead.pid, "1"), (2**22 + 1, "1")):
        write_claim(tmp_path / ".lock", machine=file_lock._machine(), pid=pid, start=start)
        with locked(tmp_path):
            assert len(claims(tmp_path / ".lock")) == 1
    dead.wait()


def test_a_process_that_may_not_be_read_is_not_taken_for_dead(tmp_path, monkeypatch):
    """Another user's process, where /proc is mounted with hidepid."""
    def refuse(pid):
        raise OSError(errno.ENOENT, "hidden")

    monkeypatch.setattr(file_lock, "_read_start", refuse)
    assert file_lock._is_process(os.getpid(), "1") is None


def test_a_killed_holder_on_another_machine_loses_its_lock_after_the_lease(tmp_path, no_flock, caplog):
    write_claim(tmp_path / ".lock")
    start = time.monotonic()
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        assert time.monotonic() - start >= file_lock.LEASE
    assert "locked by process 1 on node-7" in caplog.text


def test_a_holder_on_another_machine_keeps_its_lock_while_it_renews_its_claim(tmp_path, no_flock):
    claim, ended = write_claim(tmp_path / ".lock"), threading.Event()

    def renew():
        beats = 0
        while not ended.wait(0.03):
            beats += 1
            claim.write_text(json.dumps(FOREIGN | {"beats": f"{beats:012d}"}))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"another process \(process 1 on node-7\)"), locked(tmp_path):
            pass
        with pytest.raises(Locked, match=r"/\.lock is locked by process 1 on node-7"), hold(
                tmp_path / ".lock", timeout=0.6):
            pass
    finally:
        ended.set()
        thread.join()
    with hold(tmp_path / ".lock"):  # it waits until the other process no longer renews its claim
        assert claim not in claims(tmp_path / ".lock")


def test_a_holder_that_has_lost_its_claim_stops(tmp_path, no_flock, lost):
    with locked(tmp_path):
        claims(tmp_path / ".lock")[0].unlink()
        wait_for(lambda: lost, 5)
        time.sleep(0.05)
        assert claims(tmp_path / ".lock") == [], "it must not write the claim again"
    assert "another process has taken the lock" in lost[0]


def test_a_holder_that_cannot_renew_its_claim_stops(tmp_path, no_flock, lost, monkeypatch):
    def fail(lease, flags):
        raise OSError(errno.EIO, "Input/output error")

    with locked(tmp_path):
        monkeypatch.setattr(file_lock._Lease, "_write", fail)
        wait_for(lambda: lost, 5)
    assert "cannot be renewed" in lost[0]


def test_a_lost_lock_ends_the_process_with_one_sentence():
    ended = subprocess.run([sys.executable, "-c", "from dreambooth.utils import file_lock\n"
                            "try: file_lock._stop('it is lost')\nfinally: print('more work')"],
                           capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "dreambooth: it is lost\n")


def test_one_of_many_processes_holds_the_lock_at_a_time(tmp_path, no_flock):
    write_claim(tmp_path / "lock")  # of a killed process: all of them see it expire at the same time
    inside, most, entered = [], [], []

    def enter(number):
        with hold(tmp_path / "lock"):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)
            entered.append(number)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (max(most), sorted(entered)) == (1, list(range(6)))


def test_the_claims_belong_to_no_run(tmp_path, no_flock):
    """The folder of the claims is neither moved to earlier-TIME/ nor counts as a file of a run, and goes with it."""
    with locked(tmp_path / "run"):
        assert find_resume_point(tmp_path / "run", "never") is None
        assert len(claims(tmp_path / "run/.lock")) == 1
        remove_if_unused(tmp_path / "run", tmp_path)
        assert (tmp_path / "run").is_dir()
    remove_if_unused(tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_lock_of_an_unknown_holder_is_a_message_too(tmp_path):
    with locked(tmp_path):
        with pytest.raises(Locked, match=rf"^{tmp_path}/\.lock is locked by another process$"), hold(
                tmp_path / ".lock", timeout=0):
            pass
        with pytest.raises(UserError, match=r"^another process is training in"), locked(tmp_path):
            pass


def test_another_error_of_flock_is_not_hidden(tmp_path, monkeypatch):
    fail_with(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), hold(tmp_path / "lock"):
        pass
