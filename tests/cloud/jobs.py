"""Jobs of a composed sweep, for tests that never call AWS: botocore answers, and its model of the service checks."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from dreambooth.cloud.job import Job
from dreambooth.cloud.job_preparation import prepare_jobs
from dreambooth.cloud.sagemaker_backend import SageMakerBackend
from dreambooth.config.compose import conf_dir
from dreambooth.storage import folders
from hydra_plugins.dreambooth_sagemaker import _prepare

INSPECT = folders.inspect
ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "support/golden"
ROLE = "arn:aws:iam::123456789012:role/dreambooth"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/dreambooth@sha256:" + "0" * 64
LAUNCHER = [f"hydra.launcher.role={ROLE}", f"hydra.launcher.image={IMAGE}", "hydra.launcher.s3=s3://bucket/sweeps",
            "hydra.launcher.plan=false"]
PHOTOS = ["dataset=s3", "dataset.instance_dir=s3://bucket/photos", "dataset.instance_prompt=a photo of a zwx dog",
          "dataset.class_prompt=a photo of a dog"]


@cache
def compose_once(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", ["hydra/launcher=sagemaker", *LAUNCHER, *overrides], return_hydra_config=True)


def config_of(*overrides: str, number: int = 0) -> DictConfig:
    cfg = copy.deepcopy(compose_once(*overrides))
    with open_dict(cfg):
        cfg.hydra.job.num = number
    return cfg


def jobs_of(*configs: DictConfig, client: Any = None) -> list[Job]:
    composed = _prepare.read_jobs(configs)
    _prepare.refuse_secrets(composed, "sweep-1", Path(str(configs[0].hydra.sweep.dir)))
    return prepare_jobs(composed, "sweep-1", SageMakerBackend(client or folders.client("sagemaker")), "aws")


def request_of(*overrides: str) -> dict[str, Any]:
    return jobs_of(config_of(*overrides))[0].request


KMS = "hydra.launcher.kms_key=arn:aws:kms:us-east-1:123456789012:key/1"
