"""The files of workflows/ match conf/, and the renderer rejects what is wrong."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonpatch
import pytest
import yaml

from dreambooth import workflows
from dreambooth.cloud import sagemaker_pipeline
from dreambooth.errors import UserError
from dreambooth.kubernetes import submit, trainjob
from dreambooth.kubernetes.argo import build_sweep_template
from dreambooth.kubernetes.render import render_files
from tests.kubernetes import argo_runner as argo
from tests.kubernetes.workflow_files import FOLDER, documents
from tests.support.warm_python import PYTHON

# -- rendering and committed files ---------------------------------------------------------------------------------

def test_the_committed_files_match_conf() -> None:
    """Except for the files of SageMaker, which tests/cloud/test_sagemaker_workflows.py compares."""
    files = workflows.render_portable(workflows.build_shipped_spec())
    assert workflows.find_differences(files, FOLDER) == sorted([workflows.PIPELINE_FILE, workflows.TUNER_FILE])
    assert len(files) > 10


def test_check_names_the_changed_file(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FOLDER, tmp_path / "w")
    changed = tmp_path / "w/base/volume.yaml"
    changed.write_text(changed.read_text("utf-8").replace("200Gi", "20Gi"), "utf-8")
    pipeline = (FOLDER / "sagemaker/pipeline.json").read_text("utf-8")
    monkeypatch.setattr(sagemaker_pipeline, "render_pipeline", lambda spec: pipeline)
    monkeypatch.setattr("sys.argv", ["workflows", "check", "--to", str(tmp_path / "w")])
    monkeypatch.setattr("dreambooth.cli._exit_codes", [])
    with pytest.raises(SystemExit) as exit_info:
        workflows.main()
    assert exit_info.value.code == 1
    assert capfd.readouterr().err == ("dreambooth: files that differ from conf/: base/volume.yaml: "
                                      "type python -m dreambooth.workflows render\n")


def test_check_without_files_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["workflows", "check"])
    monkeypatch.setattr("dreambooth.cli._exit_codes", [])
    with pytest.raises(SystemExit) as exit_info:
        workflows.main()
    assert exit_info.value.code == 1
    assert capfd.readouterr().err.startswith("dreambooth: there are no workflow files in workflows: type --to DIR, ")


@pytest.mark.parametrize("args, message", [
    (["hardware=nope"], "there is no hardware=nope: the options are cpu, g4dn, "),
    (["hardware=g4dn", "precision=bf16"], "type precision=fp16"),
    (["--space", "none", "hardware=cpu"], "there is no search space none"),
    (["hardware=cpu", "train.learning_rate=-1"], "train.learning_rate must be above 0"),
    (["--space", "tiny"], "--space and --image need overrides: type them after render, such as hardware=cpu"),
    (["--image", "mine:1"], "--space and --image need overrides: type them after render, such as hardware=cpu"),
])
def test_render_rejects_wrong_overrides_and_writes_nothing(tmp_path: Path, args: list[str], message: str) -> None:
    command = [PYTHON, "-m", "dreambooth.workflows", "render", "--to", str(tmp_path / "w"), *args]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False), result.stderr
    assert message in result.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("overrides", [[], ["hardware=g5", "dataset=s3", "dataset.instance_dir=s3://BUCKET/photos",
                                            "dataset.instance_prompt=a zwx dog", "dataset.class_prompt=a dog"]])
@pytest.mark.parametrize("kind", submit.KINDS)
def test_a_placeholder_is_not_submitted(
    kind: str, overrides: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Any] = []
    monkeypatch.setattr(submit, "submit", lambda *args: submitted.append(args))
    monkeypatch.setattr("sys.argv", ["workflows", "submit", "--what", kind, *overrides])
    monkeypatch.setattr("dreambooth.cli._exit_codes", [])
    with pytest.raises(SystemExit) as exit_info:
        workflows.main()
    assert (exit_info.value.code, submitted) == (1, [])
    assert capfd.readouterr().err == ("dreambooth: dataset.instance_dir=s3://BUCKET/photos is a placeholder: type the "
                                      "overrides of your run after submit\n")


def test_render_writes_files_for_given_overrides(tmp_path: Path) -> None:
    files = render_files(workflows.build_spec(["hardware=cpu", "train.max_train_steps=5"], "tiny", "mine:1"))
    assert "kubeflow/trainjob-4gpu.yaml" not in files  # no machine with several GPUs is known for hardware=cpu
    assert all("mine:1" in files[f"kubeflow/{name}.yaml"] for name in ("trainjob", "katib-experiment", "pipeline"))
    [template] = yaml.safe_load_all(files["argo/dreambooth-sweep.yaml"])
    assert list(argo.problems(template)) == []
    assert "max-train-steps" not in files["kubeflow/katib-experiment.yaml"]  # fixed by an override
    with pytest.raises(UserError, match="no machine with several GPUs is known for hardware=cpu"):
        trainjob.build_multi_gpu_trainjob(workflows.build_spec(["hardware=cpu"], "tiny"))


@pytest.mark.parametrize("name", ["g4dn", "g5", "cpu", "kueue"])
def test_an_overlay_is_the_base_rendered_for_that_machine(name: str) -> None:
    overlay = yaml.safe_load((FOLDER / f"overlays/{name}/kustomization.yaml").read_text("utf-8"))
    patches = {one["target"]["name"]: yaml.safe_load(one["patch"]) for one in overlay.get("patches", ())}
    expected = build_sweep_template(workflows.build_shipped_spec().overlays[name])
    [base] = documents("argo/dreambooth-sweep.yaml")
    assert jsonpatch.JsonPatch(patches.get("dreambooth-sweep", [])).apply(base) == expected
