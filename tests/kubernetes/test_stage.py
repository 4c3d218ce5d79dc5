"""The stages of a workflow: exit codes, outputs for the workflow engine, preemption."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from dreambooth import stage, workflows
from dreambooth.entrypoint import compose_run
from dreambooth.kubernetes import exit_report, katib, kfp_components
from tests.kubernetes.workflow_files import run_stage
from tests.support.sagemaker_job import steps
from tests.support.warm_python import PYTHON


def test_validate_reports_the_problems_of_all_runs_at_once(tmp_path: Path) -> None:
    result = run_stage(tmp_path, "validate", "--words", "hardware=g4dn precision=bf16 dataset=s3", "--space", "tiny")
    assert result.returncode == 1
    assert "the photos are missing" in result.stderr
    assert "precision=bf16 needs a GPU of compute capability 8.0" in result.stderr
    assert not (tmp_path / "out/trials").exists()


def test_validate_plans_each_memory_size_of_a_search_space_once(tmp_path: Path) -> None:
    planned: list[list[str]] = []

    class RecordingSupervisor:
        def run(self, command: list[str], environment: dict[str, str]) -> stage.ExitStatus:
            planned.append(command[3:])
            return stage.ExitStatus()

    for space, count, key in (("lora", 3, "method.rank"), ("subject", 2, "train.train_text_encoder")):
        planned.clear()
        stage._validate(list(workflows.DEFAULT_OVERRIDES), space, tmp_path,
                        RecordingSupervisor())  # type: ignore[arg-type]
        assert all(f"sweep={space}" in overrides for overrides in planned), "another method would be planned"
        chosen = {override for overrides in planned for override in overrides if override.startswith(key)}
        assert len(planned) == count == len(chosen)


@pytest.mark.parametrize("args, message", [
    (["--words", "name='a"], "these overrides cannot be read"),
    (["--words", "hardware=cpu", "--space", "none"],
     "there is no search space none: type sweep=NAME with one of lora, recipe, subject, tiny"),
    (["sample"], "sample is neither an option nor KEY=VALUE"),
])
def test_a_stage_rejects_invalid_arguments(tmp_path: Path, args: list[str], message: str) -> None:
    result = run_stage(tmp_path, "validate", *args)
    assert (result.returncode in (1, 2), "Traceback" in result.stderr) == (True, False)
    assert message in result.stderr


def test_a_stage_exits_with_the_code_of_its_command(tmp_path: Path) -> None:
    result = run_stage(tmp_path, "evaluate", "run=nowhere")
    assert (result.returncode, "there is no run in nowhere" in result.stderr) == (1, True)


def test_user_overrides_beat_those_of_a_workflow() -> None:
    overrides = stage._run_overrides(
        ["tracking.uri=http://mine"], ["sweep=tiny", "train.learning_rate=1e-4", "prior.prior_loss_weight=0.5"])
    config, _ = compose_run(overrides)
    assert (config.tracking.uri, config.tracking.run_name) == (
        "http://mine", "learning_rate=1e-4 prior_loss_weight=0.5")


@pytest.mark.slow
def test_a_stage_trains_on_prepared_class_images_and_copies_results(tmp_path: Path) -> None:
    text = ("hardware=cpu prior.num_class_images=2 prior.num_inference_steps=1 train.train_batch_size=1 tracking=none "
            "evaluate.encoder=none sample.every=null train.max_train_steps=1")
    root = f"run_root={tmp_path / 'runs'}"
    first = run_stage(tmp_path, "class-images", "--words", text, root)
    assert first.returncode == 0, first.stderr
    assert "2 class images: 0 existing, 2 to generate" in first.stdout
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["class_images"]
    second = run_stage(tmp_path, "class-images", "--words", text, root)
    assert "2 class images: 2 existing, 0 to generate in" in second.stdout
    training = run_stage(tmp_path, "train", "--words", text, "--trial", "train.seed=3", root, "tracking.sweep=mine")
    assert training.returncode == 0, training.stderr
    assert "2 class images: 2 existing, 0 to generate" in training.stdout
    run = Path((tmp_path / "out/run").read_text("utf-8"))
    result = json.loads((run / "result.json").read_text("utf-8"))
    assert float((tmp_path / "out/objective").read_text("utf-8")) == result["objective"]
    [(name, value)] = re.findall(katib.OBJECTIVE, training.stdout)  # as Katib's collector reads a trial's log
    assert (name, float(value)) == ("objective", pytest.approx(result["objective"], rel=1e-5))
    failed = run_stage(tmp_path, "train", "--words", text, "--trial", "train.seed=-1", root)
    assert (failed.returncode, "train.seed must be from 0" in failed.stderr) == (1, True)


@pytest.mark.slow
def test_a_preempted_stage_saves_exits_with_5_and_resumes(tmp_path: Path) -> None:
    """As when a node is preempted: the stage receives SIGTERM and forwards it."""
    root = tmp_path / "checkpoints"  # where `steps` looks
    command = [PYTHON, "-m", "dreambooth.stage", "train", "--out", str(tmp_path / "out"), f"run_root={root}",
               "--words", "hardware=cpu prior.with_prior_preservation=false train.train_batch_size=1 tracking=none "
               "evaluate.encoder=none sample.every=null train.max_train_steps=40", "--trial", "train.seed=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        until = time.monotonic() + 900
        while steps(tmp_path) < 2:
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text("utf-8")
            time.sleep(0.1)
        process.terminate()
        assert process.wait(600) == 5, (tmp_path / "log").read_text("utf-8")
    assert "SIGTERM: stopped and saved after step" in (tmp_path / "log").read_text("utf-8")
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "resuming after step" in again.stdout


def test_the_exit_report_names_failed_stages_and_advice() -> None:
    failures = json.dumps([{"displayName": "trials(3)", "message": "Error (exit code 6)"}])
    lines = list(exit_report.format_report("Failed", failures))
    assert lines == ["the workflow ended: Failed", "trials(3): Error (exit code 6) (the loss is no longer a number: "
                     "lower train.learning_rate)"]
    assert list(exit_report.format_report("Failed", json.dumps(failures))) == lines  # encoded twice, as by Argo
    for message in ("The node was low on resource: memory. ", "pod deleted"):
        [_, line] = exit_report.format_report("Failed", json.dumps([{"displayName": "train", "message": message}]))
        assert line.startswith(f"train: {message} (the pod was lost with its node") and "submit the same" in line
    assert list(exit_report.format_report("Succeeded", "null")) == ["the workflow ended: Succeeded"]
    assert list(exit_report.format_report("Succeeded", "{{workflow.failures}}")) == ["the workflow ended: Succeeded"]


def test_a_stage_writes_outputs_for_kubeflow_pipelines(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "objective").write_text("0.25", "utf-8")
    (out / "result.json").write_text('{"objective": 0.25, "scores": {"dino": 0.5}}', "utf-8")
    executor_input = {"outputs": {
        "parameters": {"objective": {"outputFile": f"{tmp_path}/p/objective"}, "run": {"outputFile": "unused"}},
        "artifacts": {"metrics": {"artifacts": [{"name": "metrics", "uri": f"{tmp_path}/metrics"}]}},
        "outputFile": f"{tmp_path}/executor_output.json"}}
    kfp_components.write_outputs(json.dumps(executor_input), out)
    assert (tmp_path / "p/objective").read_text("utf-8") == "0.25"
    output = json.loads((tmp_path / "executor_output.json").read_text("utf-8"))
    assert output["artifacts"]["metrics"]["artifacts"][0]["metadata"] == {"objective": 0.25, "dino": 0.5}
    assert kfp_components.to_local_path("s3://bucket/a/b") == Path("/s3/bucket/a/b")


@pytest.mark.parametrize(("result", "step"), [
    ({"step": 40, "exported_step": 20}, 20), ({"step": 40, "exported_step": 0}, 0), ({"step": 20}, 20),
    ({"step": 40, "exported_step": 30}, 40), (None, 40)])
def test_kubeflow_pipelines_gets_the_scores_of_the_exported_weights(
    result: dict[str, int] | None, step: int, tmp_path: Path
) -> None:
    """With evaluate.select, the exported weights are those of an earlier step than the last."""
    steps = {str(step): {"dino": float(step)} for step in (0, 20, 40)}
    (tmp_path / "evaluation.json").write_text(json.dumps({"steps": steps}), "utf-8")
    if result:
        (tmp_path / "result.json").write_text(json.dumps(result), "utf-8")
    executor_input = {"outputs": {"artifacts": {"measures": {"artifacts": [{"uri": f"{tmp_path}/measures"}]}},
                                  "outputFile": f"{tmp_path}/output.json"}}
    kfp_components.write_outputs(json.dumps(executor_input), tmp_path)
    output = json.loads((tmp_path / "output.json").read_text("utf-8"))
    assert output["artifacts"]["measures"]["artifacts"][0]["metadata"] == {"dino": step}
