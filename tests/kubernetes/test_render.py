"""workflows/ matches conf/ and the schemas of its controllers, and every override in it composes to a run."""

import copy
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import jsonschema
import kubernetes_validate
import pytest
import yaml
from hera.workflows import models as hera
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from kubeflow_katib_api.models import V1beta1Experiment
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from dreambooth import stage, workflows
from dreambooth.config import compose
from dreambooth.config.recipe import resolve
from dreambooth.entrypoint import compose_run
from dreambooth.errors import UserError
from dreambooth.kubernetes import exit_report, katib, kfp_components, kfp_pipeline, submit, trainjob
from dreambooth.kubernetes.argo import build_nightly_workflow, build_sweep_template, build_train_template
from dreambooth.kubernetes.render import render_files
from dreambooth.kubernetes.workflow_spec import TRIAL_RUN_DIR, SearchSpace
from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
from tests.support import argo_runner as argo
from tests.support import workflow_schemas as schemas
from tests.support.sagemaker_job import steps
from tests.support.warm_python import PYTHON

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workflows"
Json = dict[str, Any]
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
SPACES = sorted(path.stem for path in (compose.conf_dir() / "sweep").glob("*.yaml"))
ROUND_TRIP = {
    "WorkflowTemplate": lambda one: hera.WorkflowTemplate.model_validate(one).model_dump(**DUMP),
    "CronWorkflow": lambda one: hera.CronWorkflow.model_validate(one).model_dump(**DUMP),
    "TrainJob": lambda one: TrainerV1alpha1TrainJob.from_dict(one).to_dict(),
    "Experiment": lambda one: V1beta1Experiment.from_dict(one).to_dict(),
}
DUMP = {"by_alias": True, "exclude_none": True, "mode": "json"}
KUBERNETES_VERSION = "1.34"  # whose schemas check the built-in objects


def documents(name: str) -> list[Json]:
    return list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))


OBJECTS = [pytest.param(one, id=f"{name}: {one['kind']}") for name in FILES for one in documents(name)
           if one.get("kind") not in (None, "Kustomization")]
TEMPLATES = [param for param in OBJECTS if param.values[0]["kind"] == "WorkflowTemplate"]


# -- rendering and committed files ---------------------------------------------------------------------------------

def test_the_committed_files_match_conf() -> None:
    files = render_files(workflows.build_shipped_spec())
    assert workflows.find_differences(files, FOLDER) == []
    assert len(files) > 10


def test_check_names_the_changed_file(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FOLDER, tmp_path / "w")
    changed = tmp_path / "w/base/volume.yaml"
    changed.write_text(changed.read_text("utf-8").replace("200Gi", "20Gi"), "utf-8")
    monkeypatch.setattr("sys.argv", ["workflows", "check", "--to", str(tmp_path / "w")])
    monkeypatch.setattr("dreambooth.cli._exit_codes", [])
    with pytest.raises(SystemExit) as exit_info:
        workflows.main()
    assert exit_info.value.code == 1
    assert capfd.readouterr().err == ("dreambooth: files that differ from conf/: base/volume.yaml: "
                                      "type python -m dreambooth.workflows render\n")


@pytest.mark.parametrize("args, message", [
    (["hardware=nope"], "Could not find 'hardware/nope'"),
    (["hardware=g4dn", "precision=bf16"], "type precision=fp16"),
    (["--space", "none", "hardware=cpu"], "there is no search space none"),
    (["hardware=cpu", "train.learning_rate=-1"], "train.learning_rate must be above 0"),
    (["--space", "tiny"], "--space and --image go with overrides: type them after render, such as hardware=cpu"),
    (["--image", "mine:1"], "--space and --image go with overrides: type them after render, such as hardware=cpu"),
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


@pytest.mark.parametrize("name", ["g4dn", "g5", "cpu"])
def test_an_overlay_is_the_base_rendered_for_that_machine(name: str) -> None:
    overlay = yaml.safe_load((FOLDER / f"overlays/{name}/kustomization.yaml").read_text("utf-8"))
    patches = {one["target"]["name"]: yaml.safe_load(one["patch"]) for one in overlay.get("patches", ())}
    expected = build_sweep_template(workflows.build_shipped_spec().overlays[name])
    [base] = documents("argo/dreambooth-sweep.yaml")
    assert jsonpatch.JsonPatch(patches.get("dreambooth-sweep", [])).apply(base) == expected


# -- schemas of the controllers ---------------------------------------------------------------------------------------

def schema_errors(one: Json) -> list[str]:
    """Parts of an object that the client models or the schemas of Kubernetes do not know, or would change."""
    kind = one["kind"]
    if kind not in ROUND_TRIP:
        try:
            kubernetes_validate.validate(one, KUBERNETES_VERSION, strict=True)
        except Exception as error:
            return [str(error).splitlines()[0]]
        return []
    try:
        errors = list(differences(one, ROUND_TRIP[kind](one), kind))
    except ValueError as error:
        return [str(error)]
    if kind == "Experiment":
        job = copy.deepcopy(one["spec"]["trialTemplate"]["trialSpec"])
        errors += schema_errors(job | {"metadata": {"name": "trial"}})
    return errors


def differences(one: Any, other: Any, path: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{path}.{number}")
    elif one != other:
        yield path


@pytest.mark.parametrize("one", OBJECTS)
def test_client_models_round_trip_every_object(one: Json) -> None:
    assert schema_errors(one) == []


@pytest.mark.skipif(schemas.FOLDER is None, reason="WORKFLOW_SCHEMAS is not set")
@pytest.mark.parametrize("one", OBJECTS)
def test_strict_schemas_accept_every_object(one: Json) -> None:
    versions = schemas.schemas(one["kind"])
    assert versions or one["kind"] not in ROUND_TRIP
    for version, schema in versions:
        errors = [f"{version} {error.json_path}: {error.message[:200]}"
                  for error in jsonschema.Draft202012Validator(schema).iter_errors(one)]
        assert errors == []


def schema_paths(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every nested object whose keys a schema defines; not of maps with free keys, such as labels."""
    if isinstance(part, dict) and path and path[-1] in ("nodeSelector", "labels", "requests", "limits", "metadata"):
        return
    if isinstance(part, dict):
        yield path
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in items:
        yield from schema_paths(value, (*path, key))


@pytest.mark.parametrize("one", OBJECTS)
def test_a_misspelt_key_is_detected_anywhere(one: Json) -> None:
    """Also without WORKFLOW_SCHEMAS: client models drop an unknown key, which the round trip shows."""
    missed = []
    for path in schema_paths(one):
        broken = copy.deepcopy(one)
        part = broken
        for key in path:
            part = part[key]
        part["misspelt"] = "x"
        detected = bool(schema_errors(broken))
        if schemas.FOLDER and not detected:
            detected = any(not jsonschema.Draft202012Validator(schema).is_valid(broken)
                           for _, schema in schemas.schemas(one["kind"]))
        missed += [] if detected else [path]
    assert missed == []


# -- Argo's own rules ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("template", TEMPLATES)
def test_the_templates_follow_argos_rules(template: Json) -> None:
    assert list(argo.problems(template)) == []


def change(template: Json, path: str, value: Any) -> Json:
    """A copy with a new value at a path below `templates`, such as `1|dag|tasks|0|depends`; None removes the key."""
    changed = copy.deepcopy(template)
    part: Any = changed["spec"]["templates"]
    *parents, last = [int(word) if word.isdecimal() else word for word in path.split("|")]
    for key in parents:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return changed


@pytest.mark.parametrize("path, value, problem", [
    ("0|dag|tasks|1|template", "class-image", "calls class-image, which is not a template"),
    ("0|dag|tasks|1|depends", "validat.Succeeded", "depends on validat, which is not a task"),
    ("0|dag|tasks|0|depends", "promote.Succeeded", "tasks depend on each other in a cycle"),
    ("0|dag|tasks|2|withParam", "{{tasks.validate.outputs.parameters.trial}}", "validate has no output trial"),
    ("0|dag|tasks|1|depends", None, "does not depend on validate"),
    ("0|dag|tasks|2|arguments", None, "does not pass trial"),
    ("0|dag|tasks|3|arguments", {"parameters": [{"name": "x", "value": "y"}]},
     "passes x, which is not an input of promote"),
    ("2|container|args|4", "{{workflow.parameters.override}}", "{{workflow.parameters.override}} is not declared"),
    ("2|container|args|4", "{{item}}", "{{item}} is not declared"),
    ("1|dag|tasks|1|arguments|parameters|0|value", "{{tasks.train.outputs.parameters.ran}}", "train has no output ran"),
    ("1|dag|tasks|0|template", "trial", "templates call each other in a cycle"),
])
def test_the_rules_detect_what_argo_would_reject(path: str, value: Any, problem: str) -> None:
    [template] = documents("argo/dreambooth-sweep.yaml")
    assert problem in "\n".join(argo.problems(change(template, path, value)))


@pytest.mark.parametrize("build", [build_train_template, build_sweep_template])
@pytest.mark.parametrize("code, status, retries", [
    (0, "Failed", False), (1, "Failed", False), (3, "Failed", False), (4, "Failed", False), (6, "Failed", False),
    (5, "Failed", True), (143, "Failed", True), (-1, "Error", True)])
def test_only_interrupted_or_lost_stages_are_retried(build: Any, code: int, status: str, retries: bool) -> None:
    templates = build(workflows.build_spec())["spec"]["templates"]
    parts = [part for part in templates if "container" in part and part["name"] != "ended"]
    assert {argo.should_retry(part, code, 0, status) for part in parts} == {retries}
    assert not any(argo.should_retry(part, 5, 5) for part in parts)


@pytest.mark.parametrize("build", [build_train_template, build_sweep_template])
def test_a_run_that_is_preempted_after_days_is_retried(build: Any) -> None:
    days = 3 * 24 * 3600.0
    parts = [part for part in build(workflows.build_spec())["spec"]["templates"] if "retryStrategy" in part]
    assert {argo.should_retry(part, 5, 0, after=days) for part in parts} == {True}
    strategy = {"limit": "5", "expression": 'lastRetry.status == "Failed"', "backoff": {"maxDuration": "2h"}}
    assert not argo.should_retry({"retryStrategy": strategy}, 5, 0, after=days)
    assert argo.should_retry({"retryStrategy": strategy}, 5, 0, after=7000)
    tasks = kfp_pipeline.build_pipeline(workflows.build_spec())[0]["components"]["comp-trials"]["dag"]["tasks"]
    assert float(tasks["train"]["retryPolicy"]["backoffMaxDuration"].removesuffix("s")) > days


def test_katib_retries_lost_pods_but_not_fatal_exit_codes() -> None:
    [experiment] = documents("kubeflow/katib-experiment.yaml")
    lost_node, fatal = experiment["spec"]["trialTemplate"]["trialSpec"]["spec"]["podFailurePolicy"]["rules"]
    assert (lost_node["action"], lost_node["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert fatal["onExitCodes"]["values"] == [1, 3, 4, 6]


@pytest.mark.parametrize("name", SPACES)
def test_katib_tries_each_point_once(name: str) -> None:
    """Two trials of one point would be one run, and the second would find its folder locked."""
    spec = katib.build_experiment(workflows.build_spec(space=name))["spec"]
    points = [one["feasibleSpace"]["list"] for one in spec["parameters"]]
    assert spec["algorithm"] == {"algorithmName": "grid"}
    assert spec["maxTrialCount"] == math.prod(map(len, points)), "Katib rejects more trials; fewer would omit points"
    assert all(len(set(one)) == len(one) for one in points)


def test_a_trials_arguments_survive_katibs_shell(tmp_path: Path) -> None:
    """Katib's webhook joins command and args by spaces, adds a missing `sh -c`, and redirects the output."""
    experiment = katib.build_experiment(workflows.build_spec())
    [container] = experiment["spec"]["trialTemplate"]["trialSpec"]["spec"]["template"]["spec"]["containers"]
    args = [*container["command"], *container["args"]]
    shell, args = (args[:2], args[2:]) if args[:2] == ["sh", "-c"] else (["sh", "-c"], args)
    (tmp_path / "python").write_text('#!/bin/sh\nfor arg; do echo "$arg"; done\n', "utf-8")
    (tmp_path / "python").chmod(0o755)
    script = " ".join([*args, f"1>{tmp_path}/metrics.log 2>&1", "&&", "echo completed"])
    result = subprocess.run([*shell, script], capture_output=True, text=True, check=False,
                            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (result.returncode, result.stdout) == (0, "completed\n"), result.stderr
    received = (tmp_path / "metrics.log").read_text("utf-8").splitlines()
    assert received[:2] == ["-m", "dreambooth.train"]
    assert {"dataset.instance_prompt=a photo of a zwx dog", TRIAL_RUN_DIR,
            "train.learning_rate=${trialParameters.learning_rate}"} <= set(received)


def environment_sources(part: Any) -> set[tuple[str, str]]:
    """(ConfigMap or Secret, variable) of every reference in a part of a file; "*" stands for all keys."""
    if isinstance(part, list):
        return set().union(*map(environment_sources, part))
    if not isinstance(part, dict):
        return set()
    sources = {(part[kind]["name"], "*") for kind in ("configMapRef", "secretRef") if kind in part}
    sources |= {(source["name"], part["name"]) for source in part.get("valueFrom", {}).values()
                if isinstance(source, dict) and source.get("optional")}
    for kind, name in (("secretAsEnv", "secretName"), ("configMapAsEnv", "configMapName")):
        sources |= {(one[name], key["envVar"]) for one in part.get(kind, ()) for key in one["keyToEnv"]
                    if one["optional"] and key.get("secretKey", key.get("configMapKey")) == key["envVar"]}
    return sources.union(*map(environment_sources, part.values()))


@pytest.mark.parametrize("name", ["argo/dreambooth-train", "argo/dreambooth-sweep", "kubeflow/trainjob",
                                  "kubeflow/trainjob-4gpu", "kubeflow/katib-experiment", "kubeflow/pipeline"])
def test_every_controller_passes_the_same_settings_and_credentials(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text("utf-8")
    expected = {("dreambooth", key) for key in ("MLFLOW_TRACKING_URI", "AWS_DEFAULT_REGION")} | {
        ("dreambooth-secrets", key) for key in (
            "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN")}
    all_keys = {("dreambooth", "*"), ("dreambooth-secrets", "*")}
    assert environment_sources(documents(f"{name}.yaml")) in (expected, all_keys)
    # Pods of Kubeflow Pipelines have its service account: a pipeline cannot choose one.
    assert ("serviceAccountName: dreambooth" in text) == (name != "kubeflow/pipeline")


# -- one definition of a search space ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SPACES)
def test_hydra_optuna_argo_and_katib_search_the_same_points(name: str) -> None:
    values = compose.search_space(name)
    space = SearchSpace(name, values)
    text = (compose.conf_dir() / f"sweep/{name}.yaml").read_text("utf-8")
    params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    overrides = [f"{key}={value}" for key, value in params.items()]
    [jobs] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    assert [list(trial[1:]) for trial in space.trials()] == jobs
    distributions, fixed = create_params_from_overrides(overrides)
    assert fixed == {}
    assert {key: [float(value) for value in one.choices] for key, one in distributions.items()} == {
        key: [float({"True": "1", "False": "0"}.get(value, value)) for value in one] for key, one in values.items()}
    experiment = katib.build_experiment(workflows.build_spec(space=name))
    listed = [one["feasibleSpace"]["list"] for one in experiment["spec"]["parameters"]]
    assert listed == [list(one) for one in values.values()]


@pytest.mark.parametrize("text", ["range(1,4)", "interval(1,4)", "3"])
def test_a_search_space_allows_choices_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/mine.yaml").write_text(f"hydra: {{sweeper: {{params: {{train.seed: '{text}'}}}}}}", "utf-8")
    monkeypatch.setattr(compose, "conf_dir", lambda: tmp_path)
    with pytest.raises(UserError, match=r"type choice\(\.\.\.\) there"):
        compose.search_space("mine")
    with pytest.raises(UserError, match="there is no search space yours: type sweep= one of mine"):
        compose.search_space("yours")


@pytest.mark.slow
def test_optuna_searches_a_space_and_the_best_is_promoted(tmp_path: Path) -> None:
    overrides = ["sweep=tiny", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=0",
                 "train.max_train_steps=1", "train.train_batch_size=1", "prior.num_class_images=2",
                 "prior.num_inference_steps=1", "sample.every=null", "sample.num_inference_steps=1",
                 "evaluate.images_per_prompt=1", "evaluate.class_images=2", "tracking.sweep=mine", "hardware=cpu",
                 f"run_root={tmp_path}"]
    sweep = subprocess.run([PYTHON, "-m", "dreambooth.train", "-m", *overrides], capture_output=True, text=True,
                           check=False, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert sweep.returncode == 0, sweep.stderr
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text("utf-8"))
    assert set(best["best_params"]) == {"train.learning_rate", "prior.prior_loss_weight", "train.train_text_encoder"}
    promotion = subprocess.run([PYTHON, "-m", "dreambooth.promote", "sweep=mine", f"run_root={tmp_path}"],
                               capture_output=True, text=True, check=False, cwd=tmp_path)
    assert promotion.returncode == 0, promotion.stderr
    promoted = json.loads((tmp_path / "promoted.json").read_text("utf-8"))
    assert promoted["objective"] == pytest.approx(best["best_value"])


def test_an_override_fixes_its_key_as_under_hydras_sweepers() -> None:
    space = SearchSpace("mine", {"train.seed": ("1", "2"), "train.learning_rate": ("1e-06", "2e-06")})
    assert space.without_overridden(["train.seed=5", "hardware=cpu"]).trials() == [
        ("sweep=mine", "train.learning_rate=1e-06"), ("sweep=mine", "train.learning_rate=2e-06")]


def test_a_trial_is_the_run_that_hydras_sweeper_would_start(tmp_path: Path) -> None:
    overrides = [f"run_root={tmp_path}", "hardware=cpu", "train.max_train_steps=3"]
    with initialize_config_dir(str(compose.conf_dir()), version_base="1.3"):
        hydra = hydra_compose("config", overrides, return_hydra_config=True).hydra
    _, single = compose_run(overrides)
    _, trial = compose_run([*overrides, TRIAL_RUN_DIR])
    _, longer = compose_run([*overrides[:2], "train.max_train_steps=4", TRIAL_RUN_DIR])
    assert trial == Path(hydra.sweep.dir) / hydra.sweep.subdir
    assert len({single, trial, longer}) == 3


def test_each_night_has_its_own_run_folder_which_a_retry_resumes() -> None:
    """A run folder rejects photos in S3 that have changed since its run began."""
    workflow = build_nightly_workflow(workflows.build_spec())["spec"]["workflowSpec"]
    template = build_train_template(workflows.build_spec())
    assert workflow["workflowTemplateRef"] == {"name": template["metadata"]["name"]}
    arguments = argo.parameters(workflow, "arguments")
    assert arguments.keys() <= argo.parameters(template["spec"], "arguments").keys()
    overrides = shlex.split(arguments["overrides"]["value"])
    assert overrides[:-1] == list(workflows.DEFAULT_OVERRIDES)
    folders = {compose_run([*overrides, "run_root=/runs", f"tracking.sweep={name}"])[1]
               for name in ("mon", "tue", "mon")}
    assert {path.name for path in folders} == {"s3-sd15-full-mon", "s3-sd15-full-tue"}
    stages = argo.by_name(template["spec"]["templates"])
    assert "tracking.sweep={{workflow.name}}" in stages["train"]["container"]["args"]  # the same for a retry
    assert arguments["promote"]["value"] == "replace=true"
    assert "{{workflow.parameters.promote}}" in stages["promote"]["container"]["args"]


# -- every override in every file ----------------------------------------------------------------------------------

def runs() -> Iterator[tuple[str, list[str]]]:
    """The origin and the overrides of every run that a file would start."""
    for name, one in workflows.build_shipped_spec().overlays.items():  # g4dn is the base
        for number, trial in enumerate([(), *one.space.trials()]):
            yield f"{name} {number}", [*one.overrides, "run_root=/runs", *trial]
    for name in ("trainjob", "trainjob-4gpu"):
        [job] = documents(f"kubeflow/{name}.yaml")
        yield name, [arg for arg in job["spec"]["trainer"]["args"] if arg not in ("-m", "dreambooth.train")]
    [experiment] = documents("kubeflow/katib-experiment.yaml")
    spec = experiment["spec"]
    [script] = spec["trialTemplate"]["trialSpec"]["spec"]["template"]["spec"]["containers"][0]["args"]
    args = shlex.split(script)[3:]
    lists = {one["name"]: one["feasibleSpace"]["list"] for one in spec["parameters"]}
    references = {one["name"]: one["reference"] for one in spec["trialTemplate"]["trialParameters"]}
    for number, point in enumerate(itertools.product(*lists.values())):
        values = dict(zip(lists, point, strict=True))
        yield f"katib {number}", [
            re.sub(r"\$\{trialParameters\.(\w+)\}", lambda match, values=values: values[references[match[1]]], arg)
            for arg in args]


RUNS = [pytest.param(overrides, id=origin) for origin, overrides in runs()]


def test_templates_and_pipeline_contain_the_default_overrides() -> None:
    for name in ("dreambooth-train", "dreambooth-sweep"):
        [template] = documents(f"argo/{name}.yaml")
        parameters = {item["name"]: item["value"] for item in template["spec"]["arguments"]["parameters"]}
        assert shlex.split(parameters["overrides"]) == list(workflows.DEFAULT_OVERRIDES)
    spec, _ = documents("kubeflow/pipeline.yaml")
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert shlex.split(parameters["overrides"]["defaultValue"]) == list(workflows.DEFAULT_OVERRIDES)


@pytest.mark.parametrize("overrides", RUNS)
def test_every_override_composes_and_resolves(overrides: list[str]) -> None:
    config, run_dir = compose_run(overrides)
    recipe = resolve(config, run_dir)
    assert recipe.run_dir.parent == Path("/runs")


# The runs of sweep=subject that are planned: the others need the same memory as one of them.
BOTH = [("UNet", ""), ("UNet and text encoder", "")]


@pytest.mark.slow
@pytest.mark.parametrize("name, space, planned", [
    ("g4dn", "subject", BOTH), ("g5", "subject", BOTH), ("cpu", "tiny", [("UNet and text encoder", "")]),
    ("g4dn", "lora", [("UNet", f"lora of rank {rank}") for rank in (4, 16, 64)])])
def test_the_planner_fits_every_run_of_every_machine(
    name: str, space: str, planned: list[tuple[str, str]], tmp_path: Path
) -> None:
    spec = workflows.build_shipped_spec().overlays[name]
    trials = SearchSpace(space, compose.search_space(space)).trials()
    result = run_stage(tmp_path, "validate", "--words", spec.overrides_text, "--space", space, "run_root=/runs")
    assert result.returncode == 0, result.stderr
    assert f"{len(trials)} runs, checked and planned" in result.stdout
    assert len(json.loads((tmp_path / "out/trials").read_text("utf-8"))) == len(trials)
    titles = re.findall(r"^\w+ \d+ px on [^:]*: ([^,]*)(?:,\s+(lora of rank \d+))?", result.stdout, re.M)
    assert sorted(titles) == sorted(planned), result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["trainjob", "trainjob-4gpu", "katib"])
def test_the_planner_fits_every_run_of_kubeflow(origin: str) -> None:
    different = {tuple(override for override in overrides
                       if override.partition("=")[0] not in stage.MEMORY_NEUTRAL_KEYS
                       and "s3://" not in override and "MLFLOW" not in override)
                 for name, overrides in runs() if name.partition(" ")[0] == origin}
    assert len(different) == (2 if origin == "katib" else 1)  # with and without the text encoder
    for overrides in different:
        plan = subprocess.run([PYTHON, "-m", "dreambooth.plan", *overrides, "plan.format=json"], check=False,
                              capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert plan.returncode == 0, plan.stderr
        assert json.loads(plan.stdout)["fits"] is True


# -- a stage -------------------------------------------------------------------------------------------------------

def run_stage(folder: Path, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-m", "dreambooth.stage", name, "--out", str(folder / "out"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_validate_reports_the_problems_of_all_runs_at_once(tmp_path: Path) -> None:
    result = run_stage(tmp_path, "validate", "--words", "hardware=g4dn precision=bf16 dataset=s3", "--space", "subject")
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
     "there is no search space none: type sweep= one of lora, subject, tiny"),
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
        until = time.monotonic() + 120
        while steps(tmp_path) < 2:
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text("utf-8")
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 5, (tmp_path / "log").read_text("utf-8")
    assert "SIGTERM: stopped and saved after step" in (tmp_path / "log").read_text("utf-8")
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "going on after step" in again.stdout


def test_the_exit_report_names_failed_stages_and_advice() -> None:
    failures = json.dumps([{"displayName": "trials(3)", "message": "Error (exit code 6)"}])
    lines = list(exit_report.format_report("Failed", failures))
    assert lines == ["the workflow ended: Failed", "trials(3): Error (exit code 6) (the loss is no longer a number: "
                     "lower train.learning_rate)"]
    assert list(exit_report.format_report("Failed", json.dumps(failures))) == lines  # encoded twice, as by Argo
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
