"""An adapter in MLflow by its diffusers flavour, which `mlflow.diffusers.load_model` opens; other files as they are."""

import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dreambooth.serialization.lora_files import DIFFUSERS, OF_BASE, base_of
from dreambooth.utils.assets import asset

FOLDER = "lora"  # of the run's artifacts
REVISION = OF_BASE + "revision"  # MLflow's name too


def log(client: Any, run_id: str, path: Path, folder: str | None) -> None:
    """Send a file or folder of a run.

    mlflow.diffusers logs a LoRA beside the name of its base. It asks the hub for that base's newest revision, and does
    without if the hub does not answer; the one that the run pinned is put in its place. What else the run chose of its
    base is metadata of the model. A whole model has no flavour there.
    """
    if not path.exists():
        raise ValueError("there is no such file")
    if path.name != DIFFUSERS:
        client.log_artifact(run_id, str(path), folder)
        return
    import mlflow.diffusers
    from mlflow.models import Model

    chosen = _of_base(path)
    with tempfile.TemporaryDirectory() as aside:
        made = Path(aside) / FOLDER
        mlflow.diffusers.save_model(str(path), str(made), asset(base_of(path)), metadata=chosen or None)
        if REVISION in chosen:
            known = Model.load(str(made))
            known.flavors[mlflow.diffusers.FLAVOR_NAME][REVISION] = chosen[REVISION]
            known.save(str(made / "MLmodel"))
        client.log_artifacts(run_id, aside)


def _of_base(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return {key: value for key, value in (opened.metadata() or {}).items() if key.startswith(OF_BASE)}
