"""Kubernetes replaces $(NAME) in args by an environment variable, such as a password. No text of a user is replaced."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dreambooth import stage, workflows
from dreambooth.config.compose import SearchSpace
from dreambooth.kubernetes import argo, katib, kfp_pipeline, pod_spec, trainjob
from dreambooth.kubernetes.workflow_spec import WorkflowSpec
from tests.kubernetes.workflow_files import SECRET, expanded, katib_trials

PROMPT = f"dataset.instance_prompt=a photo of a zwx $({SECRET}) $$({SECRET}) $HOME $${{x}}"


@given(st.text(st.sampled_from("$()aA{ ")))
@example("$(A)$$(A)$$$(A)$$")
def test_an_escaped_text_arrives_as_it_is(text: str) -> None:
    complete = text + ")"  # Expand reads on until a parenthesis is closed
    assert expanded(pod_spec.escape_variables(complete)) == complete


def spec() -> WorkflowSpec:
    return WorkflowSpec((*workflows.DEFAULT_OVERRIDES, PROMPT), SearchSpace(
        "mine", {"train.seed": ("1", "2"), "dataset.class_prompt": (f"'a $({SECRET}) dog'", "a dog")}),
        workflows.build_spec().hardware, "image")


def args_of(container: dict[str, Any]) -> list[str]:
    return [expanded(arg) for arg in container["args"]]


@pytest.mark.parametrize("build", [trainjob.build_trainjob, trainjob.build_multi_gpu_trainjob])
def test_a_prompt_with_a_variable_reaches_a_trainjob_unchanged(build: Any) -> None:
    assert PROMPT in args_of(build(spec())["spec"]["trainer"])


def test_a_prompt_with_a_variable_reaches_a_trial_of_katib_unchanged() -> None:
    trials = katib_trials(katib.build_experiment(spec()))
    assert all(PROMPT in overrides for overrides in trials)
    assert f"dataset.class_prompt='a $({SECRET}) dog'" in trials[0]


def test_a_prompt_with_a_variable_reaches_the_stages_of_argo_and_kubeflow_unchanged(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both engines insert the parameter `overrides`, and each item of the list of trials, into the args of a stage."""
    templates = [argo.build_train_template(spec()), argo.build_nightly_workflow(spec())["spec"]["workflowSpec"]]
    texts = [one["value"] for template in templates for one in template.get("spec", template)["arguments"]["parameters"]
             if one["name"] == "overrides"]
    [pipeline, _] = kfp_pipeline.build_pipeline(spec())
    texts.append(pipeline["root"]["inputDefinitions"]["parameters"]["overrides"]["defaultValue"])
    assert len(texts) == 3
    assert all(PROMPT in stage._split_overrides(expanded(text)) for text in texts)


def test_parameters_of_katib_that_end_alike_keep_their_own_values() -> None:
    keys = ("prior.guidance_scale", "sample.guidance_scale")
    space = SearchSpace("mine", {keys[0]: ("1", "2"), keys[1]: ("3", "4")})
    experiment = katib.build_experiment(WorkflowSpec((), space, workflows.build_spec().hardware, "image"))["spec"]
    names = [one["name"] for one in experiment["parameters"]]
    assert names == ["prior-guidance-scale", "sample-guidance-scale"]
    [container] = experiment["trialTemplate"]["trialSpec"]["spec"]["template"]["spec"]["containers"]
    values = [one.get("value") for one in container["env"]]
    for one in experiment["trialTemplate"]["trialParameters"]:
        assert f"{one['description']}=${{trialParameters.{one['name']}}}" in values
