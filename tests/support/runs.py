"""Reads and compares run folders."""

import json
from pathlib import Path

from safetensors.torch import load_file

from dreambooth.tracking.journal import read

KILLED = -9


def the_run(root: Path) -> Path:
    """The only demo run in a folder of runs."""
    [run] = root.glob("demo-*")
    return run


def losses(run: Path) -> dict[int, float]:
    """The loss of each step, from the journal."""
    by_step: dict[int, float] = {}
    for entry, _ in read(run / "metrics.jsonl"):
        if "loss" in entry.get("metrics", ()):
            assert entry["step"] not in by_step, "a step has two losses"
            by_step[entry["step"]] = entry["metrics"]["loss"]
    return by_step


def assert_same(run: Path, expected: Path, except_for: str = "") -> None:
    """Two runs have the same weights, training state, losses and samples, bit for bit.

    `except_for` is losses, samples, or empty.
    """
    last = sorted((expected / "checkpoints").iterdir())[-1].name
    folders = [Path("model/unet"), Path("model/text_encoder"), Path("model/vae"), Path("checkpoints") / last]
    for path in [p for folder in folders for p in sorted((expected / folder).glob("*.safetensors"))]:
        ours, theirs = load_file(run / path.relative_to(expected)), load_file(path)
        assert ours.keys() == theirs.keys()
        different = [name for name in theirs if not ours[name].equal(theirs[name])]
        assert not different, f"{path.relative_to(expected)}: {different[:3]}"
    assert except_for == "losses" or losses(run) == losses(expected)
    for path in sorted((expected / "samples").rglob("*.png")) if except_for != "samples" else ():
        assert (run / path.relative_to(expected)).read_bytes() == path.read_bytes(), path
    ours, theirs = (json.loads((r / "result.json").read_text()) for r in (run, expected))
    assert (ours["step"], ours["objective"]) == (theirs["step"], theirs["objective"])
    leftovers = [p for p in run.rglob(".*") if p.name.startswith((".writing-", ".removing-"))]
    assert not leftovers, "a temporary file or folder was left behind"


def flip_bit(path: Path, at: float = 0.5) -> None:
    """Change one bit of a file. `at` is the position: 0 is the beginning of the file, 1 the end."""
    content = bytearray(path.read_bytes())
    content[min(int(at * len(content)), len(content) - 1)] ^= 1
    path.write_bytes(content)
