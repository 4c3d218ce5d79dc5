"""A search space has one definition, and every override in every file composes to a run that fits."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from dreambooth import stage, workflows
from dreambooth.config import compose
from dreambooth.config.compose import SearchSpace
from dreambooth.config.overrides import explain
from dreambooth.config.recipe import resolve
from dreambooth.config.schema import Config
from dreambooth.entrypoint import compose_run
from dreambooth.errors import UserError
from dreambooth.kubernetes import katib
from dreambooth.kubernetes.argo import build_nightly_workflow, build_train_template
from dreambooth.kubernetes.workflow_spec import TRIAL_RUN_DIR
from dreambooth.sweeps import hydra_callbacks
from tests.kubernetes import argo_runner as argo
from tests.kubernetes.workflow_files import SPACES, documents, katib_trials, run_stage
from tests.support.warm_python import PYTHON

# -- one definition of a search space ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SPACES)
def test_hydra_optuna_argo_and_katib_search_the_same_points(name: str) -> None:
    from hydra_plugins.dreambooth_optuna._space import read_space

    space = compose.search_space(name)
    values = space.values
    text = (compose.conf_dir() / f"sweep/{name}.yaml").read_text("utf-8")
    params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    overrides = [f"{key}={value}" for key, value in params.items()]
    [jobs] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    assert [list(trial[1:]) for trial in space.trials()] == jobs
    distributions = read_space(params, [])
    assert {key: [comparable(value) for value in one.choices] for key, one in distributions.items()} == {
        key: [comparable(value) for value in one] for key, one in values.items()}
    experiment = katib.build_experiment(workflows.build_spec(space=name))
    listed = [one["feasibleSpace"]["list"] for one in experiment["spec"]["parameters"]]
    assert listed == [list(one) for one in values.values()]


def comparable(value: object) -> float | str:
    """Return the number that a value stands for, or else its text."""
    text = {"True": "1", "False": "0"}.get(str(value), str(value))
    return float(text) if text[0].isdigit() else text


@pytest.mark.parametrize("text", ["range(1,4)", "interval(1,4)", "3"])
def test_a_search_space_allows_choices_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/mine.yaml").write_text(f"hydra: {{sweeper: {{params: {{train.seed: '{text}'}}}}}}", "utf-8")
    monkeypatch.setattr(compose, "conf_dir", lambda: tmp_path)
    with pytest.raises(UserError, match=r"type choice\(\.\.\.\) there"):
        compose.search_space("mine")
    write_space(tmp_path, "choice(zwx's toy,a toy)")
    with pytest.raises(UserError, match="which Hydra cannot read: type choice"):
        compose.search_space("mine")
    error = OverrideParseException("train.seed=choice('1)", "LexerNoViableAltException")
    assert "the search space contains train.seed: choice('1), which" in str(explain(error, Config))
    assert "the value of train.seed needs" in str(explain(error, Config, ["train.seed=choice('1)"]))
    with pytest.raises(UserError, match="there is no search space yours: type sweep=NAME with one of mine"):
        compose.search_space("yours")


TEXTS = ("zwx's toy", 'a "zwx" toy', "a zwx toy", "zwx's \"toy\", a\\", "an $(HOME) `id` $x", "é's")


def write_space(folder: Path, choices: str) -> None:
    (folder / "sweep").mkdir(exist_ok=True)
    content = {"hydra": {"sweeper": {"params": {"dataset.instance_prompt": choices, "train.seed": "choice(1,2)"}}}}
    (folder / "sweep/mine.yaml").write_text(yaml.safe_dump(content), "utf-8")


def test_every_door_reads_a_searched_text_with_quotes_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage validate, the shell of Katib, and both sweepers of Hydra, from conf/sweep and as typed."""
    from hydra_plugins.dreambooth_optuna._space import read_space

    spec = workflows.build_spec()
    choices = f"choice({','.join(QuotedString(text, Quote.double).with_quotes() for text in TEXTS)})"
    write_space(tmp_path, choices)
    monkeypatch.setattr(compose, "conf_dir", lambda: tmp_path)
    space = compose.search_space("mine")
    runs = [shlex.split(shlex.join(trial)) for trial in space.trials()]
    experiment = katib.build_experiment(replace(spec, space=space))
    runs += katib_trials(yaml.safe_load(yaml.safe_dump(experiment)))
    config = OmegaConf.create({"hydra": {
        "sweeper": {"params": {"dataset.instance_prompt": choices, "train.seed": "choice(1,2)"}},
        "overrides": {"hydra": [], "task": [
            f"dataset.instance_prompt={choices}", "train.seed=1,2", "name=${identity:}"]},
        "runtime": {"choices": {"hydra/launcher": "basic"}}}})
    hydra_callbacks.Jobs().on_multirun_start(config)
    for words in ([f"{key}={value}" for key, value in config.hydra.sweeper.params.items()],
                  OmegaConf.to_container(config.hydra.overrides.task)):
        runs += BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)[0]
        distributions = read_space({}, words)
        runs += [[f"dataset.instance_prompt={value}"] for value in distributions["dataset.instance_prompt"].choices
                 for _ in (1, 2)]
    prompts = [override for run in runs for override in run if override.startswith("dataset.instance_prompt=")
               and override not in workflows.DEFAULT_OVERRIDES]
    values = [str(OverridesParser.create().parse_override(prompt).value()) for prompt in prompts]
    assert values == [text for text in TEXTS for _ in (1, 2)] * 6
    assert [compose.unquote(prompt) for prompt in prompts] == values
    monkeypatch.setattr(hydra_callbacks, "_varied_keys", ["dataset.instance_prompt"])
    assert {hydra_callbacks.trial_name([prompt]) for prompt in prompts} == {f"instance_prompt={x}" for x in TEXTS}
    names = [word for trial in space.trials() for word in stage._run_overrides([], trial) if "run_name" in word]
    assert {compose.unquote(name) for name in names} == {
        f"instance_prompt={text} seed={seed}" for text in TEXTS for seed in (1, 2)}


@pytest.mark.slow
def test_optuna_searches_a_space_and_the_best_is_promoted(empty_db: Path, tmp_path: Path) -> None:
    overrides = ["sweep=tiny", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=0",
                 "train.max_train_steps=1", "train.train_batch_size=1", "prior.num_class_images=2",
                 "prior.num_inference_steps=1", "sample.every=null", "sample.num_inference_steps=1",
                 "evaluate.images_per_prompt=1", "evaluate.class_images=2", "tracking.sweep=mine", "hardware=cpu",
                 f"run_root={tmp_path}"]
    shutil.copy(empty_db, tmp_path / "mlflow.db")
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
    for number, overrides in enumerate(katib_trials(experiment)):
        yield f"katib {number}", overrides


RUNS = [pytest.param(overrides, id=origin) for origin, overrides in runs()]


def test_templates_and_pipeline_contain_the_default_overrides() -> None:
    for name in ("dreambooth-train", "dreambooth-sweep"):
        [template] = documents(f"argo/{name}.yaml")
        parameters = {item["name"]: item["value"] for item in template["spec"]["arguments"]["parameters"]}
        assert shlex.split(parameters["overrides"]) == list(workflows.DEFAULT_OVERRIDES)
    spec, _ = documents("kubeflow/pipeline.yaml")
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert shlex.split(parameters["overrides"]["defaultValue"]) == list(workflows.DEFAULT_OVERRIDES)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", RUNS)
def test_every_override_composes_and_resolves(overrides: list[str]) -> None:
    config, run_dir = compose_run(overrides)
    recipe = resolve(config, run_dir)
    assert recipe.run_dir.parent == Path("/runs")


# The runs of sweep=subject that are planned: the others need the same memory as one of them.
BOTH = [("denoiser", ""), ("denoiser and text encoder", "")]


@pytest.mark.slow
@pytest.mark.parametrize("name, space, planned", [
    ("g4dn", "subject", BOTH), ("g5", "subject", BOTH), ("cpu", "tiny", [("denoiser and text encoder", "")]),
    ("g4dn", "lora", [("denoiser", f"lora of rank {rank}") for rank in (4, 16, 64)])])
def test_the_planner_fits_every_run_of_every_machine(
    name: str, space: str, planned: list[tuple[str, str]], tmp_path: Path
) -> None:
    spec = workflows.build_shipped_spec().overlays[name]
    trials = compose.search_space(space).trials()
    result = run_stage(tmp_path, "validate", "--words", spec.overrides_text, "--space", space, "run_root=/runs")
    assert result.returncode == 0, result.stderr
    assert f"{len(trials)} runs, checked and planned" in result.stdout
    assert len(json.loads((tmp_path / "out/trials").read_text("utf-8"))) == len(trials)
    titles = re.findall(r"^\w+ \d+ px on [^:]*: ([^,]*)(?:,\s+(lora of rank \d+))?", result.stdout, re.M)
    assert sorted(titles) == sorted(planned), result.stdout


def memory_overrides(origin: str) -> set[frozenset[str]]:
    """The overrides of each run that decide how much memory it needs."""
    neutral = stage.MEMORY_NEUTRAL_KEYS | {"run_root", "sweep"}
    return {frozenset(override for override in overrides if override.partition("=")[0] not in neutral
                      and not override.startswith(("tracking", "hydra.")) and "s3://" not in override)
            for name, overrides in runs() if name.partition(" ")[0] == origin}


def test_runs_of_kubeflow_need_the_memory_of_those_of_argo() -> None:
    """Which the planner fits: see the tests beside this one."""
    argo_runs = memory_overrides("g4dn")
    assert memory_overrides("trainjob") == memory_overrides("trainjob-4gpu") < argo_runs
    assert memory_overrides("katib") < argo_runs
    assert len(memory_overrides("katib")) == 2  # with and without the text encoder


@pytest.mark.slow
def test_the_planner_fits_the_run_of_a_trainjob() -> None:
    [overrides] = [overrides for name, overrides in runs() if name == "trainjob"]
    plan = subprocess.run([PYTHON, "-m", "dreambooth.plan", *(word for word in overrides if "MLFLOW" not in word),
                           "plan.format=json"], check=False, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["fits"] is True
