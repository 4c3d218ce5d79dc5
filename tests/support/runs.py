"""Reads, compares and makes run folders; a stand-in for the model registry of MLflow."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.tracking.journal import Journal, read
from dreambooth.tracking.model_registry import Version

KILLED = -9
CLASS = "class_similarity_efficientnet_lite0"
SETTINGS = {"name": "demo-tiny-full", "evaluate.encoder": "efficientnet_lite0", "evaluate.images_per_prompt": "2",
            "evaluate.lpips": "null", "evaluate.objective": "instance_loss", "dataset.class_prompt": "a toy",
            "evaluate.max_class_similarity": "null"}


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


class Registry:
    """A stand-in for the model registry of MLflow, in memory."""

    def __init__(self, *_: str) -> None:
        self.versions: list[Version] = []
        self.aliases: dict[str, Version] = {}

    def get_by_alias(self, name: str, alias: str) -> Version | None:
        return self.aliases.get(alias)

    def register(self, name: str, run_id: str, folder: Path, tags: dict[str, str],
                 as_mlflow_model: Any = None) -> Version:
        assert {"model_index.json", ADAPTER} & {path.name for path in folder.iterdir()}
        existing = [version for version in self.versions
                    if version.run_id == run_id and tags.items() <= version.tags.items()]
        if not existing:
            existing = [Version(name, len(self.versions) + 1, run_id, tags)]
            self.versions += existing
        return existing[-1]

    def list_versions(self, name: str) -> list[Version]:
        return self.versions

    def set_tag(self, version: Version, key: str, value: str) -> None:
        version.tags[key] = value

    def set_alias(self, version: Version, alias: str) -> None:
        self.aliases[alias] = version

    def delete_alias(self, name: str, alias: str) -> None:
        del self.aliases[alias]


def trial(root: Path, name: str, objective: float, class_similarity: float = 0.4, *, sweep: str = "s",
          done: bool = True, photos: str = "digest", **settings: str) -> Path:
    """Make a run folder; its class similarity was 0.38 before training."""
    folder = root / name
    journal = Journal(folder / "metrics.jsonl")
    journal.set_tags({"sweep": sweep})
    if photos:
        journal.log_dataset({"name": "demo", "digest": photos, "source": "photos", "photos": "5"})
    journal.close()
    run_settings = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    (folder / "run.json").write_text(json.dumps({"settings": run_settings}))
    if done:
        (folder / "model").mkdir()
        adapter = run_settings.get("method.kind", "full") != "full" and run_settings.get("method.merge") != "True"
        if adapter:
            save_file({}, folder / "model" / ADAPTER)
        else:
            (folder / "model/model_index.json").write_text("{}")
        (folder / "result.json").write_text(json.dumps({
            "step": 4, "objective": objective, "model": "model", "exported_step": 4,
            "scores": {"instance_loss": objective, CLASS: class_similarity}, "base_scores": {CLASS: 0.38}}))
    return folder
