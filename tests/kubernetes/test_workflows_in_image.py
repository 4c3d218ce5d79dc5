"""Workflows really run, with the real image: the pipeline by Kubeflow Pipelines' own local runner, the Argo templates
by a runner of ours that is not Argo."""

import json
import os
import subprocess
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import argo_runner as argo
from tests.support.docker_engine import run as call
from tests.support.image import Image

pytestmark = pytest.mark.container

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workflows"
KFP = ["kfp>=2.17,<2.18", "kfp-kubernetes>=2.17,<2.18", "docker>=7,<8"]
# Two trials of the tiny space, for what is typed is fixed: the weights of the prior.
SHORT = ("hardware=cpu train.max_train_steps=2 train.learning_rate=3e-4 train.train_text_encoder=true "
         "prior.num_class_images=4 prior.num_inference_steps=2 sample.num_inference_steps=2 sample.images_per_prompt=1 "
         "sample.every=2 evaluate.images_per_prompt=1 evaluate.class_images=2 tracking.experiment=workflows")


def promoted(runs: Path) -> dict[str, Any]:
    """promoted.json, looked through: the champion is the trial with the lowest objective, and in the registry."""
    said: dict[str, Any] = json.loads((runs / "promoted.json").read_text("utf-8"))
    trials = {path.parent.name: json.loads(path.read_text("utf-8"))["objective"] for path in runs.glob("*/result.json")}
    assert len(trials) == 2, trials
    assert said["objective"] == pytest.approx(min(trials.values()))
    assert trials[said["run"]] == pytest.approx(said["objective"])
    from mlflow import MlflowClient

    version = MlflowClient(f"sqlite:///{runs}/mlflow.db").get_model_version_by_alias(said["name"], "champion")
    assert str(version.version) == str(said["version"])
    return said


def test_argos_sweep_runs_in_containers_and_ends_in_a_champion(image: Image, tmp_path: Path) -> None:
    """By the runner in argo.py, which is not Argo. The first trial is interrupted once, as a preempted node would."""
    [template] = yaml.safe_load_all((FOLDER / "argo/dreambooth-sweep.yaml").read_text("utf-8"))
    volume = tmp_path / "runs"
    volume.mkdir()
    volume.chmod(0o777)
    security = template["spec"]["securityContext"]
    logs: list[str] = []

    def run(words: list[str], container: dict[str, Any], out: Path) -> int:
        [mount] = container["volumeMounts"]
        environment = [word for item in container["env"] for word in ("--env", f"{item['name']}={item['value']}")]
        where = words[words.index("--out") + 1]
        ran = image.docker(
            "run", "--rm", "--network", "none", "--user", f"{security['runAsUser']}:{security['runAsGroup']}",
            "--volume", f"{volume}:{mount['mountPath']}", "--volume", f"{out}:{where}", *environment,
            "--entrypoint", words[0], container["image"], *words[1:])
        logs.append(ran.stdout + ran.stderr)
        trained = sum("dreambooth: python -m dreambooth.train" in log for log in logs)
        return 5 if words[3] == "train" and trained == 1 else ran.returncode

    runner = argo.Runner(template, run, tmp_path, "sweep-of-two", {
        "image": image.tag, "overrides": SHORT, "sweep": "tiny"})
    status = runner()
    assert status == "Succeeded", "\n".join(logs)
    assert [(name, code) for name, _, code in runner.ran] == [
        ("validate", 0), ("class-images", 0), ("train", 5), ("train", 0), ("evaluate", 0), ("train", 0),
        ("evaluate", 0), ("promote", 0), ("ended", 0)]
    assert "4 class images: 4 kept, 0 to make" in logs[2]
    assert "this run is finished" in logs[3]
    assert "the workflow ended: Succeeded" in logs[-1]
    said = promoted(volume)
    assert said["sweep"] == "sweep-of-two"
    kept = {path.name for path in (tmp_path / "artifacts").rglob("*") if path.is_file()}
    assert kept == {"result.json", "contact_sheet.png", "evaluation.json", "promoted.json", "compare.html"}


@pytest.fixture(scope="module")
def kfp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with kfp: it asks for older packages than this project."""
    folder = tmp_path_factory.mktemp("kfp")
    venv.create(folder, with_pip=True)
    made = call(folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *KFP)
    assert made.returncode == 0, made.stderr
    return folder / "bin/python"


def test_the_kubeflow_pipeline_runs_in_containers_and_ends_in_a_champion(
    image: Image, kfp: Path, tmp_path: Path
) -> None:
    """By kfp.local.DockerRunner, Kubeflow Pipelines' own."""
    words = [f"overrides={SHORT}", "sweep=tiny", "evaluate="]
    ran = subprocess.run(
        [kfp, ROOT / "tests/support/kfp_local.py", FOLDER / "kubeflow/pipeline.yaml", image.tag, tmp_path, *words],
        capture_output=True, text=True, timeout=900, check=False, env=os.environ | image.docker.environment)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]
    said = {(path.parents[1].name, path.parent.name): json.loads(path.read_text("utf-8"))["artifacts"]
            for path in (tmp_path / "root").rglob("executor_output.json")}
    metadata = {stage: {name: found["artifacts"][0]["metadata"] for name, found in artifacts.items()}
                for stage, artifacts in said.items()}
    objectives = [made["metrics"]["objective"] for (_, stage), made in metadata.items() if stage == "train"]
    [champion] = [made["model"] for (_, stage), made in metadata.items() if stage == "promote"]
    assert (champion["alias"], champion["objective"]) == ("champion", pytest.approx(min(objectives)))
    measured = [made["measures"] for (_, stage), made in metadata.items() if stage == "evaluate"]
    assert (len(objectives), len(measured)) == (2, 2)
    assert all("subject_similarity_efficientnet_lite0" in one for one in measured)
    [model] = [path.parent for path in (tmp_path / "root").rglob("model_index.json")]  # the workspace is gone by now
    assert (model / "unet/diffusion_pytorch_model.safetensors").stat().st_size > 1000
    pages = [path.read_text("utf-8") for path in (tmp_path / "root").rglob("contact_sheet")]
    assert ["data:image/png" in page for page in pages] == [True, True]
