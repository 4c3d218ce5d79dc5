"""An adapter in MLflow by its diffusers flavour, which `mlflow.diffusers.load_model` opens; other files as they are."""

import tempfile
from pathlib import Path
from typing import Any

from dreambooth.lora_files import DIFFUSERS, base_of
from dreambooth.packaged import asset

FOLDER = "lora"  # of the run's artifacts


def log(client: Any, run_id: str, path: Path, folder: str | None) -> None:
    """Send a file or folder of a run.

    mlflow.diffusers logs a LoRA beside the name of its base, and asks the hub for that base's revision, which it does
    without if the hub does not answer. A whole model has no flavour there.
    """
    if not path.exists():
        raise ValueError("there is no such file")
    if path.name != DIFFUSERS:
        client.log_artifact(run_id, str(path), folder)
        return
    import mlflow.diffusers

    with tempfile.TemporaryDirectory() as aside:
        mlflow.diffusers.save_model(str(path), str(Path(aside) / FOLDER), asset(base_of(path)))
        client.log_artifacts(run_id, aside)
