"""SageMaker's contract for hosting a model: `serve` as the argument of the image.

    python -m dreambooth.serving [KEY=VALUE ...]

The model is in /opt/ml/model, where SageMaker unpacks model.tar.gz. The server listens on all addresses, on the port
SAGEMAKER_BIND_TO_PORT or 8080. An environment variable DREAMBOOTH_SERVE_KEY sets the option KEY of
`python -m dreambooth.serve`; arguments take precedence. Imports no torch.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.serialization.export_layout import INDEX, find_adapter
from dreambooth.utils.quoting import override

PREFIX = "DREAMBOOTH_SERVE_"
SECRETS = {"DREAMBOOTH_SERVE_TOKEN"}  # dreambooth.serve reads it itself: arguments are visible to all users
DEFAULT_PORT = "8080"
ADAPTERS = "adapters"  # folder of adapters beside the model


def serving_overrides(paths: SageMakerPaths, arguments: Sequence[str], environment: Mapping[str, str],
                      keys: Sequence[str]) -> list[str]:
    """Return the overrides of `python -m dreambooth.serve`.

    Args:
        paths: the folders that SageMaker mounts.
        arguments: overrides from the command line.
        keys: all keys of the command.
    """
    chosen = {key: f"{key}={environment[PREFIX + key.upper()]}" for key in keys
              if environment.get(PREFIX + key.upper()) and PREFIX + key.upper() not in SECRETS}
    chosen |= {word.partition("=")[0]: word for word in arguments}
    model = paths.model
    with suppress(PermissionError):  # the command says so
        if "run" not in chosen and _has_model(model):
            chosen["run"] = override("run", str(model))
        if "adapters" not in chosen and (model / ADAPTERS).is_dir():
            chosen["adapters"] = override("adapters", str(model / ADAPTERS))
    if "run" not in chosen and "base" not in chosen:
        chosen["run"] = override("run", str(model))  # the command says what is missing there
    defaults = {"host": "host=0.0.0.0", "port": f"port={environment.get('SAGEMAKER_BIND_TO_PORT') or DEFAULT_PORT}",
                "cache": override("cache", str(Path(tempfile.gettempdir()) / "dreambooth"))}
    return list((defaults | chosen).values())


def _has_model(folder: Path) -> bool:
    """Return whether a folder holds an exported model or adapter, itself or in its folder `model`."""
    return any((place / INDEX).is_file() or find_adapter(place) for place in (folder, folder / "model"))
