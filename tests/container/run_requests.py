"""Requests for a run from hyperparameters, and what they compose to."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from dreambooth import entrypoint
from dreambooth.container.hyperparameters import RunRequest, build_request
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.errors import ConfigError

OPT_ML = SageMakerPaths(Path("/opt/ml"))
NO_DEADLINE = settings(deadline=None)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]))


def build(hyperparameters: dict[str, str], channels: dict[str, Path] | None = None, hardware: str | None = None,
          paths: SageMakerPaths = OPT_ML) -> RunRequest:
    return build_request(hyperparameters, channels or {}, hardware, paths, entrypoint.GRAMMAR)


def build_config(hyperparameters: dict[str, str], **options: Any) -> dict[str, Any]:
    return asdict(entrypoint.compose_run(build(hyperparameters, **options).to_args())[0])


def error_of(hyperparameters: dict[str, str], **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        build(hyperparameters, **options)
    return str(error.value)
