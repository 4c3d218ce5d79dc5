"""Workflows on their way to a cluster: the real kubectl, the real Kubeflow client and hera, to an API in memory."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dreambooth import workflows
from dreambooth.kubernetes import argo, katib, trainjob
from tests.support.docker_engine import must
from tests.support.kubernetes_api import Cluster, cluster, find_kubectl

pytestmark = pytest.mark.container  # kubectl is installed where there is none

FOLDER = Path(__file__).parents[2] / "workflows"
MINE = [word.replace("s3://BUCKET", "s3://mine") for word in workflows.DEFAULT]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as found:
        yield found


def submit(api: Cluster, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dreambooth.workflows", "submit", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120,
                          env=os.environ | {"KUBECONFIG": str(api.kubeconfig), **environment})


def there(api: Cluster, kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(api.kubectl("get", kind, name, "-o", "json"))
    return found


def test_kubectl_creates_a_trainjob_and_the_kubeflow_client_reads_it(
    api: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_kubectl()
    api.kubectl("create", "--validate=false", "-f", FOLDER / "kubeflow/trainjob-4gpu.yaml")
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
    from kubeflow.common.types import KubernetesBackendConfig
    from kubeflow.trainer import TrainerClient
    from kubernetes import config

    monkeypatch.setattr(config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(api.kubeconfig))
    client = TrainerClient(KubernetesBackendConfig(namespace="dreambooth", config_file=str(api.kubeconfig)))
    [job] = client.list_jobs()
    assert (job.name, job.runtime.name, job.num_nodes) == ("dreambooth-4gpu", "torch-distributed", 1)
    [wanted] = yaml.safe_load_all((FOLDER / "kubeflow/trainjob-4gpu.yaml").read_text("utf-8"))
    assert there(api, "trainjob", "dreambooth-4gpu")["spec"] == wanted["spec"]


@pytest.mark.parametrize("what, kind, render", [
    ("trainjob", "trainjob", trainjob.single), ("katib", "experiment", katib.experiment)])
def test_the_kubeflow_client_creates_what_is_rendered_and_kubectl_reads_it(
    api: Cluster, what: str, kind: str, render: Any
) -> None:
    find_kubectl()
    told = submit(api, "--what", what, "--name", "mine", *MINE)
    assert told.returncode == 0, told.stderr
    assert told.stdout == f"{render(workflows.asked(MINE))['kind']} mine in dreambooth\n"
    found = there(api, kind, "mine")
    assert found["spec"] == render(workflows.asked(MINE))["spec"]
    assert found["metadata"]["namespace"] == "dreambooth"
    again = submit(api, "--what", what, "--name", "mine", *MINE)
    assert (again.returncode, "Traceback" in again.stderr) == (1, False)
    assert "the cluster did not take the" in again.stderr


@pytest.mark.parametrize("name", ["g4dn", "g5", "cpu"])
def test_kubectl_builds_and_applies_an_overlay(api: Cluster, name: str, tmp_path: Path) -> None:
    find_kubectl()
    built = must("kubectl", "kustomize", FOLDER / f"overlays/{name}")
    objects = list(yaml.safe_load_all(built))
    made = {one["metadata"]["name"]: one for one in objects if one["kind"] == "WorkflowTemplate"}
    (tmp_path / "built.yaml").write_text(  # kmock cannot create namespaces
        yaml.safe_dump_all([one for one in objects if one["kind"] != "Namespace"]), "utf-8")
    machine = workflows.shipped().machines[name]
    assert made["dreambooth-sweep"]["spec"] == argo.sweep(machine)["spec"]
    assert made["dreambooth-train"]["spec"] == argo.train(machine)["spec"]
    api.kubectl("apply", "--validate=false", "-f", tmp_path / "built.yaml")
    assert there(api, "workflowtemplate", "dreambooth-sweep")["spec"] == argo.sweep(machine)["spec"]
    assert there(api, "persistentvolumeclaim", "dreambooth-runs")["metadata"]["namespace"] == "dreambooth"


def test_hera_submits_a_workflow_of_the_template(api: Cluster) -> None:
    api.api["post /api/v1/workflows/dreambooth/submit"] << {
        "metadata": {"name": "dreambooth-sweep-x7", "namespace": "dreambooth"}, "spec": {}}
    told = submit(api, "--what", "sweep", "--space", "tiny", "hardware=cpu", ARGO_SERVER=api.url, ARGO_TOKEN="Bearer x")
    assert (told.returncode, told.stdout) == (0, "workflow dreambooth-sweep-x7 in dreambooth\n"), told.stderr
    [request] = list(api.api["post /api/v1/workflows/dreambooth/submit"])
    assert request.data["resourceName"] == "dreambooth-sweep"
    assert request.data["submitOptions"]["parameters"] == [
        f"image={workflows.IMAGE}", "overrides=hardware=cpu", "sweep=tiny"]


@pytest.mark.parametrize("what, said", [
    ("sweep", "set ARGO_SERVER=https://HOST:2746 and ARGO_TOKEN"), ("trainjob", "did not take the TrainJob")])
def test_without_a_cluster_one_sentence_says_what_is_missing(tmp_path: Path, what: str, said: str) -> None:
    command = [sys.executable, "-m", "dreambooth.workflows", "submit", "--what", what, "hardware=cpu"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env={
        key: value for key, value in os.environ.items() if not key.startswith("ARGO")} | {
            "KUBECONFIG": str(tmp_path / "none")})
    assert (told.returncode, "Traceback" in told.stderr) == (1, False)
    assert said in told.stderr
