"""Builds the objects that serve a model on Kubernetes: a Deployment with Service and autoscaler, or KServe's service.

Both run `python -m dreambooth.serve` in the container image of the workflows. The model is in the environment variable
MODEL, so that a new version is one change of the Deployment, and the previous version is still known.
"""

from typing import Any

from dreambooth.config.enums import Device
from dreambooth.kubernetes import pod_spec
from dreambooth.kubernetes.workflow_spec import WorkflowSpec

NAME = "dreambooth-serve"
PORT = 8080
CONTAINER = "serve"  # name of the container of the Deployment
MODEL = "MODEL"  # environment variable with the value of the option `run`
MODEL_URI = "s3://BUCKET/models/NAME"  # placeholder: folder of an exported model, which KServe downloads
KSERVE_MOUNT = "/mnt/models"  # where KServe puts the files of STORAGE_URI
QUEUE_METRIC = "dreambooth_queue_pictures"  # metric of the server, see docs/serving.md
QUEUE_TARGET = 4  # pictures that wait per pod: above, more pods are started
# KServe's own autoscaler sees only CPU and memory. A pod that draws keeps one of its two CPUs busy, which is 50 %.
CPU_TARGET = 40  # percent of the requested CPUs: above, more pods are started
MAX_REPLICAS = 4
GRACE_SECONDS = 60  # seconds in which the server finishes its pictures after SIGTERM
DRAIN_SECONDS = 5  # seconds before SIGTERM, in which the Service stops sending requests to the pod
START_MINUTES = 15  # longest start: download and loading of a large model
STRATEGY = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
LABELS = {"app.kubernetes.io/name": NAME, "app.kubernetes.io/part-of": "dreambooth"}


def build_deployment(spec: WorkflowSpec) -> list[dict[str, Any]]:
    """Build the Deployment of the server, its Service, and a HorizontalPodAutoscaler on the length of the queue.

    The Deployment serves the champion of `spec.model_name`. A pod of a new version replaces a pod of the old one only
    when it is ready.
    """
    pod = _pod(spec, {MODEL: f"models:/{spec.model_name}@champion"}) | {
        "securityContext": pod_spec.security_context(),
        "serviceAccountName": pod_spec.SERVICE_ACCOUNT, "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS + 2 * DRAIN_SECONDS}
    annotations = {"prometheus.io/scrape": "true", "prometheus.io/port": str(PORT), "prometheus.io/path": "/metrics"}
    return [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": NAME, "labels": LABELS},
         "spec": {
             "selector": {"matchLabels": LABELS}, "revisionHistoryLimit": 5,
             "strategy": STRATEGY,
             "progressDeadlineSeconds": (START_MINUTES + 5) * 60,
             "template": {"metadata": {"labels": LABELS, "annotations": annotations}, "spec": pod}}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME, "labels": LABELS},
         "spec": {"selector": LABELS, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}},
        {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
         "metadata": {"name": NAME, "labels": LABELS},
         "spec": {
             "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME},
             "minReplicas": 1, "maxReplicas": MAX_REPLICAS,
             "metrics": [{"type": "Pods", "pods": {"metric": {"name": QUEUE_METRIC}, "target": {
                 "type": "AverageValue", "averageValue": str(QUEUE_TARGET)}}}],
             "behavior": {"scaleDown": {"stabilizationWindowSeconds": 600}}}},
    ]


def build_inference_service(spec: WorkflowSpec) -> dict[str, Any]:
    """Build KServe's InferenceService with a custom predictor. KServe downloads the model and routes the requests.

    The deployment mode is KServe's `Standard`, by the name that earlier versions know, too. The mode `Knative` allows
    neither volumes of runs nor lifecycle hooks.
    """
    pod = _pod(spec, {"STORAGE_URI": MODEL_URI, MODEL: KSERVE_MOUNT}, "kserve-container")  # KServe expects these names
    return {
        "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService",
        "metadata": {"name": NAME, "labels": LABELS, "annotations": {
            "serving.kserve.io/deploymentMode": "RawDeployment"}},
        "spec": {"predictor": {
            "minReplicas": 1, "maxReplicas": MAX_REPLICAS, "scaleMetric": "cpu", "scaleTarget": CPU_TARGET,
            "timeout": 600, "deploymentStrategy": STRATEGY, "serviceAccountName": pod_spec.SERVICE_ACCOUNT, **pod,
            "securityContext": pod_spec.security_context(),
            "terminationGracePeriodSeconds": GRACE_SECONDS + 2 * DRAIN_SECONDS}}}


def _pod(spec: WorkflowSpec, variables: dict[str, str], name: str = CONTAINER) -> dict[str, Any]:
    """Build the specification of a pod that serves, without what its controller sets.

    The root file system is read-only. Downloads of models are in a temporary volume; models of the Hugging Face hub are
    on the volume of the runs, where training has downloaded them. The Secret may contain the token of the server.
    """
    args = [f"run=$({MODEL})", "host=0.0.0.0", f"port={PORT}", "cache=/tmp/models", f"grace_seconds={GRACE_SECONDS}"]
    container = pod_spec.container(spec.image, ["python", "-m", "dreambooth.serve"], [], variables) | {
        "name": name, "args": args,
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": pod_spec.resources(spec.hardware),
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                            "capabilities": {"drop": ["ALL"]}},
        "startupProbe": _probe("/ping", period=5, failures=START_MINUTES * 12),
        "readinessProbe": _probe("/ping", period=5, failures=2),
        "livenessProbe": _probe("/metrics", period=20, failures=3),  # /ping fails while a worker restarts
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(DRAIN_SECONDS)]}}},
    }
    container["env"] += [{"name": "HOME", "value": "/tmp"}]
    container["volumeMounts"] += [{"name": "tmp", "mountPath": "/tmp"}]
    volumes = [*pod_spec.volumes(), {"name": "tmp", "emptyDir": {}}]
    if spec.hardware.device is not Device.cpu:
        container["volumeMounts"] += [{"name": "shm", "mountPath": "/dev/shm"}]
        volumes += [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]
    return pod_spec.placement(spec.hardware) | {"containers": [container], "volumes": volumes}


def _probe(path: str, period: int, failures: int) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "http"}, "periodSeconds": period, "failureThreshold": failures,
            "timeoutSeconds": 5}
