"""Promotion: the best of a sweep under a rule, and nothing else, becomes the champion."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dreambooth.errors import UserError
from dreambooth.runs import report
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.sweeps import promotion
from dreambooth.sweeps.html_page import page
from dreambooth.sweeps.promotion import Terms, offer, promote
from dreambooth.sweeps.summary import value
from dreambooth.sweeps.trials import find
from dreambooth.tracking.journal import Journal
from dreambooth.tracking.model_registry import CANDIDATE, CHAMPION, Version

CLASS = "class_similarity_efficientnet_lite0"
SETTINGS = {"name": "demo-tiny-full", "evaluate.encoder": "efficientnet_lite0", "evaluate.images_per_prompt": "2",
            "evaluate.lpips": "null", "evaluate.objective": "instance_loss", "dataset.class_prompt": "a toy",
            "evaluate.max_class_similarity": "null"}


class Registry:
    """MLflow's, in memory."""

    def __init__(self, uri: str = "") -> None:
        self.versions: list[Version] = []
        self.aliases: dict[str, Version] = {}

    def holder(self, name: str, alias: str) -> Version | None:
        return self.aliases.get(alias)

    def register(self, name: str, run_id: str, folder: Path, tags: dict[str, str]) -> Version:
        assert {"model_index.json", ADAPTER} & {path.name for path in folder.iterdir()}
        known = [found for found in self.versions if found.run_id == run_id and tags.items() <= found.tags.items()]
        if not known:
            known = [Version(name, len(self.versions) + 1, run_id, tags)]
            self.versions += known
        return known[-1]

    def name_holder(self, version: Version, alias: str) -> None:
        self.aliases[alias] = version

    def drop(self, name: str, alias: str) -> None:
        del self.aliases[alias]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    held = Registry()
    monkeypatch.setattr(promotion, "Registry", lambda uri: held)
    monkeypatch.setattr(promotion, "_sent", lambda trial, terms: ("sqlite:///", f"id-{trial.folder.name}"))
    return held


def trial(root: Path, name: str, objective: float, alike: float = 0.4, *, sweep: str = "s", done: bool = True,
          photos: str = "digest", **settings: str) -> Path:
    """A run folder; pictures of its class are `alike` to the photos, 0.38 before training."""
    folder = root / name
    journal = Journal(folder / "metrics.jsonl")
    journal.tags({"sweep": sweep})
    if photos:
        journal.input({"name": "demo", "digest": photos, "source": "photos", "photos": "5"})
    journal.close()
    told = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    (folder / "run.json").write_text(json.dumps({"settings": told}))
    if done:
        (folder / "model").mkdir()
        adapter = told.get("method.kind", "full") != "full" and told.get("method.merge") != "True"
        (folder / "model" / (ADAPTER if adapter else "model_index.json")).write_text("{}")
        (folder / "result.json").write_text(json.dumps({
            "step": 4, "objective": objective, "model": "model", "exported_step": 4,
            "scores": {"instance_loss": objective, CLASS: alike}, "base_scores": {CLASS: 0.38}}))
    return folder


def test_the_lowest_objective_is_promoted(tmp_path: Path, registry: Registry) -> None:
    for name, objective in (("a", 0.3), ("b", 0.1), ("c", 0.2)):
        trial(tmp_path, name, objective)
    trial(tmp_path, "d", 0.05, sweep="another")
    trial(tmp_path, "e", 0.05, done=False)
    told = promote("s", tmp_path, Terms())
    assert (told["run"], told["version"], told["alias"], told["replaced"]) == ("b", 1, CHAMPION, None)
    assert told["model_uri"] == "models:/demo-tiny-full@champion"
    assert json.loads((tmp_path / "promoted.json").read_text()) == told


@pytest.mark.parametrize("kind, merge, holds", [
    ("full", "False", "model"), ("lora", "False", "adapter"), ("dora", "False", "adapter"), ("lora", "True", "model")])
def test_what_its_method_exports_makes_a_trial_finished(
    tmp_path: Path, registry: Registry, kind: str, merge: str, holds: str
) -> None:
    folder = trial(tmp_path, "a", 0.1, method__kind=kind, method__merge=merge, model__source="package:tiny-sd")
    [found] = find(tmp_path, "s")
    assert (found.finished, value(found)) == (True, 0.1)
    assert "not finished" not in page("s", [found], 64)
    assert promote("s", tmp_path, Terms())["run"] == "a"
    assert {key: registry.versions[0].tags[key] for key in ("holds", "base")} == {
        "holds": holds, "base": "package:tiny-sd"}
    for path in (folder / "model").iterdir():
        path.rename(folder / "model/README.md")
    assert not find(tmp_path, "s")[0].finished


def test_the_class_must_not_have_become_the_subject(tmp_path: Path, registry: Registry) -> None:
    trial(tmp_path, "collapsed", 0.1, alike=0.5)
    trial(tmp_path, "sound", 0.2, alike=0.47)
    assert promote("s", tmp_path, Terms())["run"] == "sound"
    with pytest.raises(UserError, match=r"collapsed has class_similarity\w+ 0\.500, over 0\.450; .* type max_class"):
        promote("s", tmp_path, Terms(max_class_similarity=0.45))


def test_the_runs_own_bound_holds_too(tmp_path: Path, registry: Registry) -> None:
    trial(tmp_path, "a", 0.1, alike=0.4, evaluate__max_class_similarity="0.39")
    with pytest.raises(UserError, match=r"over 0\.390"):
        promote("s", tmp_path, Terms())
    assert promote("s", tmp_path, Terms(max_class_similarity=0.41))["run"] == "a"


def test_a_worse_sweep_leaves_the_champion(tmp_path: Path, registry: Registry) -> None:
    trial(tmp_path, "a", 0.2)
    promote("s", tmp_path, Terms())
    trial(tmp_path, "b", 0.3, sweep="t")
    with pytest.raises(UserError, match=r"b has instance_loss 0\.3000 and the champion of .*, version 1, 0\.2"):
        promote("t", tmp_path, Terms())
    trial(tmp_path, "c", 0.1, sweep="t")
    told = promote("t", tmp_path, Terms())
    assert (told["version"], told["replaced"]) == (2, 1)
    assert [version.run_id for version in registry.versions] == ["id-a", "id-c"]


def test_twice_is_once(tmp_path: Path, registry: Registry) -> None:
    trial(tmp_path, "a", 0.2)
    first, second = promote("s", tmp_path, Terms()), promote("s", tmp_path, Terms())
    assert first | {"time": ""} == second | {"time": ""} and len(registry.versions) == 1


def test_what_cannot_be_compared_is_said(tmp_path: Path, registry: Registry) -> None:
    trial(tmp_path, "a", 0.2)
    trial(tmp_path, "b", 0.1, evaluate__objective="class_similarity")
    with pytest.raises(UserError, match=r"several objectives \(class_similarity, instance_loss\): type objective=ONE"):
        promote("s", tmp_path, Terms())
    assert promote("s", tmp_path, Terms(objective="class_similarity"))["objective"] == pytest.approx(0.4)
    with pytest.raises(UserError, match="chosen by class_similarity, not by instance_loss: type objective="):
        promote("s", tmp_path, Terms(objective="instance_loss"))


def test_a_run_offers_itself_and_is_candidate_or_champion(tmp_path: Path, registry: Registry) -> None:
    assert offer(trial(tmp_path, "a", 0.2), Terms())["alias"] == CHAMPION
    assert offer(trial(tmp_path, "b", 0.3), Terms())["alias"] == CANDIDATE
    assert offer(trial(tmp_path, "c", 0.1), Terms())["alias"] == CHAMPION
    assert {alias: version.run_id for alias, version in registry.aliases.items()} == {
        CHAMPION: "id-c", CANDIDATE: "id-b"}
    with pytest.raises(UserError, match="is not registered: d has class_similarity"):
        offer(trial(tmp_path, "d", 0.01, alike=0.9), Terms())


@pytest.mark.parametrize("mine, theirs", [
    ({"photos": "my dog"}, {"photos": "their toy"}),
    ({"photos": "", "dataset__instance_prompt": "a zwx dog"}, {"photos": "", "dataset__instance_prompt": "a qrs toy"})])
def test_a_model_of_other_photos_is_no_better_and_no_worse(
    tmp_path: Path, registry: Registry, mine: Any, theirs: Any
) -> None:
    trial(tmp_path, "a", 0.2, **theirs)
    promote("s", tmp_path, Terms())
    better = trial(tmp_path, "b", 0.1, sweep="t", **mine)
    with pytest.raises(UserError, match=r"version 1, is of other photos: type name=NAME .*, or replace=true"):
        promote("t", tmp_path, Terms())
    assert offer(better, Terms())["alias"] == CANDIDATE
    trial(tmp_path, "worse", 0.3, sweep="u", **mine)
    assert promote("u", tmp_path, Terms(replace=True))["replaced"] == 1
    assert registry.aliases[CHAMPION].run_id == "id-worse"
    assert promote("t", tmp_path, Terms())["run"] == "b", "the same photos again"


@pytest.mark.parametrize("tags", [{}, {"objective_name": "instance_loss"}, {"objective": "0.1"}])
def test_a_champion_that_was_made_by_hand_stays(tmp_path: Path, registry: Registry, tags: dict[str, str]) -> None:
    registry.aliases[CHAMPION] = Version("demo-tiny-full", 7, "theirs", tags)
    folder = trial(tmp_path, "a", 0.2)
    with pytest.raises(UserError, match=r"version 7, was not registered by dreambooth, .*: type name=NAME"):
        promote("s", tmp_path, Terms())
    assert offer(folder, Terms())["alias"] == CANDIDATE
    assert registry.aliases[CHAMPION].number == 7
    assert promote("s", tmp_path, Terms(replace=True))["replaced"] == 7


def test_a_run_without_its_objective_offers_nothing(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(UserError, match="is not registered: a did not measure instance_loss"):
        offer(trial(tmp_path, "a", math.nan), Terms())
    assert registry.versions == []


@pytest.mark.parametrize("known, environment, wanted", [
    (None, None, None), (None, "http://env", "http://env"), (None, "", None), ("http://own", None, "http://own"),
    ("http://own", "http://env", "http://own"), ("sqlite:////elsewhere/mlflow.db", "http://env", "http://env"),
    ("sqlite:////elsewhere/mlflow.db", None, None)])
def test_a_run_is_promoted_where_it_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str | None, environment: str | None, wanted: str | None
) -> None:
    """A server that was away when the run ended is asked again; what goes to another place says so."""
    trial(tmp_path, "a", 0.1)
    (tmp_path / "a/mlflow.json").write_text(json.dumps({"run_id": "id", **({"uri": known} if known else {})}))
    asked: list[str | None] = []

    class Closed:
        def close(self, status: str) -> None: ...

    monkeypatch.setattr(promotion, "open_tracker", lambda *given, uri, **more: (asked.append(uri), Closed())[1])
    monkeypatch.setattr(promotion, "Registry", Registry)
    told = promote("s", tmp_path, Terms(default_uri=environment))
    assert asked == [wanted] and told["server"] == (wanted or f"sqlite:///{tmp_path}/mlflow.db")
    assert report.promoted(told).endswith(f"@champion from MLflow at {told['server']}")


def test_a_workflows_stage_promotes_at_the_server_of_its_environment(tmp_path: Path) -> None:
    trial(tmp_path, "a", 0.1)
    words = ["promote", "--out", str(tmp_path / "out"), "sweep=s", f"run_root={tmp_path}"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    ran = subprocess.run([sys.executable, "-m", "dreambooth.stage", *words], capture_output=True, text=True,
                         check=False, env=os.environ | {"MLFLOW_TRACKING_URI": address})
    assert ran.returncode == 1 and f"MLflow at {address} does not answer" in ran.stderr
    assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "promoted.json").exists()


@pytest.mark.parametrize("words, sentence", [
    ([], "the sweep is missing: type sweep=ID"), (["sweep=x"], "no run in .* belongs to the sweep x: type sweep=ID"),
    (["sweep=x", "max_class_similarity=3"], "max_class_similarity must be from -1 to 1, not 3")])
def test_the_door_says_what_to_type(tmp_path: Path, words: list[str], sentence: str) -> None:
    told = subprocess.run([sys.executable, "-m", "dreambooth.promote", f"run_root={tmp_path}", *words],
                          capture_output=True, text=True, check=False)
    assert told.returncode == 1 and told.stdout == "" and len(told.stderr.splitlines()) == 1
    assert re.search(sentence, told.stderr)


def test_mlflow_has_version_alias_and_model(tmp_path: Path) -> None:
    """With the real registry, on sqlite; a run that was not tracked is sent first."""
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    trial(tmp_path, "a", 0.2)
    told = promote("s", tmp_path, Terms())
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    version: Any = client.get_model_version_by_alias("demo-tiny-full", CHAMPION)
    assert (int(version.version), version.run_id, version.tags["run"]) == (1, told["mlflow_run_id"], "a")
    uri = client.tracking_uri
    found = download_artifacts(version.source, tracking_uri=uri, registry_uri=uri)
    assert (Path(found) / "model_index.json").is_file()
    trial(tmp_path, "b", 0.1)
    assert promote("s", tmp_path, Terms())["replaced"] == 1
    assert len(client.search_model_versions("name='demo-tiny-full'")) == 2


def test_a_run_that_is_extended_leaves_the_files_of_its_earlier_version(tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    folder = trial(tmp_path, "a", 0.2)
    (folder / "model/unet.safetensors").write_bytes(b"after 4 steps")
    assert promote("s", tmp_path, Terms())["version"] == 1
    (folder / "model/unet.safetensors").write_bytes(b"after 8 steps")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {
        "step": 8, "exported_step": 8, "scores": result["scores"] | {"instance_loss": 0.1}}))
    told = promote("s", tmp_path, Terms())
    assert (told["version"], told["replaced"]) == (2, 1)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    kept = [Path(download_artifacts(client.get_model_version("demo-tiny-full", number).source, tracking_uri=uri,
                                    registry_uri=uri), "unet.safetensors").read_bytes() for number in ("1", "2")]
    assert kept == [b"after 4 steps", b"after 8 steps"]


def test_a_sweeps_own_run_is_no_trial(tmp_path: Path) -> None:
    trial(tmp_path, "a", 0.1)
    journal = Journal(tmp_path / "sweep-s" / "metrics.jsonl")
    journal.tags({"sweep": "s", "kind": "sweep"})
    journal.close()
    assert [found.folder.name for found in find(tmp_path, "s")] == ["a"]
