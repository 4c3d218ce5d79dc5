"""workflows/ is what conf/ says, is what each controller reads, and every override in it is a run."""

import copy
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
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
from dreambooth.entrypoint import composed
from dreambooth.errors import UserError
from dreambooth.kubernetes import exit_report, katib, kfp_components, kfp_pipeline, submit, trainjob
from dreambooth.kubernetes.argo import nightly, sweep, train
from dreambooth.kubernetes.render import rendered
from dreambooth.kubernetes.workflow_spec import TRIAL, Space
from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
from tests.support import argo_runner as argo
from tests.support import workflow_schemas as schemas
from tests.support.sagemaker_job import steps

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
KUBERNETES = "1.34"  # whose own objects are checked


def documents(name: str) -> list[Json]:
    return list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))


OBJECTS = [pytest.param(one, id=f"{name}: {one['kind']}") for name in FILES for one in documents(name)
           if one.get("kind") not in (None, "Kustomization")]
TEMPLATES = [param for param in OBJECTS if param.values[0]["kind"] == "WorkflowTemplate"]


# -- rendered is committed -----------------------------------------------------------------------------------------

def test_the_committed_files_are_what_conf_says() -> None:
    texts = rendered(workflows.shipped())
    assert workflows.differing(texts, FOLDER) == []
    assert len(texts) > 10


def test_check_names_the_file_that_was_changed(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FOLDER, tmp_path / "w")
    changed = tmp_path / "w/base/volume.yaml"
    changed.write_text(changed.read_text("utf-8").replace("200Gi", "20Gi"), "utf-8")
    monkeypatch.setattr("sys.argv", ["workflows", "check", "--to", str(tmp_path / "w")])
    monkeypatch.setattr("dreambooth.cli._codes", [])
    with pytest.raises(SystemExit) as end:
        workflows.main()
    assert end.value.code == 1
    assert capfd.readouterr().err == ("dreambooth: not what conf/ says: base/volume.yaml: "
                                      "type python -m dreambooth.workflows render\n")


@pytest.mark.parametrize("words, said", [
    (["hardware=nope"], "Could not find 'hardware/nope'"),
    (["hardware=g4dn", "precision=bf16"], "type precision=fp16"),
    (["--space", "none", "hardware=cpu"], "there is no search space none"),
    (["hardware=cpu", "train.learning_rate=-1"], "train.learning_rate must be above 0"),
    (["--space", "tiny"], "--space and --image go with overrides: type them after render, such as hardware=cpu"),
    (["--image", "mine:1"], "--space and --image go with overrides: type them after render, such as hardware=cpu"),
])
def test_render_says_what_is_wrong_and_writes_nothing(tmp_path: Path, words: list[str], said: str) -> None:
    told = subprocess.run([sys.executable, "-m", "dreambooth.workflows", "render", "--to", str(tmp_path / "w"), *words],
                          capture_output=True, text=True, check=False)
    assert (told.returncode, "Traceback" in told.stderr) == (1, False), told.stderr
    assert said in told.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("words", [[], ["hardware=g5", "dataset=s3", "dataset.instance_dir=s3://BUCKET/photos",
                                        "dataset.instance_prompt=a zwx dog", "dataset.class_prompt=a dog"]])
@pytest.mark.parametrize("what", submit.KINDS)
def test_a_placeholder_is_not_submitted(
    what: str, words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(submit, "submit", lambda *given: sent.append(given))
    monkeypatch.setattr("sys.argv", ["workflows", "submit", "--what", what, *words])
    monkeypatch.setattr("dreambooth.cli._codes", [])
    with pytest.raises(SystemExit) as end:
        workflows.main()
    assert (end.value.code, sent) == (1, [])
    assert capfd.readouterr().err == ("dreambooth: dataset.instance_dir=s3://BUCKET/photos is a placeholder: type the "
                                      "overrides of your run after submit\n")


def test_render_writes_files_of_your_own_overrides(tmp_path: Path) -> None:
    texts = rendered(workflows.asked(["hardware=cpu", "train.max_train_steps=5"], "tiny", "mine:1"))
    assert "kubeflow/trainjob-4gpu.yaml" not in texts  # no machine with several cards is known for it
    assert all("mine:1" in texts[f"kubeflow/{name}.yaml"] for name in ("trainjob", "katib-experiment", "pipeline"))
    [template] = yaml.safe_load_all(texts["argo/dreambooth-sweep.yaml"])
    assert list(argo.problems(template)) == []
    assert "max-train-steps" not in texts["kubeflow/katib-experiment.yaml"]  # fixed by what was typed
    with pytest.raises(UserError, match="no machine with several cards is known for hardware=cpu"):
        trainjob.multi(workflows.asked(["hardware=cpu"], "tiny"))


@pytest.mark.parametrize("name", ["g4dn", "g5", "cpu"])
def test_an_overlay_is_the_base_rendered_for_that_machine(name: str) -> None:
    overlay = yaml.safe_load((FOLDER / f"overlays/{name}/kustomization.yaml").read_text("utf-8"))
    patches = {one["target"]["name"]: yaml.safe_load(one["patch"]) for one in overlay.get("patches", ())}
    wanted = sweep(workflows.shipped().machines[name])
    [base] = documents("argo/dreambooth-sweep.yaml")
    assert jsonpatch.JsonPatch(patches.get("dreambooth-sweep", [])).apply(base) == wanted


# -- what a controller reads ---------------------------------------------------------------------------------------

def unread(one: Json) -> list[str]:
    """What the models of hera and Kubeflow, or the schemas of Kubernetes, do not know or would change."""
    kind = one["kind"]
    if kind not in ROUND_TRIP:
        try:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
        except Exception as error:
            return [str(error).splitlines()[0]]
        return []
    try:
        found = list(differences(one, ROUND_TRIP[kind](one), kind))
    except ValueError as error:
        return [str(error)]
    if kind == "Experiment":
        job = copy.deepcopy(one["spec"]["trialTemplate"]["trialSpec"])
        found += unread(job | {"metadata": {"name": "trial"}})
    return found


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
def test_models_give_back_every_object_as_it_is(one: Json) -> None:
    assert unread(one) == []


@pytest.mark.skipif(schemas.FOLDER is None, reason="WORKFLOW_SCHEMAS names no folder")
@pytest.mark.parametrize("one", OBJECTS)
def test_strict_schemas_take_every_object(one: Json) -> None:
    found = schemas.schemas(one["kind"])
    assert found or one["kind"] not in ROUND_TRIP
    for version, schema in found:
        errors = [f"{version} {error.json_path}: {error.message[:200]}"
                  for error in jsonschema.Draft202012Validator(schema).iter_errors(one)]
        assert errors == []


def places(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every object inside an object that has keys of a schema, not names of its own."""
    if isinstance(part, dict) and path and path[-1] in ("nodeSelector", "labels", "requests", "limits", "metadata"):
        return
    if isinstance(part, dict):
        yield path
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@pytest.mark.parametrize("one", OBJECTS)
def test_a_misspelt_key_anywhere_is_seen(one: Json) -> None:
    """Without help of schemas too: models of hera and Kubeflow let it through, their round trip does not."""
    missed = []
    for path in places(one):
        broken = copy.deepcopy(one)
        place = broken
        for key in path:
            place = place[key]
        place["misspelt"] = "x"
        seen = bool(unread(broken))
        if schemas.FOLDER and not seen:
            seen = any(not jsonschema.Draft202012Validator(schema).is_valid(broken)
                       for _, schema in schemas.schemas(one["kind"]))
        missed += [] if seen else [path]
    assert missed == []


# -- Argo's own rules ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("template", TEMPLATES)
def test_argo_finds_every_template_parameter_and_order(template: Json) -> None:
    assert list(argo.problems(template)) == []


def changed(template: Json, path: str, value: Any) -> Json:
    """`1.dag.tasks.0.depends` below the templates; None removes."""
    made = copy.deepcopy(template)
    place: Any = made["spec"]["templates"]
    *way, last = [int(word) if word.isdecimal() else word for word in path.split("|")]
    for key in way:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return made


@pytest.mark.parametrize("path, value, said", [
    ("0|dag|tasks|1|template", "class-image", "calls class-image, which is no template"),
    ("0|dag|tasks|1|depends", "validat.Succeeded", "waits for validat, which is no task"),
    ("0|dag|tasks|0|depends", "promote.Succeeded", "tasks wait for each other in a circle"),
    ("0|dag|tasks|2|withParam", "{{tasks.validate.outputs.parameters.trial}}", "validate has no output trial"),
    ("0|dag|tasks|1|depends", None, "does not wait for validate"),
    ("0|dag|tasks|2|arguments", None, "does not give trial"),
    ("0|dag|tasks|3|arguments", {"parameters": [{"name": "x", "value": "y"}]}, "gives x, which promote does not take"),
    ("2|container|args|4", "{{workflow.parameters.override}}", "{{workflow.parameters.override}} is declared nowhere"),
    ("2|container|args|4", "{{item}}", "{{item}} is declared nowhere"),
    ("1|dag|tasks|1|arguments|parameters|0|value", "{{tasks.train.outputs.parameters.ran}}", "train has no output ran"),
    ("1|dag|tasks|0|template", "trial", "templates call each other in a circle"),
])
def test_the_rules_see_what_argo_would_refuse(path: str, value: Any, said: str) -> None:
    [template] = documents("argo/dreambooth-sweep.yaml")
    assert said in "\n".join(argo.problems(changed(template, path, value)))


@pytest.mark.parametrize("render", [train, sweep])
@pytest.mark.parametrize("code, status, repeats", [
    (0, "Failed", False), (1, "Failed", False), (3, "Failed", False), (4, "Failed", False), (6, "Failed", False),
    (5, "Failed", True), (143, "Failed", True), (-1, "Error", True)])
def test_only_what_was_interrupted_or_lost_is_repeated(render: Any, code: int, status: str, repeats: bool) -> None:
    templates = render(workflows.asked())["spec"]["templates"]
    parts = [part for part in templates if "container" in part and part["name"] != "ended"]
    assert {argo.again(part, code, 0, status) for part in parts} == {repeats}
    assert not any(argo.again(part, 5, 5) for part in parts)


@pytest.mark.parametrize("render", [train, sweep])
def test_a_run_that_is_preempted_after_days_is_repeated(render: Any) -> None:
    days = 3 * 24 * 3600.0
    parts = [part for part in render(workflows.asked())["spec"]["templates"] if "retryStrategy" in part]
    assert {argo.again(part, 5, 0, after=days) for part in parts} == {True}
    strategy = {"limit": "5", "expression": 'lastRetry.status == "Failed"', "backoff": {"maxDuration": "2h"}}
    assert not argo.again({"retryStrategy": strategy}, 5, 0, after=days)
    assert argo.again({"retryStrategy": strategy}, 5, 0, after=7000)
    tasks = kfp_pipeline.pipeline(workflows.asked())[0]["components"]["comp-trials"]["dag"]["tasks"]
    assert float(tasks["train"]["retryPolicy"]["backoffMaxDuration"].removesuffix("s")) > days


def test_katib_repeats_lost_pods_and_not_what_would_end_the_same() -> None:
    [experiment] = documents("kubeflow/katib-experiment.yaml")
    ignored, hopeless = experiment["spec"]["trialTemplate"]["trialSpec"]["spec"]["podFailurePolicy"]["rules"]
    assert (ignored["action"], ignored["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert hopeless["onExitCodes"]["values"] == [1, 3, 4, 6]


@pytest.mark.parametrize("name", SPACES)
def test_katib_tries_each_point_once(name: str) -> None:
    """A point that is proposed twice is one run, which the second trial would find locked."""
    spec = katib.experiment(workflows.asked(space=name))["spec"]
    points = [one["feasibleSpace"]["list"] for one in spec["parameters"]]
    assert spec["algorithm"] == {"algorithmName": "grid"}
    assert spec["maxTrialCount"] == math.prod(map(len, points)), "more are refused, fewer leave some out"
    assert all(len(set(one)) == len(one) for one in points)


def test_a_trials_words_survive_katibs_own_shell(tmp_path: Path) -> None:
    """Its webhook joins command and args by spaces, after `sh -c` where a command does not begin so, and redirects."""
    experiment = katib.experiment(workflows.asked())
    [container] = experiment["spec"]["trialTemplate"]["trialSpec"]["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    shell, words = (words[:2], words[2:]) if words[:2] == ["sh", "-c"] else (["sh", "-c"], words)
    (tmp_path / "python").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n', "utf-8")
    (tmp_path / "python").chmod(0o755)
    script = " ".join([*words, f"1>{tmp_path}/metrics.log 2>&1", "&&", "echo completed"])
    ran = subprocess.run([*shell, script], capture_output=True, text=True, check=False,
                         env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (ran.returncode, ran.stdout) == (0, "completed\n"), ran.stderr
    seen = (tmp_path / "metrics.log").read_text("utf-8").splitlines()
    assert seen[:2] == ["-m", "dreambooth.train"]
    assert {"dataset.instance_prompt=a photo of a zwx dog", TRIAL,
            "train.learning_rate=${trialParameters.learning_rate}"} <= set(seen)


def given(part: Any) -> set[tuple[str, str]]:
    """(ConfigMap or Secret, variable) of everything in a part that takes one by name; "*" stands for all of it."""
    if isinstance(part, list):
        return set().union(*map(given, part))
    if not isinstance(part, dict):
        return set()
    found = {(part[kind]["name"], "*") for kind in ("configMapRef", "secretRef") if kind in part}
    found |= {(source["name"], part["name"]) for source in part.get("valueFrom", {}).values()
              if isinstance(source, dict) and source.get("optional")}
    for kind, name in (("secretAsEnv", "secretName"), ("configMapAsEnv", "configMapName")):
        found |= {(one[name], key["envVar"]) for one in part.get(kind, ()) for key in one["keyToEnv"]
                  if one["optional"] and key.get("secretKey", key.get("configMapKey")) == key["envVar"]}
    return found.union(*map(given, part.values()))


@pytest.mark.parametrize("name", ["argo/dreambooth-train", "argo/dreambooth-sweep", "kubeflow/trainjob",
                                  "kubeflow/trainjob-4gpu", "kubeflow/katib-experiment", "kubeflow/pipeline"])
def test_every_controller_hands_over_the_same_settings_and_credentials(name: str) -> None:
    text, parts = (FOLDER / f"{name}.yaml").read_text("utf-8"), given(documents(f"{name}.yaml"))
    wanted = {("dreambooth", key) for key in ("MLFLOW_TRACKING_URI", "AWS_DEFAULT_REGION")} | {
        ("dreambooth-secrets", key) for key in (
            "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN")}
    assert parts in (wanted, {("dreambooth", "*"), ("dreambooth-secrets", "*")})
    # Pipelines' pods have an account of its own: a pipeline cannot choose one.
    assert ("serviceAccountName: dreambooth" in text) == (name != "kubeflow/pipeline")


# -- one definition of a search space ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SPACES)
def test_hydra_optuna_argo_and_katib_search_the_same_points(name: str) -> None:
    values = compose.search_space(name)
    space = Space(name, values)
    text = (compose.conf_dir() / f"sweep/{name}.yaml").read_text("utf-8")
    params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    typed = [f"{key}={value}" for key, value in params.items()]
    [jobs] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(typed), None)
    assert [list(trial[1:]) for trial in space.trials()] == jobs
    distributions, fixed = create_params_from_overrides(typed)
    assert fixed == {}
    assert {key: [float(value) for value in one.choices] for key, one in distributions.items()} == {
        key: [float({"True": "1", "False": "0"}.get(value, value)) for value in one] for key, one in values.items()}
    experiment = katib.experiment(workflows.asked(space=name))
    listed = [one["feasibleSpace"]["list"] for one in experiment["spec"]["parameters"]]
    assert listed == [list(one) for one in values.values()]


@pytest.mark.parametrize("text", ["range(1,4)", "interval(1,4)", "3"])
def test_a_search_space_is_choices_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/mine.yaml").write_text(f"hydra: {{sweeper: {{params: {{train.seed: '{text}'}}}}}}", "utf-8")
    monkeypatch.setattr(compose, "conf_dir", lambda: tmp_path)
    with pytest.raises(UserError, match=r"type choice\(\.\.\.\) there"):
        compose.search_space("mine")
    with pytest.raises(UserError, match="there is no search space yours: type sweep= one of mine"):
        compose.search_space("yours")


@pytest.mark.slow
def test_optuna_searches_a_space_and_the_best_is_promoted(tmp_path: Path) -> None:
    words = ["sweep=tiny", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=0",
             "train.max_train_steps=1", "train.train_batch_size=1", "prior.num_class_images=2",
             "prior.num_inference_steps=1", "sample.every=null", "sample.num_inference_steps=1",
             "evaluate.images_per_prompt=1", "evaluate.class_images=2", "tracking.sweep=mine", "hardware=cpu",
             f"run_root={tmp_path}"]
    ran = subprocess.run([sys.executable, "-m", "dreambooth.train", "-m", *words], capture_output=True, text=True,
                         check=False, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text("utf-8"))
    assert set(best["best_params"]) == {"train.learning_rate", "prior.prior_loss_weight", "train.train_text_encoder"}
    told = subprocess.run([sys.executable, "-m", "dreambooth.promote", "sweep=mine", f"run_root={tmp_path}"],
                          capture_output=True, text=True, check=False, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    promoted = json.loads((tmp_path / "promoted.json").read_text("utf-8"))
    assert promoted["objective"] == pytest.approx(best["best_value"])


def test_a_key_that_is_typed_is_fixed_as_under_hydras_sweepers() -> None:
    space = Space("mine", {"train.seed": ("1", "2"), "train.learning_rate": ("1e-06", "2e-06")})
    assert space.without(["train.seed=5", "hardware=cpu"]).trials() == [
        ("sweep=mine", "train.learning_rate=1e-06"), ("sweep=mine", "train.learning_rate=2e-06")]


def test_a_trial_is_the_run_that_hydras_sweeper_would_make(tmp_path: Path) -> None:
    words = [f"run_root={tmp_path}", "hardware=cpu", "train.max_train_steps=3"]
    with initialize_config_dir(str(compose.conf_dir()), version_base="1.3"):
        hydra = hydra_compose("config", words, return_hydra_config=True).hydra
    _, alone = composed(words)
    _, trial = composed([*words, TRIAL])
    _, longer = composed([*words[:2], "train.max_train_steps=4", TRIAL])
    assert trial == Path(hydra.sweep.dir) / hydra.sweep.subdir
    assert len({alone, trial, longer}) == 3


def test_every_night_is_a_run_of_its_own_and_what_is_repeated_goes_on() -> None:
    """Photos in S3 that have changed are refused in the folder of an earlier run."""
    spec, template = nightly(workflows.asked())["spec"]["workflowSpec"], train(workflows.asked())
    assert spec["workflowTemplateRef"] == {"name": template["metadata"]["name"]}
    asked = argo.parameters(spec, "arguments")
    assert asked.keys() <= argo.parameters(template["spec"], "arguments").keys()
    words = shlex.split(asked["overrides"]["value"])
    assert words[:-1] == list(workflows.DEFAULT)
    folders = {composed([*words, "run_root=/runs", f"tracking.sweep={name}"])[1] for name in ("mon", "tue", "mon")}
    assert {path.name for path in folders} == {"s3-sd15-full-mon", "s3-sd15-full-tue"}
    stages = argo.named(template["spec"]["templates"])
    assert "tracking.sweep={{workflow.name}}" in stages["train"]["container"]["args"]  # the same for a repeated stage
    assert asked["promote"]["value"] == "replace=true"
    assert "{{workflow.parameters.promote}}" in stages["promote"]["container"]["args"]


# -- every override in every file ----------------------------------------------------------------------------------

def runs() -> Iterator[tuple[str, list[str]]]:
    """Where, and the words of every run that a file would start."""
    for name, one in workflows.shipped().machines.items():  # g4dn is the base
        for number, trial in enumerate([(), *one.space.trials()]):
            yield f"{name} {number}", [*one.overrides, "run_root=/runs", *trial]
    for name in ("trainjob", "trainjob-4gpu"):
        [job] = documents(f"kubeflow/{name}.yaml")
        yield name, [word for word in job["spec"]["trainer"]["args"] if word not in ("-m", "dreambooth.train")]
    [experiment] = documents("kubeflow/katib-experiment.yaml")
    spec = experiment["spec"]
    [script] = spec["trialTemplate"]["trialSpec"]["spec"]["template"]["spec"]["containers"][0]["args"]
    args = shlex.split(script)[3:]
    lists = {one["name"]: one["feasibleSpace"]["list"] for one in spec["parameters"]}
    references = {one["name"]: one["reference"] for one in spec["trialTemplate"]["trialParameters"]}
    for number, chosen in enumerate(itertools.product(*lists.values())):
        known = dict(zip(lists, chosen, strict=True))
        yield f"katib {number}", [re.sub(r"\$\{trialParameters\.(\w+)\}",
                                         lambda match, known=known: known[references[match[1]]], word) for word in args]


RUNS = [pytest.param(words, id=where) for where, words in runs()]


def test_files_and_templates_carry_the_words_that_are_checked_here() -> None:
    for name, one in {"dreambooth-train": "train", "dreambooth-sweep": "sweep"}.items():
        [template] = documents(f"argo/{name}.yaml")
        given = {item["name"]: item["value"] for item in template["spec"]["arguments"]["parameters"]}
        assert (one, shlex.split(given["overrides"])) == (one, list(workflows.DEFAULT))
    spec, _ = documents("kubeflow/pipeline.yaml")
    given = spec["root"]["inputDefinitions"]["parameters"]
    assert shlex.split(given["overrides"]["defaultValue"]) == list(workflows.DEFAULT)


@pytest.mark.parametrize("words", RUNS)
def test_every_override_composes_and_resolves(words: list[str]) -> None:
    found, run_dir = composed(words)
    recipe = resolve(found, run_dir)
    assert recipe.run_dir.parent == Path("/runs")


BOTH = [("UNet", ""), ("UNet and text encoder", "")]  # what is planned of sweep=subject: the rest needs the same memory


@pytest.mark.slow
@pytest.mark.parametrize("name, space, planned", [
    ("g4dn", "subject", BOTH), ("g5", "subject", BOTH), ("cpu", "tiny", [("UNet and text encoder", "")]),
    ("g4dn", "lora", [("UNet", f"lora of rank {rank}") for rank in (4, 16, 64)])])
def test_every_run_of_every_machine_fits_by_the_planner(
    name: str, space: str, planned: list[tuple[str, str]], tmp_path: Path
) -> None:
    one = workflows.shipped().machines[name]
    trials = Space(space, compose.search_space(space)).trials()
    told = run_stage(tmp_path, "validate", "--words", one.typed, "--space", space, "run_root=/runs")
    assert told.returncode == 0, told.stderr
    assert f"{len(trials)} runs, checked and planned" in told.stdout
    assert len(json.loads((tmp_path / "out/trials").read_text("utf-8"))) == len(trials)
    titles = re.findall(r"^\w+ \d+ px on [^:]*: ([^,]*)(?:,\s+(lora of rank \d+))?", told.stdout, re.M)
    assert sorted(titles) == sorted(planned), told.stdout


@pytest.mark.slow
@pytest.mark.parametrize("where", ["trainjob", "trainjob-4gpu", "katib"])
def test_every_run_of_kubeflow_fits_by_the_planner(where: str) -> None:
    different = {tuple(word for word in words if word.partition("=")[0] not in stage.SAME_MEMORY
                       and "s3://" not in word and "MLFLOW" not in word)
                 for name, words in runs() if name.partition(" ")[0] == where}
    assert len(different) == (2 if where == "katib" else 1)  # with and without the text encoder
    for words in different:
        told = subprocess.run([sys.executable, "-m", "dreambooth.plan", *words, "plan.format=json"], check=False,
                              capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert told.returncode == 0, told.stderr
        assert json.loads(told.stdout)["fits"] is True


# -- a stage -------------------------------------------------------------------------------------------------------

def run_stage(folder: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dreambooth.stage", name, "--out", str(folder / "out"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_validate_says_all_that_is_wrong_before_anything_is_paid_for(tmp_path: Path) -> None:
    told = run_stage(tmp_path, "validate", "--words", "hardware=g4dn precision=bf16 dataset=s3", "--space", "subject")
    assert told.returncode == 1
    assert "the photos are missing" in told.stderr
    assert "precision=bf16 needs a GPU of compute capability 8.0" in told.stderr
    assert not (tmp_path / "out/trials").exists()


def test_validate_plans_what_the_search_space_chooses_and_each_size_once(tmp_path: Path) -> None:
    planned: list[list[str]] = []

    class Supervisor:
        def run(self, command: list[str], environment: dict[str, str]) -> stage.End:
            planned.append(command[3:])
            return stage.End()

    for space, count, told in (("lora", 3, "method.rank"), ("subject", 2, "train.train_text_encoder")):
        planned.clear()
        stage._validate(list(workflows.DEFAULT), space, tmp_path, Supervisor())  # type: ignore[arg-type]
        assert all(f"sweep={space}" in words for words in planned), "another method would be planned"
        assert len(planned) == count == len({word for words in planned for word in words if word.startswith(told)})


@pytest.mark.parametrize("words, said", [
    (["--words", "name='a"], "these overrides cannot be read"),
    (["--words", "hardware=cpu", "--space", "none"],
     "there is no search space none: type sweep= one of lora, subject, tiny"),
    (["sample"], "sample is neither an option nor KEY=VALUE"),
])
def test_a_stage_says_what_is_wrong_with_its_words(tmp_path: Path, words: list[str], said: str) -> None:
    told = run_stage(tmp_path, "validate", *words)
    assert (told.returncode in (1, 2), "Traceback" in told.stderr) == (True, False)
    assert said in told.stderr


def test_a_stage_ends_with_the_code_of_its_door(tmp_path: Path) -> None:
    told = run_stage(tmp_path, "evaluate", "run=nowhere")
    assert (told.returncode, "there is no run in nowhere" in told.stderr) == (1, True)


def test_typed_words_beat_what_a_workflow_adds() -> None:
    words = stage._words(["tracking.uri=http://mine"], ["sweep=tiny", "train.learning_rate=1e-4",
                                                        "prior.prior_loss_weight=0.5"])
    found, _ = composed(words)
    assert (found.tracking.uri, found.tracking.run_name) == (
        "http://mine", "learning_rate=1e-4 prior_loss_weight=0.5")


@pytest.mark.slow
def test_a_stage_trains_what_class_images_prepared_and_hands_over_results(tmp_path: Path) -> None:
    text = ("hardware=cpu prior.num_class_images=2 prior.num_inference_steps=1 train.train_batch_size=1 tracking=none "
            "evaluate.encoder=none sample.every=null train.max_train_steps=1")
    root = f"run_root={tmp_path / 'runs'}"
    made = run_stage(tmp_path, "class-images", "--words", text, root)
    assert made.returncode == 0, made.stderr
    assert "2 class images: 0 kept, 2 to make" in made.stdout
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["class_images"]
    again = run_stage(tmp_path, "class-images", "--words", text, root)
    assert "2 class images: 2 kept, 0 to make in" in again.stdout
    told = run_stage(tmp_path, "train", "--words", text, "--trial", "train.seed=3", root, "tracking.sweep=mine")
    assert told.returncode == 0, told.stderr
    assert "2 class images: 2 kept, 0 to make" in told.stdout
    run = Path((tmp_path / "out/run").read_text("utf-8"))
    result = json.loads((run / "result.json").read_text("utf-8"))
    assert float((tmp_path / "out/objective").read_text("utf-8")) == result["objective"]
    [(name, value)] = re.findall(katib.OBJECTIVE, told.stdout)  # as Katib's collector reads a trial's log
    assert (name, float(value)) == ("objective", pytest.approx(result["objective"], rel=1e-5))
    failed = run_stage(tmp_path, "train", "--words", text, "--trial", "train.seed=-1", root)
    assert (failed.returncode, "train.seed must be from 0" in failed.stderr) == (1, True)


@pytest.mark.slow
def test_a_preempted_stage_saves_ends_with_5_and_goes_on(tmp_path: Path) -> None:
    """As when a node is taken away: SIGTERM to the stage, which passes it on."""
    root = tmp_path / "checkpoints"  # where `steps` looks
    command = [sys.executable, "-m", "dreambooth.stage", "train", "--out", str(tmp_path / "out"), f"run_root={root}",
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


def test_the_end_says_what_failed_and_what_to_do() -> None:
    failures = json.dumps([{"displayName": "trials(3)", "message": "Error (exit code 6)"}])
    lines = list(exit_report.told("Failed", failures))
    assert lines == ["the workflow ended: Failed", "trials(3): Error (exit code 6) (the loss is no longer a number: "
                     "a lower train.learning_rate)"]
    assert list(exit_report.told("Failed", json.dumps(failures))) == lines  # quoted once more, as Argo has it
    assert list(exit_report.told("Succeeded", "null")) == ["the workflow ended: Succeeded"]
    assert list(exit_report.told("Succeeded", "{{workflow.failures}}")) == ["the workflow ended: Succeeded"]


def test_a_stage_hands_over_to_kubeflow_pipelines(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "objective").write_text("0.25", "utf-8")
    (out / "result.json").write_text('{"objective": 0.25, "scores": {"dino": 0.5}}', "utf-8")
    told = {"outputs": {
        "parameters": {"objective": {"outputFile": f"{tmp_path}/p/objective"}, "run": {"outputFile": "unused"}},
        "artifacts": {"metrics": {"artifacts": [{"name": "metrics", "uri": f"{tmp_path}/metrics"}]}},
        "outputFile": f"{tmp_path}/said.json"}}
    kfp_components.hand_over(json.dumps(told), out)
    assert (tmp_path / "p/objective").read_text("utf-8") == "0.25"
    said = json.loads((tmp_path / "said.json").read_text("utf-8"))
    assert said["artifacts"]["metrics"]["artifacts"][0]["metadata"] == {"objective": 0.25, "dino": 0.5}
    assert kfp_components.local("s3://bucket/a/b") == Path("/s3/bucket/a/b")
