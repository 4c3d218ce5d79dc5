"""Functions that send one journal entry to MLflow: an image, a dataset, or an artifact such as a LoRA file."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dreambooth.serialization.export_layout import ADAPTER, OLD_ADAPTER
from dreambooth.serialization.lora_files import BASE_KEY_PREFIX, is_lokr, read_base_model
from dreambooth.utils.assets import resolve_asset

LORA_FOLDER = "lora"  # name of the artifact folder of a LoRA
REVISION = BASE_KEY_PREFIX + "revision"  # MLflow uses the same name


def list_image_names(client: Any, run_id: str) -> set[str]:
    """Return the file names of the images that MLflow has for a run."""
    return {Path(file.path).name for file in client.list_artifacts(run_id, "images")}


def log_image(client: Any, run_id: str, entry: Mapping[str, Any], path: Path, existing: set[str]) -> None:
    """Log the image of a journal entry, unless MLflow already has this image.

    Args:
        existing: the result of `list_image_names`. An image in this set is not sent again, because MLflow would store a
            second copy under a new name.

    Raises:
        ValueError: the file at `path` does not exist or is not an image.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(str(error)) from error
    prefix = f"{entry['key'].replace('/', '~')}+step+{entry['step']}+timestamp+{entry['time']}+"
    if any(name.startswith(prefix) and name.endswith("webp") for name in existing):
        client.set_tag(run_id, "mlflow.loggedImages", "True")
    else:
        client.log_image(run_id, picture, key=entry["key"], step=entry["step"], timestamp=entry["time"],
                         synchronous=True)


def log_dataset(client: Any, run_id: str, values: Mapping[str, str]) -> None:
    """Log the training photos as a dataset input of the run. MLflow ignores a dataset that it already has.

    Args:
        values: the keys are name, digest (fingerprint of the photos), source (a folder or address) and photos (the
            number of photos).
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = values["source"]
    source_type = source.partition("://")[0] if "://" in source else "local"
    dataset = Dataset(values["name"], values["digest"][:36], source_type, json.dumps({"uri": source}),
                      profile=json.dumps({"photos": int(values["photos"])}))
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def log_artifact(client: Any, run_id: str, path: Path, folder: str | None) -> None:
    """Log a file or folder as an artifact of the run. A LoRA file is logged so that `mlflow.diffusers` can load it.

    mlflow.diffusers stores a LoRA together with the name of its base model and the newest revision of the base model
    on the hub, or no revision if the hub does not answer. If the run pinned a revision, this function stores the pinned
    revision instead. The run's other settings of the base model (variant, VAE ...) become metadata of the MLflow model.
    A complete model is logged as plain files, because MLflow has no flavour (model format) for complete models, and so
    is a LoKr, which load_lora_weights opens for some models only.

    Raises:
        ValueError: `path` does not exist.
    """
    if not path.exists():
        raise ValueError("there is no such file")
    if path.name not in (ADAPTER, OLD_ADAPTER) or is_lokr(path):
        client.log_artifact(run_id, str(path), folder)
        return
    import mlflow.diffusers
    from mlflow.models import Model

    metadata = _base_metadata(path)
    with tempfile.TemporaryDirectory() as temporary:
        model_folder = Path(temporary) / LORA_FOLDER
        mlflow.diffusers.save_model(str(path), str(model_folder), resolve_asset(read_base_model(path)),
                                    metadata=metadata or None)
        if REVISION in metadata:
            model = Model.load(str(model_folder))
            model.flavors[mlflow.diffusers.FLAVOR_NAME][REVISION] = metadata[REVISION]
            model.save(str(model_folder / "MLmodel"))
        client.log_artifacts(run_id, temporary)


def _base_metadata(path: Path) -> dict[str, str]:
    """Return the metadata entries of a LoRA file that describe the base model."""
    with safe_open(path, "pt") as file:
        return {key: value for key, value in (file.metadata() or {}).items() if key.startswith(BASE_KEY_PREFIX)}
