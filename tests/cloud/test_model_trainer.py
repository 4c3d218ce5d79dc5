"""`dreambooth.cloud.model_trainer`: the SDK's ModelTrainer sends the request that the launcher sends."""

import builtins
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from dreambooth.cloud import model_trainer
from dreambooth.config.compose import conf_dir
from dreambooth.errors import ConfigError, UserError
from tests.cloud.jobs import GOLDEN, LAUNCHER, PHOTOS
from tests.cloud.test_job_requests import CASES
from tests.cloud.test_sdk_defaults import ADMINISTRATOR, USER, write
from tests.support.s3_server import plain_client
from tests.support.sagemaker_server import serving

pytestmark = pytest.mark.usefixtures("environment")


@pytest.mark.parametrize("name", [
    "g4dn-spot", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "g4dn-spot")])
def test_a_trainer_sends_the_launchers_request(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """SageMaker refuses a second job of the same name. No other service is called: the SDK does not check the role."""
    with serving() as server:
        plain_client().create_bucket(Bucket="bucket")
        trainer = model_trainer([*LAUNCHER, *CASES[name]], sweep="sweep-1")
        assert server.requests == [], "nothing is submitted yet"
        assert "sweep-1-0-" in capsys.readouterr().out, "the job and its price are shown"
        trainer.train(wait=False, logs=False)
        [request] = server.named("CreateTrainingJob")
        assert request == json.loads((GOLDEN / f"sagemaker-{name}.json").read_text())
        with pytest.raises(ClientError, match="must be unique"):
            trainer.train(wait=False, logs=False)
        assert server.services == {"s3", "sagemaker"}
    assert "SAGEMAKER_VALIDATE_ROLE" not in os.environ


@pytest.mark.slow
def test_a_trainer_sends_a_companys_defaults_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, monkeypatch, ADMINISTRATOR, USER)
    with serving() as server:
        plain_client().create_bucket(Bucket="bucket")
        model_trainer([*LAUNCHER, "hardware=g5", "hydra.launcher.role=null", "+hydra.launcher.tags.team=art", *PHOTOS],
                      sweep="sweep-1").train(wait=False, logs=False)
        [request] = server.named("CreateTrainingJob")
    assert request == json.loads((GOLDEN / "sagemaker-defaults.json").read_text())


def test_the_trainer_of_a_pipeline_gives_its_request_to_the_step() -> None:
    """Also if the notebook has initialized Hydra for something else."""
    with serving(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        from sagemaker.core.workflow.pipeline_context import PipelineSession

        trainer = model_trainer([*LAUNCHER, *CASES["g4dn-spot"]], sweep="sweep-1", session=PipelineSession())
        step = trainer.train()
        assert GlobalHydra.instance().is_initialized()
    golden = json.loads((GOLDEN / "sagemaker-g4dn-spot.json").read_text())
    del golden["TrainingJobName"]  # SageMaker names the jobs of a pipeline
    assert step.func_args[0]._create_training_job_args(boto3=True) == golden


@pytest.mark.parametrize("words, sentence", [
    (["train.max_train_steps=0"], r"^train\.max_train_steps"),
    (["hydra.launcher.max_run_hours=9999"], "hydra.launcher.max_run_hours must be from 0.1 to 672"),
    (["hydra.launcher.mode=docker"], "leave hydra.launcher.mode out"),
    (["hydra.launcher.sweep=a_b"], "1 to 40 letters, digits and hyphens, not a_b"),
    (["+hydra.launcher.environment.WANDB_API_KEY=hidden"], "Secrets Manager"),
    (["hydra.launcher.role=null"], "^the execution role is missing"),
    (["train.seed=1,2"], "train.seed"),
    (["train.sed=1"], r"train\.seed"),
    (["hydra.launcher.s3=${nope}"], "hydra.launcher.s3.*nope"),
    (["hydra.launcher.s3=${oc.env:NOPE}"], "hydra.launcher.s3.*NOPE"),
])
def test_a_mistake_ends_in_the_launchers_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises((ConfigError, UserError), match=sentence) as caught:
        model_trainer([*LAUNCHER, "hardware=g4dn", *PHOTOS, *words])
    assert "hidden" not in str(caught.value)


def test_without_the_sdk_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.startswith("sagemaker"):
            raise ImportError(name)
        return importing(name, *args)

    for name in [name for name in sys.modules if name.split(".")[0] == "sagemaker"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pip install 'dreambooth\[aws\]'"):
        model_trainer(["hardware=g4dn"])
