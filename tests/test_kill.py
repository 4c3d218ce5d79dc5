"""Kill -9 anywhere, repeat the command: the result is bit for bit that of the uninterrupted run."""

import json
from pathlib import Path

import pytest
from faults import FAULTS, train
from safetensors.torch import load_file

from dreambooth.tracking.journal import read

KILLED = -9
PLACES = [name for name in FAULTS if name != "random_moment"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    root = tmp_path_factory.mktemp("straight")
    assert train(root) == 0
    return the_run(root)


def the_run(root: Path) -> Path:
    [run] = root.glob("demo-*")
    return run


def losses(run: Path) -> dict[int, float]:
    found: dict[int, float] = {}
    for entry, _ in read(run / "metrics.jsonl"):
        if "loss" in entry.get("metrics", ()):
            assert entry["step"] not in found, "a step has two points"
            found[entry["step"]] = entry["metrics"]["loss"]
    return found


def assert_same(run: Path, straight: Path) -> None:
    """Every weight, the whole training state, every loss and every sample."""
    last = sorted((straight / "checkpoints").iterdir())[-1].name
    folders = [Path("model/unet"), Path("model/text_encoder"), Path("model/vae"), Path("checkpoints") / last]
    for path in [p for folder in folders for p in sorted((straight / folder).glob("*.safetensors"))]:
        ours, theirs = load_file(run / path.relative_to(straight)), load_file(path)
        assert ours.keys() == theirs.keys()
        different = [name for name in theirs if not ours[name].equal(theirs[name])]
        assert not different, f"{path.relative_to(straight)}: {different[:3]}"
    assert losses(run) == losses(straight)
    for path in sorted((straight / "samples").rglob("*.png")):
        assert (run / path.relative_to(straight)).read_bytes() == path.read_bytes(), path
    ours, theirs = (json.loads((r / "result.json").read_text()) for r in (run, straight))
    assert (ours["step"], ours["objective"]) == (theirs["step"], theirs["objective"])
    left = [p for p in run.rglob(".*") if p.name.startswith((".writing-", ".removing-"))]
    assert not left, "something half done was left behind"


def kill_and_repeat(tmp_path: Path, straight: Path, *faults: tuple[str, int]) -> None:
    for fault, seed in faults:
        assert train(tmp_path, fault=fault, seed=seed) == KILLED, f"{fault} never came"
    assert train(tmp_path) == 0
    assert_same(the_run(tmp_path), straight)


@pytest.mark.parametrize("fault", ["checkpoint_rename", "random_moment"])
def test_killed_run_repeated_is_bit_equal(fault: str, tmp_path: Path, straight: Path) -> None:
    kill_and_repeat(tmp_path, straight, (fault, 3))


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLACES)
def test_killed_at_a_fault_point(fault: str, tmp_path: Path, straight: Path) -> None:
    kill_and_repeat(tmp_path, straight, (fault, 0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_a_random_moment(seed: int, tmp_path: Path, straight: Path) -> None:
    kill_and_repeat(tmp_path, straight, ("random_moment", seed))


@pytest.mark.slow
def test_killed_twice(tmp_path: Path, straight: Path) -> None:
    kill_and_repeat(tmp_path, straight, ("checkpoint_write", 0), ("checkpoint_rotate", 0))
