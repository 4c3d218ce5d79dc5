"""A Kubernetes API in memory (kmock) for the real kubectl and Kubeflow client; no controllers run."""

import asyncio
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kmock
import yaml

from tests.support.docker_engine import must, run

Json = dict[str, Any]
VERBS = {"get", "list", "watch", "create", "update", "patch", "delete"}
RESOURCES = {  # plural, version and group -> kind, whether it is namespaced
    "v1/namespaces": ("Namespace", False), "v1/pods": ("Pod", True), "v1/configmaps": ("ConfigMap", True),
    "v1/serviceaccounts": ("ServiceAccount", True), "v1/persistentvolumeclaims": ("PersistentVolumeClaim", True),
    "roles.v1.rbac.authorization.k8s.io": ("Role", True),
    "rolebindings.v1.rbac.authorization.k8s.io": ("RoleBinding", True),
    "workflowtemplates.v1alpha1.argoproj.io": ("WorkflowTemplate", True),
    "cronworkflows.v1alpha1.argoproj.io": ("CronWorkflow", True),
    "trainjobs.v1alpha1.trainer.kubeflow.org": ("TrainJob", True),
    "trainingruntimes.v1alpha1.trainer.kubeflow.org": ("TrainingRuntime", True),
    "clustertrainingruntimes.v1alpha1.trainer.kubeflow.org": ("ClusterTrainingRuntime", False),
    "experiments.v1beta1.kubeflow.org": ("Experiment", True),
}
RUNTIME = {  # a shortened version of the one that Kubeflow Trainer installs
    "apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {"mlPolicy": {"numNodes": 1, "torch": {}}, "template": {"spec": {"replicatedJobs": [{
        "name": "node", "template": {"metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                                     "spec": {"template": {"spec": {
                                         "containers": [{"name": "node", "image": "torch"}]}}}}}]}}}}


class _Api(kmock.KubernetesEmulator):
    """Adds the metadata to a new object that a server would add."""

    async def _handle(self, request: Any) -> Any:
        if request.resource is not None and request.action == kmock.action.CREATE:
            metadata = request.data.setdefault("metadata", {})
            metadata |= {"creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "uid": "1"}
            if request.namespace:
                metadata.setdefault("namespace", request.namespace)
        return await super()._handle(request)


@dataclass
class Cluster:
    """Address and kubeconfig of the API, and its objects."""

    url: str
    kubeconfig: Path
    api: Any
    environment: dict[str, str] = field(default_factory=dict)

    def kubectl(self, *args: str | Path) -> str:
        """Run the real kubectl; it must succeed. Return its output."""
        return must("kubectl", *args, env=os.environ | {"KUBECONFIG": str(self.kubeconfig)}, timeout=60)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Serve an API, with the runtime that Kubeflow Trainer installs, until the context ends."""
    ready, stop, server_info = threading.Event(), threading.Event(), {}

    async def serve() -> None:
        async with _Api() as api, kmock.Server(api) as server:
            for name, (kind, namespaced) in RESOURCES.items():
                api.resources[name] = {"kind": kind, "namespaced": namespaced, "singular": kind.lower(), "verbs": VERBS,
                                       "shortnames": set(), "categories": set(), "subresources": set()}
            api.objects["clustertrainingruntimes.v1alpha1.trainer.kubeflow.org", None, "torch-distributed"] = RUNTIME
            api.objects["v1/configmaps", "kubeflow-system", "kubeflow-trainer-public"] = {
                "metadata": {"name": "kubeflow-trainer-public"}, "data": {"kubeflow_trainer_version": "v2.3.0"}}
            api["get /api/v1"] << {  # kmock names this group /v1, which kubectl does not know
                "apiVersion": "v1", "kind": "APIResourceList", "groupVersion": "v1", "resources": [
                    {"name": name.rpartition("/")[2], "kind": kind, "singularName": kind.lower(),
                     "verbs": sorted(VERBS), "namespaced": namespaced}
                    for name, (kind, namespaced) in RESOURCES.items() if "/" in name]}
            server_info["api"], server_info["url"] = api, str(server.url).rstrip("/")
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    config = folder / "kubeconfig"
    config.write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server_info["url"]}}],
        "users": [{"name": "test", "user": {"token": "none"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "dreambooth"}}]}))
    try:
        yield Cluster(server_info["url"], config, server_info["api"])
    finally:
        stop.set()
        thread.join(10)


def install_kubectl() -> None:
    """Install Debian's kubectl if there is none."""
    if shutil.which("kubectl") is None:
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "update", "-qq", env=quiet)
        must("apt-get", "install", "-y", "-qq", "--no-install-recommends", "kubernetes-client", env=quiet)
