"""Workflows submitted by the real kubectl, the real Kubeflow client and hera to a Kubernetes API in memory."""

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
from tests.kubernetes.kubernetes_api import Cluster, cluster, install_kubectl
from tests.support.docker_engine import must

pytestmark = pytest.mark.container  # installs kubectl if it is missing

FOLDER = Path(__file__).parents[2] / "workflows"
OVERRIDES = [override.replace("s3://BUCKET", "s3://mine") for override in workflows.DEFAULT_OVERRIDES]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as api:
        yield api


def submit(api: Cluster, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dreambooth.workflows", "submit", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600,
                          env=os.environ | {"KUBECONFIG": str(api.kubeconfig), **environment})


def get_object(api: Cluster, kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(api.kubectl("get", kind, name, "-o", "json"))
    return found


def test_kubectl_creates_a_trainjob_and_the_kubeflow_client_reads_it(
    api: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_kubectl()
    api.kubectl("create", "--validate=false", "-f", FOLDER / "kubeflow/trainjob-4gpu.yaml")
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
    from kubeflow.common.types import KubernetesBackendConfig
    from kubeflow.trainer import TrainerClient
    from kubernetes import config

    monkeypatch.setattr(config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(api.kubeconfig))
    client = TrainerClient(KubernetesBackendConfig(namespace="dreambooth", config_file=str(api.kubeconfig)))
    [job] = client.list_jobs()
    assert (job.name, job.runtime.name, job.num_nodes) == ("dreambooth-4gpu", "torch-distributed", 1)
    [expected] = yaml.safe_load_all((FOLDER / "kubeflow/trainjob-4gpu.yaml").read_text("utf-8"))
    assert get_object(api, "trainjob", "dreambooth-4gpu")["spec"] == expected["spec"]


@pytest.mark.parametrize("option, kind, build", [
    ("trainjob", "trainjob", trainjob.build_trainjob),
    ("trainjob-nodes", "trainjob", trainjob.build_multi_node_trainjob),
    ("katib", "experiment", katib.build_experiment)])
def test_the_kubeflow_client_creates_the_rendered_object_and_kubectl_reads_it(
    api: Cluster, option: str, kind: str, build: Any
) -> None:
    install_kubectl()
    first = submit(api, "--what", option, "--name", "mine", *OVERRIDES)
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{build(workflows.build_spec(OVERRIDES))['kind']} mine in dreambooth\n"
    created = get_object(api, kind, "mine")
    assert created["spec"] == build(workflows.build_spec(OVERRIDES))["spec"]
    assert created["metadata"]["namespace"] == "dreambooth"
    second = submit(api, "--what", option, "--name", "mine", *OVERRIDES)
    assert (second.returncode, "Traceback" in second.stderr) == (1, False)
    assert "the cluster rejected the" in second.stderr


@pytest.mark.parametrize("name", ["g4dn", "g5", "cpu", "kueue"])
def test_kubectl_builds_and_applies_an_overlay(api: Cluster, name: str, tmp_path: Path) -> None:
    install_kubectl()
    built = must("kubectl", "kustomize", FOLDER / f"overlays/{name}")
    objects = list(yaml.safe_load_all(built))
    templates = {one["metadata"]["name"]: one for one in objects if one["kind"] == "WorkflowTemplate"}
    (tmp_path / "built.yaml").write_text(  # kmock cannot create namespaces
        yaml.safe_dump_all([one for one in objects if one["kind"] != "Namespace"]), "utf-8")
    machine = workflows.build_shipped_spec().overlays[name]
    assert templates["dreambooth-sweep"]["spec"] == argo.build_sweep_template(machine)["spec"]
    assert templates["dreambooth-train"]["spec"] == argo.build_train_template(machine)["spec"]
    api.kubectl("apply", "--validate=false", "-f", tmp_path / "built.yaml")
    assert get_object(api, "workflowtemplate", "dreambooth-sweep")["spec"] == argo.build_sweep_template(machine)["spec"]
    assert get_object(api, "persistentvolumeclaim", "dreambooth-runs")["metadata"]["namespace"] == "dreambooth"


def test_hera_submits_a_workflow_of_the_template(api: Cluster) -> None:
    api.api["post /api/v1/workflows/dreambooth/submit"] << {
        "metadata": {"name": "dreambooth-sweep-x7", "namespace": "dreambooth"}, "spec": {}}
    args = ["--what", "sweep", "--space", "tiny", "hardware=cpu"]
    result = submit(api, *args, ARGO_SERVER=api.url, ARGO_TOKEN="Bearer x")
    assert (result.returncode, result.stdout) == (0, "workflow dreambooth-sweep-x7 in dreambooth\n"), result.stderr
    [request] = list(api.api["post /api/v1/workflows/dreambooth/submit"])
    assert request.data["resourceName"] == "dreambooth-sweep"
    assert request.data["submitOptions"]["parameters"] == [
        f"image={workflows.DEFAULT_IMAGE}", "overrides=hardware=cpu", "sweep=tiny"]


@pytest.mark.parametrize("option, message", [
    ("sweep", "set ARGO_SERVER=https://HOST:2746 and ARGO_TOKEN"), ("trainjob", "the cluster rejected the TrainJob")])
def test_without_a_cluster_one_sentence_says_what_is_missing(tmp_path: Path, option: str, message: str) -> None:
    command = [sys.executable, "-m", "dreambooth.workflows", "submit", "--what", option, "hardware=cpu"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env={
        key: value for key, value in os.environ.items() if not key.startswith("ARGO")} | {
            "KUBECONFIG": str(tmp_path / "none")})
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert message in result.stderr
