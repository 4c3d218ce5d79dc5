"""Evaluation inside whole runs, and with the command `evaluate`: what is scored, stored, exported and returned."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dreambooth.evaluation.scene_borders import SceneBorders
from dreambooth.runtime.engine import Engine
from dreambooth.storage import manifest
from dreambooth.tracking.journal import read
from dreambooth.training.evaluation_hook import EvaluationHook
from dreambooth.utils.assets import resolve_asset
from tests.support.faults import call, train
from tests.support.runs import KILLED, assert_same, the_run

SUBJECT, DRIFT = "subject_similarity_efficientnet_lite0", "class_drift_efficientnet_lite0"
pytestmark = pytest.mark.slow
FIDELITY, FIDELITY_BY_BORDER = "prompt_fidelity_efficientnet_lite0", "prompt_fidelity_border"
BASE = Path(resolve_asset("package:tiny-sd"))
ON = ["evaluate.encoder=efficientnet_lite0", "evaluate.class_images=2", "evaluate.prompts={prompts}",
      "prior.with_prior_preservation=false", "sample.every=null"]
# The first evaluated step drifts least, so it is the best one.
SELECT_FIRST = ["evaluate.every=2", "evaluate.select=class_drift", "train.learning_rate=1e-3"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts, for speed."""
    path = tmp_path_factory.mktemp("prompts") / "two.txt"
    path.write_text("a photo of a {subject}\na photo of a {subject} on the beach\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def on(prompts: Path) -> list[str]:
    return [item.format(prompts=prompts) for item in ON]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, on: list[str]) -> Path:
    """A run that is evaluated and exports the last step."""
    root = tmp_path_factory.mktemp("plain")
    assert train(root, *on, "evaluate.every=4", "checkpoint.every=4", "train.learning_rate=1e-3") == 0
    return the_run(root)


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory, on: list[str], empty_db: Path) -> Path:
    """A run that exports the step that drifted least, with MLflow."""
    root = tmp_path_factory.mktemp("selected")
    shutil.copy(empty_db, root / "mlflow.db")
    assert train(root, *on, *SELECT_FIRST, "tracking=mlflow", "checkpoint.keep=1", log=root / "out.txt") == 0
    return the_run(root)


def evaluation(run: Path) -> dict[int, dict[str, float]]:
    found = json.loads((run / "evaluation.json").read_text())["steps"]
    return {int(step): scores for step, scores in found.items()}


def metric(run: Path, name: str) -> dict[int, float]:
    return {entry["step"]: entry["metrics"][name] for entry, _ in read(run / "metrics.jsonl")
            if name in entry.get("metrics", ())}


def result(run: Path) -> dict[str, object]:
    return json.loads((run / "result.json").read_text())  # type: ignore[no-any-return]


def test_the_base_intermediate_steps_and_the_last_step_are_scored(plain: Path) -> None:
    assert list(evaluation(plain)) == [0, 4, 8]
    assert evaluation(plain)[0][DRIFT] == pytest.approx(0, abs=1e-6)
    assert evaluation(plain)[8][DRIFT] > 1e-3


def test_scores_and_scored_images_are_tracked(plain: Path) -> None:
    scores = evaluation(plain)
    assert metric(plain, f"evaluate/{SUBJECT}") == {step: scores[step][SUBJECT] for step in scores}
    images = [(entry["key"], entry["step"]) for entry, _ in read(plain / "metrics.jsonl") if "image" in entry]
    assert set(images) == {(f"evaluate/{name}", step) for name in ("prompt_0", "prompt_1", "class") for step in scores}


def test_scores_are_those_of_the_stored_images(plain: Path) -> None:
    from dreambooth.data.photos import list_photos, load_photos
    from dreambooth.evaluation.encoders import open_encoder
    from dreambooth.evaluation.scoring import score

    [folder] = (plain / "evaluation").iterdir()

    def pictures(step: int, name: str) -> list[Image.Image]:
        return [Image.open(path) for path in sorted((folder / f"step-{step:06d}").glob(f"{name}-*.png"))]

    photos = [Image.fromarray(p.pixels) for p in load_photos(list_photos(Path(resolve_asset("package:demo"))), "x", 64)]
    [base] = (plain.parent / "base_images").iterdir()
    texts = ["a photo of a toy", "a photo of a toy on the beach"]
    found = score(photos, {text: pictures(8, f"prompt-{number}") for number, text in enumerate(texts)},
                  [open_encoder("efficientnet_lite0")], class_images=pictures(8, "class"),
                  base_class_images=pictures(0, "class"), class_prompt=texts[0], borders=SceneBorders.read(BASE),
                  base_images={text: [Image.open(path) for path in sorted(base.glob(f"text-{number}-*.png"))]
                               for number, text in enumerate(texts)})
    assert found == pytest.approx(evaluation(plain)[8], abs=1e-6)


def test_the_base_models_images_of_the_texts_are_generated_once(plain: Path) -> None:
    """The images of the class prompt are those of the evaluation of the base model."""
    [base], [folder] = (plain.parent / "base_images").iterdir(), (plain / "evaluation").iterdir()
    assert sorted(path.name for path in base.glob("*.png")) == [f"text-{n}-{i}.png" for n in (0, 1) for i in (0, 1)]
    for i in (0, 1):
        pairs = base / f"text-0-{i}.png", folder / f"step-000000/class-{i}.png"
        assert np.array_equal(*(np.asarray(Image.open(path)) for path in pairs))
    assert {FIDELITY, FIDELITY_BY_BORDER} <= result(plain)["scores"].keys()  # type: ignore[attr-defined]


def test_the_command_adds_prompt_fidelity_to_scores_of_an_earlier_version(plain: Path, tmp_path: Path) -> None:
    """The images exist, so only the base model's images of the texts are generated. Other scores do not change."""
    run = tmp_path / plain.name
    shutil.copytree(plain, run)
    theirs = evaluation(plain)
    for path in run.glob("evaluation/*/step-*/scores.json"):
        scores = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in scores.items() if "prompt" not in name}))
        manifest.write(path.parent)
    images = {path: path.stat().st_mtime_ns for path in run.glob("evaluation/*/step-000004/*")}
    assert call("evaluate", [f"run={run}"], log=tmp_path / "out.txt") == 0, (tmp_path / "out.txt").read_text()
    found = evaluation(run)
    assert found[0] == pytest.approx(theirs[0]) and found[8] == pytest.approx(theirs[8])
    assert FIDELITY not in found[4] and images == {path: path.stat().st_mtime_ns for path in images}


def test_without_select_the_last_step_is_exported(plain: Path) -> None:
    assert result(plain)["exported_step"] == 8
    assert not (plain / "best").exists()
    assert exported(plain)["conv_in.weight"].equal(checkpoint(plain, 8)["unet.conv_in.weight"])


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/unet/diffusion_pytorch_model.safetensors")


def checkpoint(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:06d}/ema.safetensors")


def test_evaluation_does_not_change_training(plain: Path, on: list[str], tmp_path: Path) -> None:
    off = [item for item in on if not item.startswith("evaluate.")]
    assert train(tmp_path, *off, "evaluate.encoder=none", "checkpoint.every=4", "train.learning_rate=1e-3") == 0
    bare = the_run(tmp_path)
    assert bare.name == plain.name, "evaluation without select changed the identity of the run"
    assert not (bare / "evaluation.json").exists()
    assert_same(bare, plain)


def test_the_best_step_is_exported_and_survives_rotation(selected: Path, on: list[str], tmp_path: Path) -> None:
    """keep=1 leaves only the last checkpoint, but the exported weights are those of the best step."""
    scores = evaluation(selected)
    best = min((step for step in scores if step), key=lambda step: scores[step][DRIFT])
    assert best != 8
    assert (result(selected)["step"], result(selected)["exported_step"]) == (8, best)
    assert [p.name for p in (selected / "checkpoints").iterdir()] == ["step-000008"]
    assert train(tmp_path, *on, "train.learning_rate=1e-3", f"train.max_train_steps={best}") == 0
    short = the_run(tmp_path)
    assert all(tensor.equal(exported(short)[name]) for name, tensor in exported(selected).items())
    assert f"after {best} steps" in (selected / "model/README.md").read_text()


def test_the_result_has_the_scores_of_the_exported_step(selected: Path) -> None:
    found, scores = result(selected), evaluation(selected)
    assert found["base_scores"] == scores[0]
    scored = {key: value for key, value in found["scores"].items() if key != "instance_loss"}  # type: ignore[attr-defined]
    assert scored == scores[found["exported_step"]]  # type: ignore[index]


def test_mlflow_has_scores_images_and_the_exported_step(selected: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{selected.parent}/mlflow.db")
    [found] = client.search_runs([client.get_experiment_by_name("dreambooth").experiment_id])
    history = client.get_metric_history(found.info.run_id, f"evaluate/{SUBJECT}")
    assert {point.step: point.value for point in history} == {
        step: pytest.approx(scores[SUBJECT]) for step, scores in evaluation(selected).items()}
    assert found.data.metrics["exported_step"] == result(selected)["exported_step"]
    assert {"objective", "instance_loss"} <= found.data.metrics.keys()
    assert [item for item in client.list_artifacts(found.info.run_id, "images") if "evaluate" in item.path]


def test_the_summary_names_the_exported_step_and_its_scores(selected: Path) -> None:
    output = (selected.parent / "out.txt").read_text()
    assert f"step {result(selected)['exported_step']}, the best by class_drift" in output
    assert "lower is better" in output


@pytest.mark.parametrize("fault", ["unsaved", "between", "half"])
def test_a_run_killed_during_evaluation_gives_the_same_result(
        fault: str, selected: Path, on: list[str], tmp_path: Path) -> None:
    assert train(tmp_path, *on, *SELECT_FIRST, "checkpoint.keep=1", fault=f"evaluation_{fault}") == KILLED
    assert train(tmp_path, *on, *SELECT_FIRST, "checkpoint.keep=1") == 0
    run = the_run(tmp_path)
    assert_same(run, selected)
    assert evaluation(run) == evaluation(selected)
    assert result(run)["exported_step"] == result(selected)["exported_step"]
    assert metric(run, f"evaluate/{DRIFT}") == metric(selected, f"evaluate/{DRIFT}")


def test_a_run_stopped_during_evaluation_saves_the_step_and_evaluates_it_later(
        selected: Path, on: list[str], tmp_path: Path) -> None:
    overrides = [*on, *SELECT_FIRST, "checkpoint.every=null", "checkpoint.keep=1"]
    assert train(tmp_path, *overrides, fault="evaluation_stopped") == 5
    run = the_run(tmp_path)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000004"]
    assert list(evaluation(run)) == [0, 2]
    assert train(tmp_path, *overrides) == 0
    assert_same(run, selected)
    assert evaluation(run) == evaluation(selected)


def test_an_extended_run_selects_the_same_step_as_an_uninterrupted_one(
        selected: Path, on: list[str], tmp_path: Path) -> None:
    """A run of 5 steps evaluates step 5, its last one. In the extended run that step is not a candidate."""
    assert train(tmp_path, *on, *SELECT_FIRST, "train.max_train_steps=5") == 0
    assert train(tmp_path, *on, *SELECT_FIRST) == 0
    assert_same(the_run(tmp_path), selected)


def test_evaluation_enabled_later_still_measures_the_base(plain: Path, on: list[str], tmp_path: Path) -> None:
    slow = ["train.learning_rate=1e-3", "checkpoint.every=4"]
    off = [item for item in on if not item.startswith("evaluate.")]
    assert train(tmp_path, *off, *slow, "train.max_train_steps=4") == 0
    assert train(tmp_path, *on, *slow) == 0
    found, theirs = evaluation(the_run(tmp_path)), evaluation(plain)
    assert list(found) == [0, 8]
    assert found[0] == pytest.approx(theirs[0], abs=1e-6)
    assert found[8] == pytest.approx(theirs[8], abs=1e-6)


# -- the command -------------------------------------------------------------------------------------------------------

def test_the_command_gives_the_scores_of_the_run(plain: Path, tmp_path: Path) -> None:
    """Images are generated again from the exported model and from the base, with the same scores."""
    run = tmp_path / plain.name
    shutil.copytree(plain, run)
    shutil.rmtree(run / "evaluation")
    log = tmp_path / "out.txt"
    assert call("evaluate", [f"run={run}"], log=log) == 0, log.read_text()
    found = evaluation(run)
    assert list(found) == [0, 8]
    assert found[8] == pytest.approx(evaluation(plain)[8], abs=1e-6)
    assert f"{SUBJECT}  {found[8][SUBJECT]:.3f}" in log.read_text()


def test_the_command_with_other_prompts_adds_scores_and_replaces_none(plain: Path, tmp_path: Path) -> None:
    before = metric(plain, f"evaluate/{SUBJECT}")
    (tmp_path / "one.txt").write_text("a photo of a {subject} in the snow\n", encoding="utf-8")
    assert call("evaluate", [f"run={plain}", f"prompts={tmp_path}/one.txt"]) == 0
    assert metric(plain, f"evaluate/{SUBJECT}") == before
    assert len(list((plain / "evaluation").iterdir())) == 2
    other = [key for entry, _ in read(plain / "metrics.jsonl") for key in entry.get("metrics", ())
             if key.startswith("evaluate_") and key.endswith(SUBJECT)]
    assert len(other) == 2
    (last,) = set(other)
    assert metric(plain, last) == {step: scores[SUBJECT] for step, scores in evaluation(plain).items()}


@pytest.mark.parametrize("arguments, words", [
    ([], "type run=runs/NAME"),
    (["run={tmp}/none"], "there is no run in"),
    (["run={tmp}/half"], "there is no run in"),
    (["run={run}", "encoder=dino", "dino={tmp}"], "evaluate.dino=DIR"),
    (["run={run}", "prompts=nope"], "evaluate.prompts=scenes"),
    (["run={run}", "encoder=none"], "encoder=paper"),
    (["run={run}", "encodr=none"], "encodr"),
])
def test_wrong_input_is_an_error_without_traceback(
        arguments: list[str], words: str, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    log = tmp_path / "out.txt"
    assert call("evaluate", [item.format(run=plain, tmp=tmp_path) for item in arguments], log=log) == 1
    assert words in log.read_text() and "Traceback" not in log.read_text()


def test_an_unfinished_run_is_not_evaluated(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    log = tmp_path / "out.txt"
    assert call("evaluate", [f"run={tmp_path}/run"], log=log) == 1
    assert "is not finished" in log.read_text()


def test_encoders_are_loaded_before_training(on: list[str], tmp_path: Path) -> None:
    log = tmp_path / "out.txt"
    overrides = [*on, "evaluate.encoder=dino", f"evaluate.dino={tmp_path}"]
    assert train(tmp_path / "runs", *overrides, log=log) == 1
    assert "evaluate.dino=DIR" in log.read_text()
    assert not list((tmp_path / "runs").glob("demo-*")), "an empty run is left behind"


def test_evaluation_detects_overfitting_and_exports_an_earlier_step(tmp_path: Path) -> None:
    """`experiment=overfit_demo`, shortened: similarity of class and photos (PRES) and drift rise, diversity falls."""
    overrides = ["experiment=overfit_demo", f"run_root={tmp_path}", "hardware=cpu", "tracking=none",
                 "train.max_train_steps=120"]
    assert call("train", overrides) == 0
    run = the_run(tmp_path)
    curve = evaluation(run)
    pres = [curve[step]["class_similarity_efficientnet_lite0"] for step in (0, 40, 80, 120)]
    assert pres == sorted(pres)
    assert pres[-1] > pres[0] + 0.1
    assert curve[120][DRIFT] > curve[40][DRIFT] > 0.1
    assert curve[120]["diversity_efficientnet_lite0"] < curve[0]["diversity_efficientnet_lite0"]
    assert result(run)["exported_step"] == 40


class _FakeEvaluator:
    """An Evaluator that only records which steps are evaluated."""

    def __init__(self, scored: dict[int, dict[str, float]]) -> None:
        self.scored, self.calls = scored, []

    def scores(self) -> dict[int, dict[str, float]]:
        return self.scored

    def needs_base_model(self) -> bool:
        return 0 not in self.scored

    def evaluate(self, step: int, pipeline: object, *_: object) -> dict[str, float]:
        self.calls.append((step, pipeline))
        return {}


def evaluated_before_training(device: str, step: int) -> list[tuple[int, object]]:
    """(step, pipeline) of the evaluations of a run before its first step, if it continues after `step`."""
    evaluator, parts = _FakeEvaluator({}), SimpleNamespace(new_tokens=None)
    state = SimpleNamespace(step=step, averages=lambda model: None, check_finite=lambda model: None,
                            sharded=None)
    setup = SimpleNamespace(state=state, pipeline="live", trained=None, parts=parts,
                            idle=SimpleNamespace(on_device=nullcontext))
    spec = SimpleNamespace(every=None, select=None, max_train_steps=8)
    EvaluationHook(
        evaluator=evaluator, setup=setup, engine=Engine(device=torch.device(device)),
        meter=SimpleNamespace(phase=lambda name: nullcontext()), recipe=SimpleNamespace(evaluate=spec, train=spec),
        validation=SimpleNamespace(values={})).before_training()
    return evaluator.calls


class _TwoParts(torch.nn.Module):
    """A denoiser and a text encoder whose weights all have one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.unet, self.text_encoder = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        for parameter in self.parameters():
            torch.nn.init.constant_(parameter, value)


def test_a_resumed_run_on_a_gpu_puts_the_base_into_the_trained_module(monkeypatch: pytest.MonkeyPatch) -> None:
    live, loaded, seen = _TwoParts(7.0), [], {}

    def load(recipe: object, device: torch.device) -> SimpleNamespace:
        loaded.append(device)
        base = _TwoParts(1.0)
        family = SimpleNamespace(denoiser=SimpleNamespace(name="unet"))
        return SimpleNamespace(family=family, denoiser=base.unet, encoders_by_name={"text_encoder": base.text_encoder},
                               vae_scale=8, new_tokens=None)

    class Recording(_FakeEvaluator):
        def evaluate(self, step: int, pipeline: object, *rest: object) -> dict[str, float]:
            seen[step] = {float(value) for p in live.parameters() for value in p.detach().flatten()}
            return super().evaluate(step, pipeline, *rest)

    monkeypatch.setattr("dreambooth.models.loading.load", load)
    evaluator = Recording({})
    EvaluationHook(
        evaluator=evaluator, engine=Engine(device=torch.device("cuda")),
        setup=SimpleNamespace(state=SimpleNamespace(step=3, averages=lambda _: None, check_finite=lambda _: None,
                                                    sharded=None),
                              pipeline="live", trained=live, idle=SimpleNamespace(on_device=nullcontext)),
        meter=SimpleNamespace(phase=lambda name: nullcontext()),
        recipe=SimpleNamespace(
            evaluate=SimpleNamespace(every=None), train=SimpleNamespace(train_text_encoder=True), encodes_in_step=True,
            method=SimpleNamespace(low_rank=False)), validation=SimpleNamespace(values={})).evaluate(3)
    assert evaluator.calls == [(0, "live"), (3, "live")] and loaded == [torch.device("cpu")]
    assert seen == {0: {1.0}, 3: {7.0}}


def test_on_a_gpu_the_base_is_measured_before_the_first_step_and_never_loaded_twice() -> None:
    assert evaluated_before_training("cuda", 0) == [(0, "live")]
    assert evaluated_before_training("cuda", 3) == evaluated_before_training("cpu", 0) == []
