"""A job writes its state below /opt/ml/checkpoints only, where it survives a spot interruption."""

from pathlib import Path
from typing import Any

import pytest

from dreambooth import entrypoint
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.container.supervisor import Supervisor
from dreambooth.errors import UserError
from tests.support.sagemaker_job import SHORT, lay_out

LOG = "hydra.job_logging.handlers.file.filename"


def train_command(base: Path, monkeypatch: pytest.MonkeyPatch, hyperparameters: dict[str, str]) -> list[str]:
    """The command that a job with these hyperparameters starts."""
    class Started(Exception):
        pass

    def run(self: Supervisor, command: list[str], *_: Any, **__: Any) -> None:
        raise Started(*command)

    monkeypatch.setattr(Supervisor, "run", run)
    lay_out(base, SHORT | hyperparameters)
    try:
        entrypoint._run_job(SageMakerPaths(base), [], Supervisor())
    except Started as started:
        return list(started.args)
    raise AssertionError("nothing was started")


@pytest.mark.parametrize("override, hyperparameters", [
    ("name or hydra.run.dir", {"hydra.run.dir": "/elsewhere/run"}),
    ("name or hydra.run.dir", {"hydra.run.dir": "${run_root}"}),
    ("name or hydra.run.dir", {"model_name": "../../../x"}),
    ("run_root", {"run_root": "runs"}),
    ("hydra.output_subdir", {"hydra.output_subdir": "../../../elsewhere"}),
    (LOG, {"hydra/job_logging": "default", "hydra.job.name": "../../../x"}),
    ("tracking.uri", {"tracking": "mlflow", "tracking.uri": "sqlite:////elsewhere/mlflow.db"}),
])
def test_what_would_leave_the_checkpoints_is_refused_with_one_sentence(
        override: str, hyperparameters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as error:
        train_command(tmp_path, monkeypatch, hyperparameters)
    assert str(error.value).startswith(f"{override} would make the job write to /")
    assert str(error.value).endswith(f"so that a spot interruption would lose it: leave {override} out")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("hyperparameters", [
    {"name": "team/..toy", LOG: "${hydra.runtime.output_dir}/mine.log", "tracking": "mlflow",
     "tracking.uri": "sqlite:///${run_root}/mine.db"},
    {"hydra.run.dir": "${run_root}/toy", "hydra/job_logging": "none", "hydra.output_subdir": "null",
     "tracking.uri": "sqlite:////elsewhere/of/no/effect.db"}])
def test_what_stays_below_the_checkpoints_is_accepted(
        hyperparameters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if this folder is a link to another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "ml").mkdir()
    (tmp_path / "ml/checkpoints").symlink_to(tmp_path / "disk")
    assert "dreambooth.train" in train_command(tmp_path / "ml", monkeypatch, hyperparameters)
