"""What a sweep on this machine prints and writes at its end."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from dreambooth import cli, train
from dreambooth.config.enums import TrackingKind
from dreambooth.errors import UserError
from dreambooth.sweeps import hydra_callbacks
from tests.support.faults import call
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


@pytest.mark.slow
@pytest.mark.parametrize("command, said", [("plan", "s/step"), ("class_images", "no class images")])
def test_several_plans_or_class_images_leave_nothing_of_a_sweep(command: str, said: str, tmp_path: Path) -> None:
    """No table of trials, no database, and no folder or record of a run that was not made."""
    runs, log = tmp_path / "runs", tmp_path / "log"
    words = ["-m", f"run_root={runs}", "tracking=mlflow", "prior.with_prior_preservation=false"]
    assert call(command, words, log=log) == 0
    assert said in log.read_text() and "results-" not in log.read_text()
    assert not runs.exists(), sorted(runs.rglob("*"))
