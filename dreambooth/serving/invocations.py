"""The body of POST /invocations: the formats of MLflow and SageMaker, as plain requests."""

import math
from collections.abc import Mapping
from typing import Any

from dreambooth.inference.picture_request import whole_number
from dreambooth.serving.refusals import Refused

FORMATS = ("inputs", "instances", "dataframe_split", "dataframe_records")


def read_rows(data: Any) -> list[dict[str, Any]]:
    """Return the requests in a body, one dictionary per row.

    Raises:
        Refused: the body has none of the known formats (status 422).
    """
    if not isinstance(data, Mapping):
        raise Refused(422, f"the body must be a JSON object with a prompt, or with one of {', '.join(FORMATS)}")
    present = [name for name in FORMATS if name in data]
    if not present:
        return [_drop_missing(data)]
    if len(present) > 1:
        raise Refused(422, f"the body must have only one of {', '.join(present)}")
    [name] = present
    params = data.get("params") or {}
    if not isinstance(params, Mapping):
        raise Refused(422, "params must be an object, such as {\"num_inference_steps\": 30}")
    if unknown := data.keys() - {name, "params"}:
        raise Refused(422, f"{sorted(unknown)[0]} is not known beside {name}")
    rows = _split_rows(data[name]) if name == "dataframe_split" else _rows(data[name], name)
    if not rows:
        raise Refused(422, f"{name} must have one row or more")
    return [_drop_missing(params) | _drop_missing(row) for row in rows]


def _rows(value: Any, name: str) -> list[Mapping[str, Any]]:
    """Return the rows of a list of objects or prompts, of one object, or of an object of lists (columns)."""
    if isinstance(value, str):
        return [{"prompt": value}]
    if isinstance(value, Mapping):
        columns = [column for column in value.values() if isinstance(column, list)]
        if not columns:
            return [value]
        if len(columns) != len(value) or len(set(map(len, columns))) > 1:
            raise Refused(422, f"the lists in {name} must have the same length")
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(value, list):
        raise Refused(422, f"{name} must be a list of objects with a prompt")
    rows: list[Mapping[str, Any]] = [{"prompt": row} if isinstance(row, str) else row for row in value]
    if not all(isinstance(row, Mapping) for row in rows):
        raise Refused(422, f"{name} must be a list of objects with a prompt")
    return rows


def _split_rows(value: Any) -> list[Mapping[str, Any]]:
    columns, data = (value.get("columns"), value.get("data")) if isinstance(value, Mapping) else (None, None)
    if not isinstance(columns, list) or not isinstance(data, list) or not all(
            isinstance(row, list) and len(row) == len(columns) for row in data) or not all(
            isinstance(column, str) for column in columns):
        raise Refused(422, "dataframe_split must have columns, a list of names, and data, a list of rows as long")
    return [dict(zip(columns, row, strict=True)) for row in data]


def _drop_missing(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without its empty cells, which are null or NaN in a data frame.

    A column of whole numbers that has empty cells holds floats. They become whole numbers again.
    """
    return {key: whole_number(value) for key, value in row.items()
            if value is not None and not (isinstance(value, float) and math.isnan(value))}
