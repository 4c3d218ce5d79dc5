"""Two users of one group share a run root. Each gets a right result or one sentence, and loses nothing by the other."""

import ctypes
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dreambooth.runs.run_folder import read_result
from dreambooth.storage import manifest
from dreambooth.utils.file_lock import hold
from tests.support import faults
from tests.support.runs import assert_same
from tests.support.warm_python import PYTHON
from tools.torture.trial import Place, TortureError, Trial

UMASKS = ((0o002, 0o002), (0o002, 0o027), (0o027, 0o002), (0o027, 0o027))
CLONE_NEWNS, MS_BIND, MS_PRIVATE_OF_ALL = 0x20000, 0x1000, 0x44000  # of the kernel: linux/sched.h, linux/mount.h


@dataclass(frozen=True)
class User:
    """A user who was made for a trial."""

    name: str  # in the report
    uid: int
    gid: int
    umask: int
    home: Path


def trials() -> list[Trial]:
    """The trials of this file. They create users, which needs root, and the programs useradd and groupadd."""
    return [Trial("users of one group", f"umask {first:03o}, and umask {second:03o}", share_root, (first, second),
                  needs_root=True) for first, second in UMASKS]


def share_root(place: Place, first: int, second: int) -> str:
    """Let two users train, extend, draw, promote and compare in one root. Return what was refused, and "equal"."""
    with two_users(place, first, second) as users:
        ann, bob = users
        team = Team(place)
        short, seed = ("train.max_train_steps=4", "tracking=mlflow", "tracking.sweep=team"), "train.seed=2"
        [of_ann] = team.train(ann, "trains", *short)
        [of_bob] = team.train(bob, "trains", *short, seed) - {of_ann}
        for user, other, run in ((bob, ann, of_ann), (ann, bob, of_bob)):
            if team.call(user, f"draws with {other.name}'s run", "generate", f"run={run}", "num_inference_steps=1"):
                team.call(user, "draws into another folder", "generate", f"run={run}", "num_inference_steps=1",
                          f"out={user.home / 'pictures'}", must=True)
        longer = ("tracking=mlflow", "tracking.sweep=team")
        for user, other, overrides in ((bob, ann, longer), (ann, bob, (*longer, seed)),
                                       (ann, ann, longer), (bob, bob, (*longer, seed))):
            team.train(user, f"extends {other.name}'s run", *overrides, must=False)
        for user in users:
            team.call(user, "promotes", "promote", "sweep=team", f"run_root={place.folder}", "allow_unmeasured=true",
                      "replace=true")
            if team.call(user, "compares", "compare", "sweep=team", f"run_root={place.folder}"):
                team.call(user, "compares into another folder", "compare", "sweep=team", f"run_root={place.folder}",
                          f"out={user.home / 'compare.html'}", must=True)
        if team.refused and (first, second) == UMASKS[0]:
            raise TortureError(f"refused although all files may be written: {'; '.join(team.refused)}")
        try:
            assert_same(of_ann, place.reference)
        except Exception as error:
            raise TortureError(f"ann's run differs from that of one user: {error}") from error
    return "equal" + (f"; refused in one sentence: {', '.join(team.refused)}" if team.refused else "; nothing refused")


class Team:
    """Starts commands as users, and checks after each of them that no run has lost anything."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.refused: list[str] = []  # what was refused with one sentence
        self.steps: dict[Path, int] = {}  # completed steps of each run

    def train(self, user: User, what: str, *overrides: str, must: bool = True) -> set[Path]:
        """Train as a user. Return all run folders."""
        settings = (f"run_root={self.place.folder}", *faults.FAST, *self.place.settings, *overrides)
        self.call(user, what, "train", *settings, must=must)
        return set(self.steps)

    def call(self, user: User, what: str, command: str, *arguments: str, must: bool = False) -> int:
        """Run a command as a user. Return its exit code: 0, or 1 if the command was refused with one sentence.

        Args:
            must: whether the command has to succeed.
        """
        start = len(self.place.output())
        words = [PYTHON, "-m", __name__, *map(str, (user.uid, user.gid, user.umask, user.home)), command, *arguments]
        with self.place.log.open("ab") as log:
            code = subprocess.run(words, cwd=faults.ROOT, stdout=log, stderr=log, timeout=600, check=False).returncode
        self.place.check_output(code, start)
        what = f"{user.name} {what}"
        sentences = [line for line in self.place.output()[start:].splitlines() if line.startswith("dreambooth: ")]
        if code not in (0, 1) or len(sentences) != code or (must and code):
            raise TortureError(f"{what}: exit code {code}: {self.place.sentence()}")
        if code:
            self.refused.append(what)
        self._check_runs(what)
        return code

    def _check_runs(self, what: str) -> None:
        for run in self.place.folder.glob("demo-*"):
            result = read_result(run)
            damage = manifest.find_damage(run / "model") if (run / "model").is_dir() else "the model is missing"
            if result is None or damage or result.step < self.steps.get(run, 0):
                raise TortureError(f"{what}: {run.name} has lost something: {damage or result}")
            self.steps[run] = result.step


@contextmanager
def two_users(place: Place, first: int, second: int) -> Iterator[tuple[User, User]]:
    """Create a group with two users, to whom the folder of the trial belongs. Remove them at the end."""
    lock = Path(tempfile.gettempdir()) / "torture-users.lock"  # useradd does not wait for another
    group = f"torture-{os.getpid()}"
    names = [f"{group}-ann", f"{group}-bob"]
    try:
        with hold(lock):
            _run("groupadd", group)
            for name in names:
                _run("useradd", "--no-create-home", "--no-user-group", "--gid", group, name)
        import pwd

        place.folder.parent.chmod(0o711)
        users = []
        for name, umask in zip(names, (first, second), strict=True):
            entry = pwd.getpwnam(name)
            home = place.folder / f"home-{name.rpartition('-')[2]}"
            home.mkdir()
            os.chown(home, entry.pw_uid, entry.pw_gid)
            users.append(User(name.rpartition("-")[2], entry.pw_uid, entry.pw_gid, umask, home))
        os.chown(place.folder, 0, users[0].gid)
        place.folder.chmod(0o2775)
        yield users[0], users[1]
    finally:
        with hold(lock):
            for name in names:
                subprocess.run(["userdel", name], check=False, capture_output=True)
            subprocess.run(["groupdel", group], check=False, capture_output=True)


def _run(*words: str) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise TortureError(f"{words[0]}: {done.stderr.strip()}")


def become(uid: int, gid: int, umask: int, home: str) -> None:
    """Make this process one of a user. The user sees Python and the repository even if they are in root's home."""
    _uncover((sys.base_prefix, sys.prefix, str(faults.ROOT)))
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    os.umask(umask)
    os.environ["HOME"] = home


def _uncover(paths: Sequence[str]) -> None:
    """For this process alone, mount folders again above those of their parents that other users may not enter."""
    covers = {path: next((parent for parent in reversed(Path(path).parents) if not parent.stat().st_mode & 0o001), None)
              for path in paths}
    if not any(covers.values()):
        return
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), "a mount in a process of its own failed")

    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, MS_PRIVATE_OF_ALL, None))
    opened = {path: os.open(path, os.O_PATH) for path, cover in covers.items() if cover}
    for cover in {str(cover) for cover in covers.values() if cover}:
        check(libc.mount(b"tmpfs", cover.encode(), b"tmpfs", 0, b"mode=755"))
    for path, descriptor in opened.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        check(libc.mount(f"/proc/self/fd/{descriptor}".encode(), path.encode(), None, MS_BIND, None))
        os.close(descriptor)
    os.chdir(faults.ROOT)


if __name__ == "__main__":
    _, user_id, group_id, mask, home_folder, command_name, *words_after = sys.argv
    become(int(user_id), int(group_id), int(mask), home_folder)
    sys.argv = [f"dreambooth/{command_name}.py", *words_after]
    importlib.import_module(f"dreambooth.{command_name}").main()
