"""Fixtures of promotion."""

import pytest

from dreambooth.sweeps import promotion
from tests.support.runs import Registry


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry in memory, in place of MLflow's."""
    registry = Registry()
    monkeypatch.setattr(promotion, "Registry", lambda *_: registry)
    monkeypatch.setattr(promotion, "_send_to_mlflow", lambda trial, options: ("sqlite:///", f"id-{trial.folder.name}"))
    return registry
