"""Promotion: the best trial of a sweep becomes the champion, if it satisfies the rules."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dreambooth.errors import UserError
from dreambooth.runs import report
from dreambooth.storage import manifest
from dreambooth.sweeps import promotion
from dreambooth.sweeps.html_page import render_page
from dreambooth.sweeps.promotion import PromotionOptions, promote, register_run
from dreambooth.sweeps.summary import finished_objective
from dreambooth.sweeps.trials import find_trials
from dreambooth.tracking.journal import Journal
from dreambooth.tracking.model_registry import CANDIDATE, CHAMPION, Version
from dreambooth.utils.atomic_files import write_json
from tests.support.runs import CLASS, Registry, flip_bit, trial
from tests.support.warm_python import PYTHON

SAGEMAKER = "arn:aws:sagemaker:us-east-1:123456789012"


class SlowRegistry(Registry):
    """A registry in which "worse" reads the champion before "better" is champion, and sets the alias after that."""

    def __init__(self, *_: str) -> None:
        super().__init__()
        self.worse_has_read, self.better_is_champion = threading.Event(), threading.Event()

    def set_alias(self, version: Version, alias: str) -> None:
        if version.run_id == "id-worse" and alias == CHAMPION:
            self.worse_has_read.set()
            assert self.better_is_champion.wait(5)
        super().set_alias(version, alias)
        if version.run_id == "id-better":
            self.better_is_champion.set()


def test_the_lowest_objective_is_promoted(tmp_path: Path, registry: Registry) -> None:
    for name, objective in (("a", 0.3), ("b", 0.1), ("c", 0.2)):
        trial(tmp_path, name, objective)
    trial(tmp_path, "d", 0.05, sweep="another")
    trial(tmp_path, "e", 0.05, done=False)
    record = promote("s", tmp_path, PromotionOptions())
    assert (record["run"], record["version"], record["alias"], record["replaced"]) == ("b", 1, CHAMPION, None)
    assert record["model_uri"] == "models:/demo-tiny-full@champion"
    assert json.loads((tmp_path / "promoted.json").read_text()) == record


@pytest.mark.parametrize("kind, merge, holds", [
    ("full", "False", "model"), ("lora", "False", "adapter"), ("dora", "False", "adapter"), ("lora", "True", "model")])
def test_a_trial_is_finished_once_its_export_is_there(
    tmp_path: Path, registry: Registry, kind: str, merge: str, holds: str
) -> None:
    folder = trial(tmp_path, "a", 0.1, method__kind=kind, method__merge=merge, model__source="package:tiny-sd")
    [only] = find_trials(tmp_path, "s")
    assert (only.finished, finished_objective(only)) == (True, 0.1)
    assert "not finished" not in render_page("s", [only], 64)
    assert promote("s", tmp_path, PromotionOptions())["run"] == "a"
    assert {key: registry.versions[0].tags[key] for key in ("holds", "base")} == {
        "holds": holds, "base": "package:tiny-sd"}
    for path in (folder / "model").iterdir():
        path.rename(folder / "model/README.md")
    assert not find_trials(tmp_path, "s")[0].finished


def test_a_page_shows_what_a_result_holds_as_text(tmp_path: Path) -> None:
    folder = trial(tmp_path, "a", 0.1)
    result = json.loads((folder / "result.json").read_text())
    for step, seconds in (("<script>alert(1)</script>", "<b>"), (["<script>alert(1)"], None)):
        (folder / "result.json").write_text(json.dumps(result | {"step": step, "seconds": seconds}))
        page = render_page("s", find_trials(tmp_path, "s"), 64)
        assert "<script>alert" not in page and "<b>" not in page.partition("<tbody>")[2]


def test_a_damaged_model_or_one_that_diverged_is_not_promoted(tmp_path: Path, registry: Registry) -> None:
    for name, objective in (("a", 0.1), ("b", 0.2), ("diverged", math.nan)):
        weights = trial(tmp_path, name, objective) / "model/weights.safetensors"
        weights.write_bytes(b"weights")
        manifest.write(weights.parent)
        if name == "a":
            flip_bit(weights)
    with pytest.raises(UserError, match=r"a/model is damaged \(weights\.safetensors has other content\)"):
        promote("s", tmp_path, PromotionOptions())
    assert not registry.versions
    (tmp_path / "a/result.json").write_text('["damaged"]')
    assert promote("s", tmp_path, PromotionOptions())["run"] == "b"
    assert math.isnan(next(t for t in find_trials(tmp_path, "s") if t.folder.name == "diverged").objective(f"-{CLASS}"))


def test_a_model_over_the_class_similarity_bound_is_skipped(tmp_path: Path, registry: Registry) -> None:
    trial(tmp_path, "collapsed", 0.1, class_similarity=0.5)
    trial(tmp_path, "sound", 0.2, class_similarity=0.47)
    assert promote("s", tmp_path, PromotionOptions())["run"] == "sound"
    with pytest.raises(UserError, match=r"collapsed has class_similarity\w+ 0\.500, over 0\.450; .* type max_class"):
        promote("s", tmp_path, PromotionOptions(max_class_similarity=0.45))


def test_the_bound_of_the_run_applies_too(tmp_path: Path, registry: Registry) -> None:
    trial(tmp_path, "a", 0.1, class_similarity=0.4, evaluate__max_class_similarity="0.39")
    with pytest.raises(UserError, match=r"over 0\.390"):
        promote("s", tmp_path, PromotionOptions())
    assert promote("s", tmp_path, PromotionOptions(max_class_similarity=0.41))["run"] == "a"


def test_a_worse_sweep_leaves_the_champion(tmp_path: Path, registry: Registry) -> None:
    trial(tmp_path, "a", 0.2)
    promote("s", tmp_path, PromotionOptions())
    trial(tmp_path, "b", 0.3, sweep="t")
    with pytest.raises(UserError, match=r"b has instance_loss 0\.3000 and the champion of .*, version 1, 0\.2"):
        promote("t", tmp_path, PromotionOptions())
    trial(tmp_path, "c", 0.1, sweep="t")
    record = promote("t", tmp_path, PromotionOptions())
    assert (record["version"], record["replaced"]) == (2, 1)
    assert [version.run_id for version in registry.versions] == ["id-a", "id-c"]


def test_promoting_twice_registers_one_version(tmp_path: Path, registry: Registry) -> None:
    trial(tmp_path, "a", 0.2)
    first, second = promote("s", tmp_path, PromotionOptions()), promote("s", tmp_path, PromotionOptions())
    assert first | {"time": ""} == second | {"time": ""} and len(registry.versions) == 1


def test_of_two_promotions_at_once_the_better_model_stays_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Registry
) -> None:
    slow = SlowRegistry()
    monkeypatch.setattr(promotion, "Registry", lambda *_: slow)
    monkeypatch.setattr(promotion, "POLL_INTERVAL", 0.001, raising=False)
    worse, better = trial(tmp_path, "worse", 0.3), trial(tmp_path, "better", 0.1)
    other_job = threading.Thread(target=register_run, args=(worse, PromotionOptions()))
    other_job.start()
    assert slow.worse_has_read.wait(5)
    register_run(better, PromotionOptions())
    other_job.join(5)
    assert slow.aliases[CHAMPION].run_id == "id-better"


def test_the_mark_of_a_killed_promotion_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Registry
) -> None:
    killed = registry.register("demo-tiny-full", "id", trial(tmp_path, "killed", 0.2) / "model", {})
    monkeypatch.setattr(promotion.time, "sleep", lambda seconds: pytest.fail("waited for a killed process"))
    killed.tags["promotion"] = f"choosing since {time.time() - 100:.0f}"
    assert register_run(trial(tmp_path, "a", 0.3), PromotionOptions())["alias"] == CHAMPION


@pytest.mark.parametrize("settings, base", [
    ({"evaluate__encoder": "none"}, 0.38), ({"dataset__class_prompt": ""}, 0.38), ({}, None),
    ({}, math.nan)])
def test_a_model_whose_class_similarity_was_not_measured_is_no_champion(
    tmp_path: Path, registry: Registry, settings: dict[str, str], base: float | None
) -> None:
    folder = trial(tmp_path, "a", 0.1, **settings)
    result = json.loads((folder / "result.json").read_text())
    write_json(folder / "result.json", result | {"base_scores": {CLASS: base} if base else {}})  # null for nan
    with pytest.raises(UserError, match=r"a did not measure class_similarity.*: type allow_unmeasured=true to"):
        promote("s", tmp_path, PromotionOptions())
    assert register_run(folder, PromotionOptions())["alias"] == CANDIDATE
    assert promote("s", tmp_path, PromotionOptions(allow_unmeasured=True))["alias"] == CHAMPION
    assert register_run(folder, PromotionOptions())["alias"] == CHAMPION, "the champion by the user's choice"
    trial(tmp_path, "measured", 0.09)
    assert promote("s", tmp_path, PromotionOptions())["run"] == "measured"


def test_objectives_that_differ_are_not_compared(tmp_path: Path, registry: Registry) -> None:
    trial(tmp_path, "a", 0.2)
    trial(tmp_path, "b", 0.1, evaluate__objective="class_similarity")
    with pytest.raises(UserError, match=r"several objectives \(class_similarity, instance_loss\): type objective=ONE"):
        promote("s", tmp_path, PromotionOptions())
    assert promote("s", tmp_path, PromotionOptions(objective="class_similarity"))["objective"] == pytest.approx(0.4)
    with pytest.raises(UserError, match="chosen by class_similarity, not by instance_loss: type objective="):
        promote("s", tmp_path, PromotionOptions(objective="instance_loss"))
    with pytest.raises(UserError, match=r"name=a:b has a slash or a colon, .*: type name=a-b"):
        promote("s", tmp_path, PromotionOptions(objective="class_similarity", name="a:b"))


def test_a_finished_run_becomes_candidate_or_champion(tmp_path: Path, registry: Registry) -> None:
    assert register_run(trial(tmp_path, "a", 0.2), PromotionOptions())["alias"] == CHAMPION
    assert register_run(trial(tmp_path, "b", 0.3), PromotionOptions())["alias"] == CANDIDATE
    assert register_run(trial(tmp_path, "c", 0.1), PromotionOptions())["alias"] == CHAMPION
    assert {alias: version.run_id for alias, version in registry.aliases.items()} == {
        CHAMPION: "id-c", CANDIDATE: "id-b"}
    with pytest.raises(UserError, match="is not registered: d has class_similarity"):
        register_run(trial(tmp_path, "d", 0.01, class_similarity=0.9), PromotionOptions())


@pytest.mark.parametrize("mine, theirs", [
    ({"photos": "my dog"}, {"photos": "their toy"}),
    ({"photos": "", "dataset__instance_prompt": "a zwx dog"}, {"photos": "", "dataset__instance_prompt": "a qrs toy"})])
def test_a_model_of_other_photos_does_not_replace_the_champion(
    tmp_path: Path, registry: Registry, mine: Any, theirs: Any
) -> None:
    trial(tmp_path, "a", 0.2, **theirs)
    promote("s", tmp_path, PromotionOptions())
    better = trial(tmp_path, "b", 0.1, sweep="t", **mine)
    with pytest.raises(UserError, match=r"version 1, was trained on other photos: type name=NAME .*, or replace=true"):
        promote("t", tmp_path, PromotionOptions())
    assert register_run(better, PromotionOptions())["alias"] == CANDIDATE
    trial(tmp_path, "worse", 0.3, sweep="u", **mine)
    assert promote("u", tmp_path, PromotionOptions(replace=True))["replaced"] == 1
    assert registry.aliases[CHAMPION].run_id == "id-worse"
    assert promote("t", tmp_path, PromotionOptions())["run"] == "b", "the same photos again"


@pytest.mark.parametrize("tags", [{}, {"objective_name": "instance_loss"}, {"objective": "0.1"}])
def test_a_champion_registered_by_other_means_stays(tmp_path: Path, registry: Registry, tags: dict[str, str]) -> None:
    registry.aliases[CHAMPION] = Version("demo-tiny-full", 7, "theirs", tags)
    folder = trial(tmp_path, "a", 0.2)
    with pytest.raises(UserError, match=r"version 7, was not registered by dreambooth, .*: type name=NAME"):
        promote("s", tmp_path, PromotionOptions())
    assert register_run(folder, PromotionOptions())["alias"] == CANDIDATE
    assert registry.aliases[CHAMPION].number == 7
    assert promote("s", tmp_path, PromotionOptions(replace=True))["replaced"] == 7


def test_a_run_without_its_objective_is_not_registered(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(UserError, match="is not registered: a did not measure instance_loss"):
        register_run(trial(tmp_path, "a", math.nan), PromotionOptions())
    assert registry.versions == []


@pytest.mark.parametrize("known, environment, wanted", [
    (None, None, None), (None, "http://env", "http://env"), (None, "", None), ("http://own", None, "http://own"),
    ("http://own", "http://env", "http://own"), ("sqlite:////elsewhere/mlflow.db", "http://env", "http://env"),
    ("sqlite:////elsewhere/mlflow.db", None, None), ("file:///elsewhere", "http://env", "http://env"),
    (f"{SAGEMAKER}:mlflow-app/x", "http://env", f"{SAGEMAKER}:mlflow-app/x"),
    (f"{SAGEMAKER}:mlflow-tracking-server/x", None, f"{SAGEMAKER}:mlflow-tracking-server/x"),
    ("databricks", None, "databricks")])
def test_a_run_is_promoted_on_the_server_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str | None, environment: str | None, wanted: str | None
) -> None:
    """A server that did not answer when the run ended is tried again; the record names the server."""
    trial(tmp_path, "a", 0.1)
    (tmp_path / "a/mlflow.json").write_text(json.dumps({"run_id": "id", **({"uri": known} if known else {})}))
    uris: list[str | None] = []

    class Closed:
        def close(self, status: str) -> None: ...

    monkeypatch.setattr(promotion, "open_tracker", lambda *args, uri, **options: (uris.append(uri), Closed())[1])
    monkeypatch.setattr(promotion, "Registry", Registry)
    record = promote("s", tmp_path, PromotionOptions(default_uri=environment))
    assert uris == [wanted] and record["server"] == (wanted or f"sqlite:///{tmp_path}/mlflow.db")
    assert report.promotion_message(record).endswith(f"@champion from MLflow at {record['server']}")


def test_a_workflow_stage_promotes_on_the_server_of_its_environment(tmp_path: Path) -> None:
    trial(tmp_path, "a", 0.1)
    words = ["promote", "--out", str(tmp_path / "out"), "sweep=s", f"run_root={tmp_path}"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    process = subprocess.run([PYTHON, "-m", "dreambooth.stage", *words], capture_output=True, text=True,
                             check=False, env=os.environ | {"MLFLOW_TRACKING_URI": address})
    assert process.returncode == 1 and f"MLflow at {address} does not answer" in process.stderr
    assert "uri=ADDRESS of one that answers" in process.stderr and "tracking.required" not in process.stderr
    assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "promoted.json").exists()


@pytest.mark.parametrize("words, sentence", [
    ([], "the sweep is missing: type sweep=ID"), (["sweep=x"], "no run in .* belongs to the sweep x: type sweep=ID"),
    (["sweep=x", "max_class_similarity=3"], "max_class_similarity must be from -1 to 1, not 3"),
    (["sweep=x", "min_prompt_fidelity=3"], "min_prompt_fidelity must be from 0 to 1, not 3")])
def test_the_command_says_what_to_type(tmp_path: Path, words: list[str], sentence: str) -> None:
    process = subprocess.run([PYTHON, "-m", "dreambooth.promote", f"run_root={tmp_path}", *words],
                             capture_output=True, text=True, check=False)
    assert process.returncode == 1 and process.stdout == "" and len(process.stderr.splitlines()) == 1
    assert re.search(sentence, process.stderr)


def test_mlflow_has_version_alias_and_model(empty_db: Path, tmp_path: Path) -> None:
    """With the real registry, on sqlite; a run that MLflow does not have is sent first."""
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    shutil.copy(empty_db, tmp_path / "mlflow.db")
    trial(tmp_path, "a", 0.2)
    record = promote("s", tmp_path, PromotionOptions())
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    version: Any = client.get_model_version_by_alias("demo-tiny-full", CHAMPION)
    assert (int(version.version), version.run_id, version.tags["run"]) == (1, record["mlflow_run_id"], "a")
    uri = client.tracking_uri
    folder = download_artifacts(version.source, tracking_uri=uri, registry_uri=uri)
    assert (Path(folder) / "model_index.json").is_file()
    trial(tmp_path, "b", 0.1)
    assert promote("s", tmp_path, PromotionOptions())["replaced"] == 1
    assert len(client.search_model_versions("name='demo-tiny-full'")) == 2


def test_an_extended_run_keeps_the_files_of_its_earlier_version(empty_db: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    shutil.copy(empty_db, tmp_path / "mlflow.db")
    folder = trial(tmp_path, "a", 0.2)
    (folder / "model/unet.safetensors").write_bytes(b"after 4 steps")
    assert promote("s", tmp_path, PromotionOptions())["version"] == 1
    (folder / "model/unet.safetensors").write_bytes(b"after 8 steps")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {
        "step": 8, "exported_step": 8, "scores": result["scores"] | {"instance_loss": 0.1}}))
    record = promote("s", tmp_path, PromotionOptions())
    assert (record["version"], record["replaced"]) == (2, 1)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    weights = [Path(download_artifacts(client.get_model_version("demo-tiny-full", number).source, tracking_uri=uri,
                                       registry_uri=uri), "unet.safetensors").read_bytes() for number in ("1", "2")]
    assert weights == [b"after 4 steps", b"after 8 steps"]


def test_the_run_of_the_sweep_itself_is_not_a_trial(tmp_path: Path) -> None:
    trial(tmp_path, "a", 0.1)
    journal = Journal(tmp_path / "sweep-s" / "metrics.jsonl")
    journal.set_tags({"sweep": "s", "kind": "sweep"})
    journal.close()
    assert [found.folder.name for found in find_trials(tmp_path, "s")] == ["a"]
