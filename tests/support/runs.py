"""Run folders, read and compared."""

import json
from pathlib import Path

from safetensors.torch import load_file

from dreambooth.tracking.journal import read

KILLED = -9


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
