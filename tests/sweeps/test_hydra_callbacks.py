"""What a sweep on this machine prints and writes at its end."""

import csv
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dreambooth import cli, train
from dreambooth.config.compose import conf_dir
from dreambooth.config.enums import TrackingKind
from dreambooth.errors import DreamBoothError, UserError
from dreambooth.sweeps import hydra_callbacks
from tests.support.faults import call
from tests.support.warm_python import PYTHON
from tests.sweeps.test_promotion import trial


def test_a_sweep_says_why_a_run_failed_and_what_to_type_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run finished, one failed before it had a journal, one after it had one."""
    monkeypatch.setattr(cli, "_exit_codes", [])
    monkeypatch.setattr(hydra_callbacks, "failure_reasons", reasons := {})
    monkeypatch.setattr(train, "failure_reasons", reasons)
    root = tmp_path / "my runs"
    sweep = hydra_callbacks.Sweep()
    for name, objective in (("a", 0.1), ("b", None), ("c", None)):
        folder = trial(root, name, 0.1, done=objective is not None) if name != "b" else root / name
        if objective is None:
            def job(*_: object, name: str = name) -> float:
                raise UserError(f"{name} is wrong: type train.seed=1")

            monkeypatch.setattr(train, "_job", job)
            state = SimpleNamespace(mode=RunMode.MULTIRUN, runtime=SimpleNamespace(output_dir=str(folder)),
                                    overrides=SimpleNamespace(task=[]))
            monkeypatch.setattr(train, "HydraConfig", SimpleNamespace(get=lambda state=state: state))
            objective = train.train.__wrapped__(OmegaConf.create(
                {"tracking": {"sweep": None, "run_name": None}, "checkpoint": {"resume": "auto"}}))
        sweep.on_job_end(OmegaConf.create(), SimpleNamespace(
            _return_value=objective, overrides=[f"train.seed={name}"],
            hydra_cfg=OmegaConf.create({"hydra": {"runtime": {"output_dir": str(folder)}}})))
    sweep.on_multirun_end(OmegaConf.create({
        "run_root": str(root), "tracking": {"sweep": "s", "kind": TrackingKind.none, "uri": None, "experiment": "x"},
        "hydra": {"runtime": {"choices": {"hydra/launcher": "basic"}}}}))
    [table] = root.glob("results-*.csv")
    rows = {row["job"]: row["reason"] for row in csv.DictReader(table.open(encoding="utf-8"))}
    assert rows == {"a": "", "c": "c is wrong: type train.seed=1", "#2": "b is wrong: type train.seed=1"}
    last = capfd.readouterr().out.splitlines()[-2:]
    assert last == [f'python -m dreambooth.{name} sweep=s run_root="{root}"' for name in ("compare", "promote")]


def sweep_config(launcher: str = "basic", sweeper: str = "optuna", *overrides: str) -> DictConfig:
    return OmegaConf.create({"hydra": {
        "runtime": {"choices": {"hydra/launcher": launcher}}, "overrides": {"hydra": list(overrides), "task": []},
        "sweeper": {"_target_": f"hydra_plugins.{sweeper}.Sweeper", "max_failure_rate": 0.0}}})


def test_a_launcher_whose_results_are_lost_is_refused_by_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The jobs of joblib and submitit run in other processes: all commands ended with 0, without a word."""
    for path in conf_dir().glob("*.yaml"):
        callbacks = yaml.safe_load(path.read_text("utf-8"))["hydra"]["callbacks"]
        assert callbacks["jobs"] == {"_target_": "dreambooth.sweeps.hydra_callbacks.Jobs"}, path
    for launcher in ("basic", "sagemaker", "sagemaker_schema", "slurm"):
        hydra_callbacks.Jobs().on_multirun_start(sweep_config(launcher))
    with pytest.raises(SystemExit, match="1"):
        hydra_callbacks.Jobs().on_multirun_start(sweep_config("submitit_local"))
    assert capsys.readouterr().err == (
        "dreambooth: hydra/launcher=submitit_local runs the jobs of a sweep in other processes, whose results would be "
        "lost: type hydra/launcher=basic\n")


def test_the_name_of_a_sweep_is_refused_before_its_first_job(capsys: pytest.CaptureFixture[str]) -> None:
    config = sweep_config()
    config.tracking = {"sweep": "pets/rex"}
    with pytest.raises(SystemExit, match="1"):
        hydra_callbacks.Jobs().on_multirun_start(config)
    assert capsys.readouterr().err.endswith(": type tracking.sweep=pets-rex\n")


def test_a_sweep_that_its_sweeper_ends_has_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[DictConfig] = []
    monkeypatch.setattr(hydra_callbacks.Sweep, "on_multirun_end", lambda sweep, config: written.append(config))
    monkeypatch.setattr(hydra_callbacks, "_running", [])
    config = sweep_config()

    def command() -> None:
        hydra_callbacks.Sweep().on_multirun_start(config)
        raise ValueError("an error")

    with pytest.raises(ValueError, match="an error"):
        hydra_callbacks.call_command(command)
    assert written == [config]


def test_a_failed_remote_job_ends_the_command_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydra_callbacks, "job_failures", [DreamBoothError("job a failed")])
    with pytest.raises(DreamBoothError, match="job a failed"):
        hydra_callbacks.call_command(lambda: None)


STUB = """
from dreambooth import train
from dreambooth.errors import Diverged, UserError

def job(cfg, *args):
    print("trial", flush=True)
    if cfg.train.seed:
        raise Diverged("the loss is nan") if cfg.train.seed == 1 else UserError("the seed is wrong")
    return 0.5

train._job = job
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("words, code, trials", [
    (["train.seed=choice(1)", "hydra.sweeper.n_trials=3"], 6, 3),
    (["train.seed=choice(2,0)", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1"], 1, 2)], ids=["all", "grid"])
def test_a_sweep_of_optuna_ends_without_a_traceback(words: list[str], code: int, trials: int, tmp_path: Path) -> None:
    """No trial has an objective, or the last point of a grid has failed."""
    done = subprocess.run([PYTHON, "-c", STUB, "-m", "hydra/sweeper=optuna", "tracking=none", f"run_root={tmp_path}",
                           *words], capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stdout + done.stderr
    assert done.stdout.splitlines().count("trial") == trials
    assert len(list(tmp_path.glob("results-*.csv"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_a_sweep_of_optuna_continues_after_failed_trials(batch: int, empty_db: Path, tmp_path: Path) -> None:
    """Of the four points, one finishes, one diverges, and two are wrong input."""
    from mlflow import MlflowClient

    shutil.copy(empty_db, tmp_path / "mlflow.db")
    words = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", f"hydra.sweeper.n_jobs={batch}", "hardware=cpu",
             "hydra.sweeper.n_trials=4", "train.learning_rate=choice(1e-4,1e30)", "train.lr_warmup_steps=choice(0,10)",
             "train.max_train_steps=2", "train.train_batch_size=1", "sample.every=null", "evaluate.encoder=none",
             "prior.with_prior_preservation=false", f"run_root={tmp_path}", "tracking.sweep=mine"]
    done = subprocess.run([PYTHON, "-m", "dreambooth.train", "-m", *words], capture_output=True, text=True, check=False,
                          cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "Traceback" not in done.stderr, done.stderr
    with (tmp_path / "results-mine.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["Completed", "Failed", "Failed", "Failed"]
    assert sum("the run diverged" in row["reason"] for row in rows) == 1
    assert sum("train.lr_warmup_steps=10 is longer than the run" in row["reason"] for row in rows) == 2
    first = min((done.stderr.find(text), code) for text, code in (("diverged", 6), ("no warm-up", 1)))
    assert done.returncode == first[1]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [sweep] = [run for run in client.search_runs([item.experiment_id for item in client.search_experiments()])
               if run.data.tags.get("kind") == "sweep"]
    assert (sweep.data.metrics["jobs"], sweep.data.metrics["failed"]) == (4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("command, said", [("plan", "s/step"), ("class_images", "no class images")])
def test_several_plans_or_class_images_leave_nothing_of_a_sweep(command: str, said: str, tmp_path: Path) -> None:
    """No table of trials, no database, and no folder or record of a run that was not made."""
    runs, log = tmp_path / "runs", tmp_path / "log"
    words = ["-m", f"run_root={runs}", "tracking=mlflow", "prior.with_prior_preservation=false"]
    assert call(command, words, log=log) == 0
    assert said in log.read_text() and "results-" not in log.read_text()
    assert not runs.exists(), sorted(runs.rglob("*"))
