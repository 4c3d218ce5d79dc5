"""Locks between processes, on every file system.

`hold` locks a file with flock (library filelock). The kernel releases such a lock when its holder ends, even if the
holder is killed. Some file systems have no flock: NFS without a lock daemon, and some FUSE and CSI drivers. There, the
lock is a lease. The holder writes a claim, a file in the folder `NAME.leases`, and writes it again every HEARTBEAT
seconds. A claim is over if it has not changed for LEASE seconds, measured with the clock of the process that waits. It
is over at once if its owner was a process of this machine that no longer runs. A holder whose claim another process
has removed ends at once, so that it writes nothing more.

filelock's own locks for such file systems do not suffice. A SoftFileLock of a killed process on another host lasts for
ever. A SoftFileLease is taken over by an exchange of two names, which NFS and most FUSE drivers refuse. A
SoftReadWriteLock needs hard links, and shuts out the other users of a group.
"""

import errno
import json
import logging
import math
import os
import random
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from dreambooth.errors import UserError

HEARTBEAT = 20.0  # seconds between two writes of a claim
LEASE = 120.0  # seconds without a change after which a claim is over
POLL = 0.5  # seconds between two looks at the claims of others
# Errors of flock on a file system without it. 524 is ENOTSUPP of the Linux kernel, for which Python has no name.
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524)

log = logging.getLogger(__name__)


class Locked(Exception):
    """Another process holds the lock.

    Attributes:
        owner: the description of this process; empty if it is not known.
    """

    def __init__(self, path: Path, owner: str = "") -> None:
        super().__init__(f"{path} is locked by {owner or 'another process'}")
        self.owner = owner


@contextmanager
def hold(path: Path, timeout: float = math.inf, watch: bool = True) -> Iterator[None]:
    """Context manager that locks the file `path`, whose folder exists, against other processes.

    Args:
        timeout: seconds to wait for a process that holds the lock.
        watch: whether to wait also for a holder that may have been killed on another machine: without flock, up to
            LEASE seconds pass until this is known.

    Raises:
        Locked: another process holds the lock.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=-1 if timeout == math.inf else timeout)
        release: Callable[[], None] = lock.release
    except Timeout as error:
        raise Locked(path) from error
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        lease = _Lease(path)
        lease.acquire(timeout, watch)
        release = lease.release
    try:
        yield
    finally:
        release()


class _Lease:
    """A lock that consists of a claim, which its owner has to renew.

    A process writes its claim first, and then lists the claims of others: of two processes that do this at the same
    time, at least one sees the claim of the other. It holds the lease if all other claims are over, and removes them.
    Otherwise it removes its own claim. A claim has a random name, so that no two processes write the same file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._folder = path, path.with_name(f"{path.name}.leases")
        self._token = secrets.token_hex(8)
        self._claim = self._folder / self._token
        # Claims of others: the last content, the time when it was first seen, and whether there was another before.
        self._seen: dict[str, tuple[bytes, float, bool]] = {}
        self._beats, self._released = 0, threading.Event()
        self._thread = threading.Thread(target=self._renew_until_released, name="lease", daemon=True)

    def acquire(self, timeout: float, watch: bool) -> None:
        """Wait until this process holds the lease.

        Raises:
            Locked: see `hold`.
        """
        start, warned = time.monotonic(), False
        while (other := self._attempt()) is not None:
            owner, runs = other
            if time.monotonic() - start >= timeout and (runs or not watch):
                raise Locked(self._path, owner)
            if not (runs or warned) and watch and time.monotonic() - start > 4 * POLL:
                warned = True
                log.warning("%s is locked by %s, and its file system has no flock: waiting up to %.0f s to see whether "
                            "this process runs", self._path, owner or "another process", LEASE)
            time.sleep(POLL * random.random())
        self._thread.start()

    def release(self) -> None:
        """Remove the claim of this process."""
        self._released.set()
        self._thread.join()
        self._claim.unlink(missing_ok=True)

    def _attempt(self) -> tuple[str, bool] | None:
        """Take the lease and return None; or return the description of another owner, and whether it surely runs."""
        others = self._read_claims()
        for name, content in others.items():
            runs = self._is_running(name, content)
            if runs is not False:
                return _describe(content), bool(runs)
        acquired = False
        try:
            self._folder.mkdir(exist_ok=True)
            self._write(os.O_CREAT | os.O_EXCL)
            rivals = self._read_claims()
            rivals.pop(self._token, None)
            acquired = rivals.items() <= others.items()
        finally:
            if not acquired:
                self._claim.unlink(missing_ok=True)
        if not acquired:
            return "", False
        for name in others:
            (self._folder / name).unlink(missing_ok=True)
        return None

    def _read_claims(self) -> dict[str, bytes]:
        """Return the content of all claims, by file name."""
        claims = {}
        with suppress(FileNotFoundError):
            for path in self._folder.iterdir():
                with suppress(FileNotFoundError):
                    claims[path.name] = path.read_bytes()
        return claims

    def _is_running(self, name: str, content: bytes) -> bool | None:
        """Return whether the owner of a claim runs: True, False (the claim is over), or None if this is not known."""
        owner, here = _parse(content), _machine()
        if here and owner.get("machine") == here:
            runs = _is_process(owner.get("pid"), owner.get("start"))
            if runs is not None:
                return runs
        now = time.monotonic()
        last, since, changed = self._seen.get(name, (content, now, False))
        if content != last:
            since, changed = now, True
        self._seen[name] = content, since, changed
        return False if now - since >= LEASE else changed or None

    def _write(self, flags: int) -> None:
        """Write the claim, always with the same size. The file is opened anew, so that NFS sends it to the server."""
        owner = {"machine": _machine(), "host": socket.gethostname(), "pid": os.getpid(),
                 "start": _read_start("self") if _machine() else "", "beats": f"{self._beats:012d}"}
        descriptor = os.open(self._claim, os.O_WRONLY | flags, 0o666)
        try:
            os.write(descriptor, json.dumps(owner).encode())
        finally:
            os.close(descriptor)

    def _renew_until_released(self) -> None:
        if problem := self._renew():
            _stop(problem)

    def _renew(self) -> str | None:
        """Renew the claim until the lease is released. Return a message as soon as it is lost."""
        renewed, pause = time.monotonic(), HEARTBEAT
        while not self._released.wait(pause):
            self._beats += 1
            try:
                self._write(0)
                renewed = time.monotonic()
                # A second claim means that another process is about to remove the claim of this one.
                pause = POLL if len(self._read_claims()) > 1 else HEARTBEAT
            except FileNotFoundError:
                if self._folder.exists():  # otherwise all files beside it were removed, too
                    return (f"another process has taken the lock {self._path}, because this one did not renew it for "
                            f"{LEASE:.0f} s: wait for the other process, then repeat the command")
            except OSError as error:  # such as EIO or ESTALE while the server of the volume is away
                if time.monotonic() - renewed > LEASE - HEARTBEAT:
                    return (f"the lock {self._path} cannot be renewed ({error}): repeat the command when its file "
                            "system works")
        return None


def _stop(message: str) -> NoReturn:
    """End this process without any further work, such as saving: the files may belong to another process now."""
    print(f"dreambooth: {message}", file=sys.stderr, flush=True)
    os._exit(UserError.exit_code)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:  # its owner is just writing it
        return {}
    return owner if isinstance(owner, dict) else {}


def _describe(content: bytes) -> str:
    owner = _parse(content)
    return f"process {owner.get('pid')} on {owner.get('host')}" if owner else ""


def _machine() -> str:
    """Return a name of the host, its boot and the container: in one machine, a process ID names one process.

    Return an empty string if this cannot be read.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _is_process(pid: Any, start: Any) -> bool | None:
    """Return whether a process of this machine runs and was started at `start`; None if this cannot be read.

    A process that has ended, but whose parent has not noticed yet (a zombie), does not run.
    """
    try:
        return _read_start(str(pid)) == str(start)
    except OSError:
        pass  # it has ended, or this user may not read of it
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, TypeError):
        pass
    return None


def _read_start(pid: str) -> str:
    """Return the start time of a process, in clock ticks since boot; an empty string if it has ended.

    Raises:
        OSError: there is no such process, or the user may not read of it.
    """
    state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return "" if state in ("Z", "X") else fields[18]
