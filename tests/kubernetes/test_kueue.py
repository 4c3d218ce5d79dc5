"""Labels for Kueue: on what holds a GPU and nowhere else, and refused where they would have no effect."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from dreambooth import workflows
from dreambooth.kubernetes import argo, katib, pod_spec, submit, trainjob
from tests.kubernetes.workflow_files import documents

LABELS = {"kueue.x-k8s.io/queue-name": "gpus", "kueue.x-k8s.io/priority-class": "nightly"}


def queued() -> workflows.WorkflowSpec:
    return replace(workflows.build_spec(), queue="gpus", priority="nightly")


@pytest.mark.parametrize("build", [argo.build_train_template, argo.build_sweep_template])
def test_a_pod_of_argo_waits_in_the_queue_only_if_it_uses_a_gpu(build: Any) -> None:
    """A pod without a GPU would take quota of the queue, and the report at the end would wait for it."""
    stages = [one for one in build(queued())["spec"]["templates"] if "container" in one]
    labels = {one["name"]: one.get("metadata", {}).get("labels") for one in stages}
    assert {name for name, value in labels.items() if value == LABELS} == set(pod_spec.GPU_STAGES)
    assert all(value is None for name, value in labels.items() if name not in pod_spec.GPU_STAGES)


def test_jobs_of_kubeflow_have_the_labels_and_no_queue_means_no_label() -> None:
    assert trainjob.build_trainjob(queued())["metadata"]["labels"] == LABELS
    assert katib.build_experiment(queued())["spec"]["trialTemplate"]["trialSpec"]["metadata"] == {"labels": LABELS}
    assert "kueue" not in yaml.safe_dump([trainjob.build_trainjob(spec := workflows.build_spec()),
                                          katib.build_experiment(spec), argo.build_sweep_template(spec)])


def test_two_nodes_start_together_or_not_at_all() -> None:
    """Kueue starts a suspended TrainJob when its whole JobSet has quota; without the label it would start nothing."""
    [committed] = documents("kubeflow/trainjob-2nodes.yaml")
    assert committed == trainjob.build_multi_node_trainjob(workflows.build_spec())
    assert committed["spec"]["suspend"] is True
    assert committed["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": trainjob.DEFAULT_QUEUE}
    trainer = committed["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["command"]) == (2, 4, ["torchrun"])
    assert trainjob.build_multi_node_trainjob(queued())["metadata"]["labels"] == LABELS


@pytest.mark.parametrize("args, message", [
    (["render", "--priority", "high", "hardware=cpu"], "--priority is a priority in a queue of Kueue: type --queue"),
    (["render", "--queue", "gpus"], "--queue needs overrides: type them after render, such as hardware=cpu"),
    (["submit", "--what", "slurm", "--queue", "gpus", "hardware=cpu"], "--queue has no effect on --what slurm: type "
     f"--what with one of {', '.join(submit.QUEUED)}, or render with --queue")])
def test_a_label_without_effect_is_refused(
    args: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["workflows", *args])
    monkeypatch.setattr("dreambooth.cli._exit_codes", [])
    with pytest.raises(SystemExit) as exit_info:
        workflows.main()
    assert exit_info.value.code == 1
    assert message in capfd.readouterr().err
