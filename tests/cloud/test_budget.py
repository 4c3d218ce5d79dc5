"""The budget of a sweep on SageMaker: what would pass it is not submitted, and what reaches it is stopped."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dreambooth.cloud import job_preparation
from dreambooth.cloud.job import COMPLETED, RUNNING, STOPPED, Job, JobState, Spending, Unreachable
from dreambooth.config.hardware import RunBudget
from dreambooth.errors import ConfigError, DoesNotFit, Interrupted
from dreambooth.planner.rehearsal import predict
from dreambooth.planner.report import Plan, plan_as_dict
from hydra_plugins.dreambooth_sagemaker import _core
from tests.cloud.jobs import PHOTOS, config_of, jobs_of
from tests.cloud.memory_backend import Cloud, jobs, make_follower, read_table, run_on
from tests.support.configs import compose_recipe

pytestmark = pytest.mark.usefixtures("environment")
HOUR = {"run_seconds": 3600.0, "spot_seconds": 4000.0, "disk_gib": 40.0}  # of the planner
SPOT = ("hydra.launcher.spot=true", "hardware.spot_price_usd_hour=0.3")


class Hours(Cloud):
    """Jobs that train until they are stopped; each poll finds them one hour later. Job 0 ends after two hours."""

    def __init__(self) -> None:
        super().__init__()
        self.hours: dict[str, int] = {}

    def poll(self, job: Job) -> JobState:
        self.hours[job.name] = self.hours.get(job.name, 0) + 1
        assert self.hours[job.name] < 9, "nobody stops it"
        seconds = 3600.0 * self.hours[job.name]
        if job.name in self.stopped:
            return JobState(STOPPED, seconds=seconds, billed_seconds=seconds, reason="it was stopped (Stopped)")
        if job.number == 0 and self.hours[job.name] == 2:
            return JobState(COMPLETED, seconds=seconds, billed_seconds=seconds, result={"objective": 0.5})
        return JobState(RUNNING, seconds=seconds)


def priced(count: int, usd_hour: float | None = 1.0, hours: float | None = 1.0) -> list[Job]:
    return [replace(job, usd_hour=usd_hour, estimate_seconds=None if hours is None else 3600 * hours,
                    estimate_usd=None if hours is None or usd_hour is None else hours * usd_hour)
            for job in jobs(count)]


def planned(monkeypatch: pytest.MonkeyPatch, *overrides: str, count: int = 1) -> list[Job]:
    """The jobs of a sweep, one hour each, whose inputs must not be uploaded if the budget refuses them."""
    monkeypatch.setattr(job_preparation, "_plans", {})
    monkeypatch.setattr(job_preparation, "_run_planner", lambda overrides: (HOUR, ""))
    words = ("hardware=g4dn", "hydra.launcher.plan=true", *PHOTOS, *overrides)
    return jobs_of(*(config_of(*words, number=number) for number in range(count)))


def test_jobs_with_the_same_plan_run_the_planner_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append([word for word in command if word.startswith(("method=", "train."))])
        return subprocess.CompletedProcess(command, 0, json.dumps(HOUR), "")

    monkeypatch.setattr(job_preparation, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(job_preparation, "_plans", {})
    words = (["train.seed=1"], ["train.seed=2", "train.learning_rate=1e-5"], ["train.seed=3", "method=lora"],
             ["train.max_train_steps=9"])
    found = jobs_of(*(config_of("hardware=g4dn", "hydra.launcher.plan=true", *PHOTOS, *more, number=number)
                      for number, more in enumerate(words)))
    assert calls == [["train.seed=1"], ["train.seed=3", "method=lora"], ["train.max_train_steps=9"]], "whole, but once"
    assert [job.estimate_seconds for job in found] == [HOUR["run_seconds"]] * 4


def test_a_job_that_does_not_fit_is_refused_once_for_each_job_with_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_preparation, "_plans", {})
    monkeypatch.setattr(job_preparation, "_run_planner", lambda overrides: ({}, "it does not fit"))
    with pytest.raises(ConfigError) as caught:
        jobs_of(*(config_of("hardware=g4dn", "hydra.launcher.plan=true", *PHOTOS, number=number) for number in (0, 1)))
    assert caught.value.problems == ("job 0: it does not fit", "job 1: it does not fit")


CHANGED = {"train.seed": "5", "train.learning_rate": "1e-3",
           "train.lr_scheduler": "cosine", "train.lr_warmup_steps": "3", "train.ema_decay": "0.9",
           "prior.prior_loss_weight": "0.3", "method.alpha": "3", "optimizer.beta1": "0.8", "optimizer.beta2": "0.9",
           "optimizer.eps": "1e-6", "optimizer.weight_decay": "0.1", "name": "other", "tracking.sweep": "other"}


def test_settings_that_share_a_plan_have_no_effect_on_it() -> None:
    assert CHANGED.keys() == job_preparation.WITHOUT_EFFECT_ON_PLAN
    words = ["hardware=g4dn", "train.train_text_encoder=true", "model=tiny", "train.lr_scheduler=constant_with_warmup"]
    plain = {name: plan_of(*words, f"method={name}") for name in ("full", "lora")}
    for key, value in CHANGED.items():
        name = "lora" if key == "method.alpha" else "full"
        assert plan_of(*words, f"method={name}", f"{key}={value}") == plain[name], key
    assert plan_of(*words, "train.text_encoder_learning_rate=1e-4") != plain["full"]


def plan_of(*words: str) -> tuple[dict[str, Any], bool, bool]:
    """The plan, and the options between which memory=auto may choose."""
    recipe = compose_recipe(*words)
    return (plan_as_dict(Plan(recipe, predict(recipe), (), "")), recipe.allows_optimizer_in_backward,
            recipe.allows_offload_optimizer)


def test_a_sweep_that_would_pass_its_budget_is_not_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_preparation.Inputs, "upload", lambda self: pytest.fail("inputs were uploaded"))
    with pytest.raises(DoesNotFit) as caught:
        planned(monkeypatch, "budget.max_usd=1.5", count=4)
    assert str(caught.value) == ("budget.max_usd=1.5 fits 2 of 4 jobs, which need about $2.95: type budget.max_usd=3, "
                                 "or fewer jobs; nothing was submitted")


def test_the_budget_is_that_of_the_sweep_and_no_hyperparameter_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A higher budget must find the jobs of the sweep again, and a job must not stop at the budget of all of them."""
    plain, limited = (planned(monkeypatch, *words) for words in ((), ("budget.max_usd=9",)))
    assert [job.name for job in limited] == [job.name for job in plain]
    assert "budget" not in str(limited[0].request["HyperParameters"])
    assert limited[0].request["StoppingCondition"] == {"MaxRuntimeInSeconds": round(9 / 0.7364 * 3600)}, "AWS keeps it"


def test_spot_instances_count_with_their_price_and_their_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    [job] = planned(monkeypatch, *SPOT)
    assert (job.spot_usd_hour, job.estimate_seconds) == (0.3, 4000)
    assert job.estimate_usd == pytest.approx(4000 / 3600 * 0.3)
    assert "spot, $0.3/h for 1.1 h, about $0.33" in next(iter(job_preparation.describe_jobs([job])))
    assert JobState(RUNNING, seconds=3600).cost_usd(job) == pytest.approx(0.3)
    assert JobState(COMPLETED, seconds=3600, billed_seconds=1200).cost_usd(job) == pytest.approx(0.7364 / 3)


def test_a_sweep_over_budgets_is_refused() -> None:
    configs = [config_of("hardware=g4dn", *PHOTOS) for _ in range(2)]
    configs[1].budget.max_usd = 9.0
    with pytest.raises(ConfigError, match="the budget is that of all jobs of the sweep together, and cannot vary"):
        jobs_of(*configs)


def test_a_limit_in_dollars_needs_a_price() -> None:
    with pytest.raises(ConfigError, match=r"type hydra\.launcher\.price_usd_hour=PRICE, or budget\.max_hours=HOURS"):
        Spending(RunBudget(max_usd=5.0)).check(priced(2, usd_hour=None))


@pytest.mark.parametrize("limit", [{"max_usd": 5.0}, {"max_hours": 5.0}])
def test_a_sweep_that_reaches_its_budget_stops_its_jobs_and_keeps_its_results(
        limit: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """Four jobs, two at a time, need much longer than planned: the third is stopped, and the fourth never started."""
    cloud = Hours()
    sweep: list[Any] = []
    monkeypatch.setattr(_core, "read_budget", lambda composed: RunBudget(**limit))
    with pytest.raises(Interrupted) as caught:
        sweep.append(run_on(cloud, priced(4), tmp_path, monkeypatch, max_parallel=2))
    assert cloud.stopped == ["j1", "j2"]
    assert list(cloud.left) == ["j0", "j1", "j2"], "submitted"
    assert read_table(tmp_path) == {"j0": COMPLETED, "j1": STOPPED, "j2": STOPPED, "j3": STOPPED}
    key, value = next(iter(limit.items()))
    assert f"budget.{key}={value:g} is used up" in str(caught.value)
    assert "3 jobs of 4 stopped or not started, and the results of the others are kept" in str(caught.value)
    assert "repeat the command with a higher budget and hydra.launcher.sweep=mine hydra.launcher.resubmit=true" in str(
        caught.value)
    assert "it was not started: budget" in capsys.readouterr().out


def test_a_stop_that_aws_does_not_answer_is_repeated() -> None:
    class Deaf(Hours):
        deaf = 3

        def stop(self, job: Job) -> bool:
            self.deaf -= 1
            if self.deaf >= 0:
                raise Unreachable("AWS does not answer")
            return super().stop(job)

    cloud = Deaf()
    follower = make_follower(cloud, priced(3), spending=Spending(RunBudget(max_usd=4.0)))
    states = follower.run()
    assert cloud.stopped == ["j1", "j2"] and all(state.ended for state in states)


def test_a_batch_counts_what_earlier_batches_have_cost() -> None:
    spending = Spending(RunBudget(max_usd=5.0))
    spending.check(priced(2))
    spending.add(priced(2), [JobState(COMPLETED, billed_seconds=7200.0)] * 2)
    with pytest.raises(DoesNotFit, match=r"budget.max_usd=5, of which \$4.00 are used, fits 1 of 2 jobs, which need"):
        spending.check(priced(2))
    spending.add(priced(1), [JobState(COMPLETED, billed_seconds=3600.0)])
    with pytest.raises(DoesNotFit, match=r"budget.max_usd=5 is used up \(\$5.00\): type a higher budget.max_usd"):
        spending.check(priced(1))
