"""Run folders of finished trials, without training, and a stand-in for the model registry of MLflow."""

import json
from pathlib import Path

from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.tracking.journal import Journal
from dreambooth.tracking.model_registry import Version

CLASS = "class_similarity_efficientnet_lite0"
SETTINGS = {"name": "demo-tiny-full", "evaluate.encoder": "efficientnet_lite0", "evaluate.images_per_prompt": "2",
            "evaluate.lpips": "null", "evaluate.objective": "instance_loss", "dataset.class_prompt": "a toy",
            "evaluate.max_class_similarity": "null"}


class Registry:
    """A stand-in for the model registry of MLflow, in memory."""

    def __init__(self, *_: str) -> None:
        self.versions: list[Version] = []
        self.aliases: dict[str, Version] = {}

    def get_by_alias(self, name: str, alias: str) -> Version | None:
        return self.aliases.get(alias)

    def register(self, name: str, run_id: str, folder: Path, tags: dict[str, str]) -> Version:
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
        (folder / "model" / (ADAPTER if adapter else "model_index.json")).write_text("{}")
        (folder / "result.json").write_text(json.dumps({
            "step": 4, "objective": objective, "model": "model", "exported_step": 4,
            "scores": {"instance_loss": objective, CLASS: class_similarity}, "base_scores": {CLASS: 0.38}}))
    return folder
