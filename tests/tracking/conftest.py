"""Short waits, and an MLflow database for each test."""

from pathlib import Path

import pytest

from dreambooth.tracking import mlflow_shipper, tracker


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "SHIP_FROM_FIRST_STEP", False)
    monkeypatch.setattr(mlflow_shipper, "POLL_INTERVAL", 0.05)
    monkeypatch.setattr(mlflow_shipper, "BACKOFF", (0.05, 0.2))
    monkeypatch.setattr(mlflow_shipper, "CLOSE_REMOTE", 1.0)
    for name, value in {"REQUEST_TIMEOUT": "1", "REQUEST_MAX_RETRIES": "0"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_{name}", value)


@pytest.fixture
def uri(tmp_path: Path, empty_db: Path) -> str:
    (tmp_path / "mlflow.db").write_bytes(empty_db.read_bytes())
    return f"sqlite:///{tmp_path}/mlflow.db"
