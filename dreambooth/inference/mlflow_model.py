"""The MLflow model of a run: loads the registered folder, and draws the pictures that a data frame asks for.

MLflow imports this module by its name in the file MLmodel, from the code that travels with the model
(tracking/mlflow_model.py). `mlflow models serve` and `mlflow.pyfunc.load_model` call the two functions below.
"""

import os
from collections.abc import Mapping
from threading import Lock
from typing import Any

from dreambooth.config.generate import Generate
from dreambooth.errors import UserError
from dreambooth.inference.model_sources import fetch_base, find_source
from dreambooth.inference.picture_answer import prediction
from dreambooth.inference.picture_request import Limits, parse, whole_number
from dreambooth.inference.renderer import Renderer
from dreambooth.storage import run_inputs
from dreambooth.tracking.mlflow_client import bad_request

BASE_VARIABLE = "DREAMBOOTH_BASE"  # environment variable: folder or hub id of the base model of an adapter
REMEDY = (f"set the environment variable {BASE_VARIABLE} to its folder or hub id, or promote the run again with "
          "include_base=true")
BATCH_SIZE = 4  # pictures of one row that are drawn at a time, as generate does by default
LIMITS = Limits()


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> "PictureModel":
    """Open the model in the folder `path`. MLflow calls this function.

    Args:
        model_config: `base`, the folder or hub id of the base model of an adapter, in place of BASE_VARIABLE; and
            `device`, cpu or cuda.
    """
    import torch

    from dreambooth.models.loading import import_libraries

    import_libraries()
    options = dict(model_config or {})
    base = options.get("base") or os.environ.get(BASE_VARIABLE) or None
    source = find_source(Generate(run=path, base=run_inputs.download_if_remote(base)))
    device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return PictureModel(Renderer(fetch_base(source, REMEDY), device))


class PictureModel:
    """Draws pictures for MLflow. Threads may call it at the same time: one draws, the others wait."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer, self._lock = renderer, Lock()

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Draw pictures, and return a data frame with one row per picture.

        The pictures of a row are those of one command `python -m dreambooth.generate`, bit for bit. Pictures of several
        rows are never drawn in one batch, because rounding errors depend on the size of a batch.

        The column `image` is a PNG file in base64. The column `metadata` is a dictionary with the settings of the
        picture, which the PNG file contains too.

        Args:
            model_input: a data frame, or a list of dictionaries, with one row per request. The columns are the fields
                of a request (picture_request.FIELDS). A value that is missing, None or NaN stands for the default.
            params: values of the same fields for all rows that lack them.

        Raises:
            MlflowException: a value is wrong; the HTTP status is 400.
        """
        from pandas import DataFrame

        try:
            rows = [parse({**(params or {}), **row}, LIMITS) for row in _rows(model_input)]
            with self._lock:  # also for `check`: a tokenizer must not be used by two threads at a time
                for row in rows:
                    self.renderer.check(row[0])
                pngs = [png for row in rows for first in range(0, len(row), BATCH_SIZE)
                        for png in self.renderer.draw(row[first:first + BATCH_SIZE])]
        except UserError as error:
            raise bad_request(str(error)) from error
        return DataFrame([prediction(png) for png in pngs], columns=["image", "metadata"])


def _rows(model_input: Any) -> list[dict[str, Any]]:
    """Return the rows of a data frame or of a list of dictionaries, without missing values, as Python's own types."""
    import pandas

    frame = model_input if isinstance(model_input, pandas.DataFrame) else pandas.DataFrame(
        [model_input] if isinstance(model_input, Mapping) else model_input, dtype=object)
    return [{str(key): whole_number(value.item() if hasattr(value, "item") else value)  # a number of NumPy has `item`
             for key, value in row.items() if not pandas.isna(value)} for row in frame.to_dict(orient="records")]
