"""Workflows run in containers of the real image: the pipeline by Kubeflow Pipelines' own local runner, the Argo
templates by the runner in tests/kubernetes/argo_runner.py, which is not Argo."""

import json
import os
import subprocess
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kubernetes import argo_runner as argo
from tests.support.docker_engine import run as run_command
from tests.support.image import Image

pytestmark = pytest.mark.container

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workflows"
KFP = ["kfp>=2.17,<2.18", "kfp-kubernetes>=2.17,<2.18", "docker>=7,<8"]
# Two trials of sweep=tiny, which differ in prior_loss_weight: overrides fix the other keys.
SHORT = ("hardware=cpu train.max_train_steps=2 train.learning_rate=3e-4 train.train_text_encoder=true "
         "prior.num_class_images=4 prior.num_inference_steps=2 sample.num_inference_steps=2 sample.images_per_prompt=1 "
         "sample.every=2 evaluate.images_per_prompt=1 evaluate.class_images=2 tracking.experiment=workflows")


def read_promoted(runs: Path) -> dict[str, Any]:
    """promoted.json, after checks: the champion is the trial with the lowest objective, and is registered in MLflow."""
    promoted: dict[str, Any] = json.loads((runs / "promoted.json").read_text("utf-8"))
    trials = {path.parent.name: json.loads(path.read_text("utf-8"))["objective"] for path in runs.glob("*/result.json")}
    assert len(trials) == 2, trials
    assert promoted["objective"] == pytest.approx(min(trials.values()))
    assert trials[promoted["run"]] == pytest.approx(promoted["objective"])
    from mlflow import MlflowClient

    version = MlflowClient(f"sqlite:///{runs}/mlflow.db").get_model_version_by_alias(promoted["name"], "champion")
    assert str(version.version) == str(promoted["version"])
    return promoted


def test_the_argo_sweep_runs_in_containers_and_promotes_a_champion(image: Image, tmp_path: Path) -> None:
    """The first trial exits with 5 once, as if its node had been preempted."""
    [template] = yaml.safe_load_all((FOLDER / "argo/dreambooth-sweep.yaml").read_text("utf-8"))
    volume = tmp_path / "runs"
    volume.mkdir()
    volume.chmod(0o777)
    security = template["spec"]["securityContext"]
    logs: list[str] = []

    def run_container(command: list[str], container: dict[str, Any], out: Path) -> int:
        [mount] = container["volumeMounts"]
        environment = [arg for item in container["env"] for arg in ("--env", f"{item['name']}={item['value']}")]
        output_folder = command[command.index("--out") + 1]
        process = image.docker(
            "run", "--rm", "--network", "none", "--user", f"{security['runAsUser']}:{security['runAsGroup']}",
            "--volume", f"{volume}:{mount['mountPath']}", "--volume", f"{out}:{output_folder}", *environment,
            "--entrypoint", command[0], container["image"], *command[1:])
        logs.append(process.stdout + process.stderr)
        trained = sum("dreambooth: python -m dreambooth.train" in log for log in logs)
        return 5 if command[3] == "train" and trained == 1 else process.returncode

    runner = argo.Runner(template, run_container, tmp_path, "sweep-of-two", {
        "image": image.tag, "overrides": SHORT, "sweep": "tiny"})
    status = runner()
    assert status == "Succeeded", "\n".join(logs)
    assert [(name, code) for name, _, code in runner.executed] == [
        ("validate", 0), ("class-images", 0), ("train", 5), ("train", 0), ("evaluate", 0), ("train", 0),
        ("evaluate", 0), ("promote", 0), ("ended", 0)]
    assert "4 class images: 4 existing, 0 to generate" in logs[2]
    assert "this run is finished" in logs[3]
    assert "the workflow ended: Succeeded" in logs[-1]
    promoted = read_promoted(volume)
    assert promoted["sweep"] == "sweep-of-two"
    artifacts = {path.name for path in (tmp_path / "artifacts").rglob("*") if path.is_file()}
    assert artifacts == {"result.json", "contact_sheet.png", "evaluation.json", "promoted.json", "compare.html"}


@pytest.fixture(scope="module")
def kfp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a separate environment with kfp, which requires older packages than this project."""
    folder = tmp_path_factory.mktemp("kfp")
    venv.create(folder, with_pip=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    installation = run_command(*pip, *KFP)
    assert installation.returncode == 0, installation.stderr
    return folder / "bin/python"


def test_the_kubeflow_pipeline_runs_in_containers_and_promotes_a_champion(
    image: Image, kfp: Path, tmp_path: Path
) -> None:
    """By kfp.local.DockerRunner, Kubeflow Pipelines' own."""
    parameters = [f"overrides={SHORT}", "sweep=tiny", "evaluate="]
    script = Path(__file__).parent / "kfp_local.py"
    process = subprocess.run(
        [kfp, script, FOLDER / "kubeflow/pipeline.yaml", image.tag, tmp_path, *parameters],
        capture_output=True, text=True, timeout=900, check=False, env=os.environ | image.docker.environment)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-3000:]
    artifacts = {(path.parents[1].name, path.parent.name): json.loads(path.read_text("utf-8"))["artifacts"]
                 for path in (tmp_path / "root").rglob("executor_output.json")}
    metadata = {stage: {name: output["artifacts"][0]["metadata"] for name, output in outputs.items()}
                for stage, outputs in artifacts.items()}
    objectives = [outputs["metrics"]["objective"] for (_, stage), outputs in metadata.items() if stage == "train"]
    [champion] = [outputs["model"] for (_, stage), outputs in metadata.items() if stage == "promote"]
    assert (champion["alias"], champion["objective"]) == ("champion", pytest.approx(min(objectives)))
    measures = [outputs["measures"] for (_, stage), outputs in metadata.items() if stage == "evaluate"]
    assert (len(objectives), len(measures)) == (2, 2)
    assert all("subject_similarity_efficientnet_lite0" in scores for scores in measures)
    [model] = [path.parent for path in (tmp_path / "root").rglob("model_index.json")]  # the workspace has been deleted
    assert (model / "unet/diffusion_pytorch_model.safetensors").stat().st_size > 1000
    pages = [path.read_text("utf-8") for path in (tmp_path / "root").rglob("contact_sheet")]
    assert ["data:image/png" in page for page in pages] == [True, True]
