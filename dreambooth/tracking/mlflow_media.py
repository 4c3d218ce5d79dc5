"""What MLflow keeps of a run beside numbers and files: images with a step, and the photos as a dataset input."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def names(client: Any, run_id: str) -> set[str]:
    """The images that a run has."""
    return {Path(file.path).name for file in client.list_artifacts(run_id, "images")}


def image(client: Any, run_id: str, entry: Mapping[str, Any], path: Path, there: set[str]) -> None:
    """Send the picture of a journal's entry, unless it is `there` already: MLflow gives every copy a new name.

    Raises:
        ValueError: there is no such picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(str(error)) from error
    name = f"{entry['key'].replace('/', '~')}+step+{entry['step']}+timestamp+{entry['time']}+"
    if any(known.startswith(name) and known.endswith("webp") for known in there):
        client.set_tag(run_id, "mlflow.loggedImages", "True")
    else:
        client.log_image(run_id, picture, key=entry["key"], step=entry["step"], timestamp=entry["time"],
                         synchronous=True)


def dataset(client: Any, run_id: str, entry: Mapping[str, str]) -> None:
    """Attach the photos that a run is trained on; the same ones twice are one.

    Args:
        entry: name, digest (the photos' content), source (a folder or address) and photos (their number).
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = entry["source"]
    kind = source.partition("://")[0] if "://" in source else "local"
    data = Dataset(entry["name"], entry["digest"][:36], kind, json.dumps({"uri": source}),
                   profile=json.dumps({"photos": int(entry["photos"])}))
    client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
