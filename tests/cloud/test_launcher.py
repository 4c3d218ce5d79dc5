"""`hydra/launcher=sagemaker`: Hydra's test suites for launchers, sweeps in this process, and checks before a sweep."""

import csv
import os
import re
import shutil
import subprocess
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite
from pytest import mark

from dreambooth.config.compose import conf_dir
from hydra_plugins.dreambooth_sagemaker.launcher import SageMakerLauncher, SageMakerLauncherConf
from tests.support.faults import FAST
from tests.support.s3_server import plain_client, serving
from tests.support.warm_python import PYTHON

# The suites assume Hydra 1.1's default for chdir; version_base of other tests persists in a singleton.
LOCAL = ["hydra.launcher.mode=local", "hydra.job.chdir=true"]


def test_hydra_finds_the_launcher() -> None:
    assert SageMakerLauncher.__name__ in [plugin.__name__ for plugin in Plugins.instance().discover(Launcher)]


@mark.parametrize("launcher_name, overrides", [("sagemaker_schema", LOCAL)])
class TestLauncher(LauncherTestSuite):
    """Hydra's own test suite."""


@mark.parametrize("launcher_name, overrides", [("sagemaker_schema", [*LOCAL, "hydra.sweeper.max_batch_size=2"])])
class TestLauncherInBatches(BatchedSweeperTestSuite):
    """Hydra's own test suite."""


@mark.slow  # twelve processes; the suites above run the same launcher in this process
@mark.parametrize("task_launcher_cfg, extra_flags", [({}, ["-m", "hydra/launcher=sagemaker_schema", *LOCAL])])
class TestLauncherIntegration(IntegrationTestSuite):
    """Hydra's own test suite."""


def sweep(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, "-m", "dreambooth.train", "-m", "hydra/launcher=sagemaker", f"run_root={folder}", *words],
        capture_output=True, text=True, check=False, cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment})


def table(folder: Path) -> list[dict[str, str]]:
    [path] = folder.glob("results-*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


@mark.slow
def test_launcher_runs_a_sweep_of_six_in_which_one_fails(empty_db: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    shutil.copy(empty_db, tmp_path / "mlflow.db")
    words = [word for word in FAST if not word.startswith(("tracking", "train.max", "sample.every"))]
    done = sweep(tmp_path, "hydra.launcher.mode=local", "hydra.launcher.sweep=six", *words, "train.max_train_steps=4",
                 "sample.every=null", "prior.with_prior_preservation=false", "checkpoint.every=null",
                 "tracking.experiment=sweeps", "train.lr_scheduler=constant_with_warmup",
                 "train.lr_warmup_steps=0,1,2,3,4,99")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "train.lr_warmup_steps=99 is longer than the run" in done.stderr
    rows = table(tmp_path)
    assert [row["status"] for row in rows] == ["Completed"] * 5 + ["Failed"]
    assert float(rows[0]["objective"]) <= float(rows[1]["objective"])
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [experiment] = [item for item in client.search_experiments() if item.name == "sweeps"]
    runs = client.search_runs([experiment.experiment_id], "tags.sweep = 'six'")
    assert len(runs) == 5 + 1  # with the run of the sweep; the failed trial never opened a tracker


@mark.parametrize("words, sentences", [
    (["hardware=g4dn", "precision=bf16", "hydra.launcher.spot=true", "hydra.launcher.keep_alive_minutes=5",
      "hydra.launcher.subnets=[subnet-1]", "dataset=folder", "dataset.instance_dir=nowhere", "dataset.mask=here",
      "evaluate.reference_dir=here", "evaluate.lpips=here.safetensors",
      "hydra.launcher.mlflow_uri=http://localhost:5000"], [
          "the image is missing: type hydra.launcher.image=",
          "the execution role is missing: type hydra.launcher.role=",
          "the S3 folder for results is missing: type hydra.launcher.s3=", "type precision=fp16",
          "no warm pool", "a VPC needs both", "there is no folder nowhere", "type dataset.mask=s3://BUCKET/FOLDER",
          "type evaluate.reference_dir=s3://BUCKET/FOLDER", "type evaluate.lpips=s3://BUCKET/FILE",
          "cannot reach MLflow at http://localhost"]),
    (["hardware=cpu"], ["the instance type is missing: type hydra.launcher.instance_type="]),
    (["hydra.launcher.mode=cloud", "hydra.launcher.sweep='a b'", "hydra.launcher.on_interrupt=maybe"], [
        "hydra.launcher.mode must be aws, local, docker, not cloud",
        "hydra.launcher.sweep must be 1 to 40 letters, digits and hyphens, not a b",
        "on_interrupt must be leave or stop, not maybe"]),
])
def test_launcher_reports_all_mistakes_before_anything_runs(
        tmp_path: Path, words: list[str], sentences: list[str]) -> None:
    done = sweep(tmp_path, *words, "hydra.launcher.plan=false", AWS_DEFAULT_REGION="us-east-1")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert [sentence for sentence in sentences if sentence not in done.stderr] == []


def test_launcher_leaves_no_trace_of_a_typed_credential(tmp_path: Path) -> None:
    done = sweep(tmp_path, "hardware=g4dn", "+hydra.launcher.environment.WANDB_API_KEY=hidden")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "environment WANDB_API_KEY looks like a credential" in done.stderr
    assert "hidden" not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hidden" in path.read_bytes()]


def test_launcher_without_multirun_says_to_add_it(tmp_path: Path) -> None:
    done = subprocess.run([PYTHON, "-m", "dreambooth.train", "hydra/launcher=sagemaker", "hardware=cpu"],
                          capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        1, "dreambooth: hydra/launcher=sagemaker runs sweeps only, and a single run is a sweep of one: add -m\n")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_job_of_the_launcher_submits_no_jobs(tmp_path: Path) -> None:
    done = sweep(tmp_path, "hardware=g4dn", DREAMBOOTH_SWEEP="outer")
    assert done.returncode == 1
    assert "a job cannot submit jobs" in done.stderr


@mark.slow
def test_launcher_reads_objectives_from_s3_and_a_failed_job_ends_with_1(tmp_path: Path) -> None:
    """The whole command against moto, whose jobs end at once; the third has no result."""
    words = ["hardware=g4dn,g5", "train.learning_rate=1e-6,2e-6", "dataset=s3", "dataset.instance_dir=s3://bucket/photos",
             "dataset.instance_prompt=a photo of a zwx dog", "dataset.class_prompt=a photo of a dog", "tracking=none",
             "hydra.launcher.image=image", "hydra.launcher.role=arn:aws:iam::123456789012:role/x",
             "hydra.launcher.s3=s3://bucket/out", "hydra.launcher.plan=false", "hydra.launcher.sweep=mine",
             "hydra.launcher.poll_seconds=1", "hydra.launcher.spot=true"]
    with serving():
        plain_client().create_bucket(Bucket="bucket")
        plain_client().put_object(Bucket="bucket", Key="photos/a.jpg", Body=b"a")
        first = sweep(tmp_path, *words)
        assert first.returncode == 1, first.stdout + first.stderr
        assert "Traceback" not in first.stderr
        assert "result.json cannot be read" in first.stderr
        rows = table(tmp_path)
        assert [row["status"] for row in rows] == ["Failed"] * 4
        for number, row in enumerate(sorted(rows, key=lambda row: row["number"])):
            where = re.search(r"s3://bucket/(\S+/result\.json)", row["reason"])
            assert where and row["job"] in where[1]
            if number != 2:
                body = f'{{"objective": 0.{number + 1}}}'.encode()
                plain_client().put_object(Bucket="bucket", Key=where[1], Body=body)
        again = sweep(tmp_path, *words)
        assert again.returncode == 1, again.stdout + again.stderr
    rows = table(tmp_path)
    assert [(row["status"], row["objective"]) for row in rows] == [
        ("Completed", "0.1"), ("Completed", "0.2"), ("Completed", "0.4"), ("Failed", "")]
    assert [row["hardware"] for row in rows] == ["g4dn", "g4dn", "g5", "g5"]


@mark.slow
def test_launcher_refuses_a_job_that_does_not_fit(tmp_path: Path) -> None:
    done = sweep(tmp_path, "hardware=g4dn", "memory=fast", "dataset=s3", "dataset.instance_dir=s3://bucket/photos",
                 "dataset.instance_prompt=a zwx dog", "dataset.class_prompt=a dog", "train.train_batch_size=8",
                 "hydra.launcher.image=image", "hydra.launcher.role=arn:aws:iam::123456789012:role/x",
                 "hydra.launcher.s3=s3://bucket/out", AWS_DEFAULT_REGION="us-east-1", AWS_ACCESS_KEY_ID="x",
                 AWS_SECRET_ACCESS_KEY="x")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "job 0: " in done.stderr
    assert "GiB" in done.stderr


def test_every_setting_of_the_launcher_is_in_conf_with_a_comment() -> None:
    lines = (conf_dir() / "hydra/launcher/sagemaker.yaml").read_text(encoding="utf-8").splitlines()
    documented = {line.partition(":")[0]: "  # " in line for line in lines if re.match(r"[a-z]\w*: ", line)}
    assert documented == dict.fromkeys(vars(SageMakerLauncherConf()).keys() - {"_target_"}, True)
