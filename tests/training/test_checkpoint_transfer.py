"""Hosts without a shared disk resume from the checkpoint of the first one."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dreambooth.errors import DoesNotFit
from dreambooth.runtime.engine import Engine
from dreambooth.storage import manifest
from dreambooth.training import checkpoint_transfer
from dreambooth.utils import atomic_files
from tests.training.test_checkpoint import ToyModel, make_state, save, train


class Hosts:
    """Two hosts with one process each, which run one after the other in the same folder."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.sent = run_dir, list[Any]()
        self._lacking = False

    def resume(self, rank: int, resume: str = "auto") -> Path | None:
        """What a host resumes from. The first host sends objects, which the second then receives in this order."""
        received = iter(list(self.sent))

        def broadcast(value: Any) -> Any:
            if rank == 0:
                self.sent.append(value)
            return value if rank == 0 else next(received)

        def any_of(flag: Tensor) -> Tensor:
            return flag + float(self._lacking)

        return checkpoint_transfer.resume_point(self.run_dir, resume, Engine(
            rank=rank, world_size=2, local_world_size=1, broadcast=broadcast, all_reduce_mean=any_of))

    def resume_both(self, second: Path, lacking: bool = True, resume: str = "auto") -> Path | None:
        """Resume on the first host, then on a host whose run folder is `second`, which it replaces."""
        self._lacking = lacking
        first = self.resume(0, resume)
        assert first is not None
        self.run_dir.rename(self.run_dir.with_name("first"))
        second.rename(self.run_dir)
        return self.resume(1, resume)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    monkeypatch.setattr(checkpoint_transfer, "BLOCK", 300)  # several blocks a file
    run = tmp_path / "run"
    save(run / "checkpoints", train(make_state(ToyModel()), 2))
    return Hosts(run)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("content", ["none", "older", "same step, other run", "same state, other weights", "damaged"])
def test_a_host_without_the_checkpoint_gets_it_from_the_first(content: str, hosts: Hosts, tmp_path: Path) -> None:
    second = tmp_path / "second"
    original = hosts.run_dir / "checkpoints/step-000002"
    wanted = files(original)
    second.mkdir()
    if content == "older":
        save(second / "checkpoints", train(make_state(ToyModel()), 1))
        (second / "checkpoints" / f"{atomic_files.TEMPORARY_PREFIX}step-000007").mkdir()  # of a killed process
    elif content == "same step, other run":
        save(second / "checkpoints", train(make_state(ToyModel(), lr=1e-3), 2))
    elif content != "none":
        copy = shutil.copytree(original, second / "checkpoints/step-000002")
        weights = bytearray((copy / "trained.safetensors").read_bytes())
        weights[-1] ^= 1
        (copy / "trained.safetensors").write_bytes(weights)
        if content == "same state, other weights":
            manifest.write(copy)
    start = hosts.resume_both(second)
    assert start == original
    assert files(start) == wanted
    assert [path.name for path in start.parent.iterdir()] == ["step-000002"], "nothing else removes older checkpoints"
    assert len(hosts.sent) > 3 + len(wanted)


def test_a_host_that_has_the_checkpoint_receives_nothing(hosts: Hosts, tmp_path: Path) -> None:
    second = shutil.copytree(hosts.run_dir, tmp_path / "second")
    assert hosts.resume_both(second, lacking=False) == hosts.run_dir / "checkpoints/step-000002"
    assert len(hosts.sent) == 2, "the choice, and its state file and manifest"


def test_a_checkpoint_outside_the_run_folder_is_copied_into_it(hosts: Hosts, tmp_path: Path) -> None:
    """The other host may have no permission to write that path."""
    given = shutil.copytree(hosts.run_dir / "checkpoints/step-000002", tmp_path / "given/step-000002")
    wanted = files(given)
    (tmp_path / "second").mkdir()
    hosts._lacking = True
    assert hosts.resume(0, str(given)) == given
    shutil.rmtree(given)
    hosts.run_dir.rename(tmp_path / "first")
    (tmp_path / "second").rename(hosts.run_dir)
    start = hosts.resume(1, str(given))
    assert start == hosts.run_dir / "checkpoints/step-000002"
    assert files(start) == wanted


def test_one_host_and_a_new_run_send_nothing_but_the_choice(hosts: Hosts, tmp_path: Path) -> None:
    def broadcast(value: Any) -> Any:
        hosts.sent.append(value)
        return value

    found = [checkpoint_transfer.resume_point(folder, "auto", Engine(
        world_size=2, local_world_size=local, broadcast=broadcast))
        for folder, local in ((hosts.run_dir, 2), (tmp_path / "new", 1))]
    assert found == hosts.sent == [hosts.run_dir / "checkpoints/step-000002", None]


def test_a_full_disk_of_a_host_is_one_sentence(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "second").mkdir()
    monkeypatch.setattr(atomic_files, "sync", full)
    match = r"step-000002 in .*/checkpoints could not be written .*: free some space and repeat"
    with pytest.raises(DoesNotFit, match=match):
        hosts.resume_both(tmp_path / "second")
