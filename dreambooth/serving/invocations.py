"""The body of POST /invocations: the formats of MLflow and SageMaker, as plain requests."""

import base64
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

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


def encode_picture(png: bytes) -> str:
    """Return a PNG file as base64 text."""
    return base64.b64encode(png).decode("ascii")


def prediction(png: bytes) -> dict[str, Any]:
    """Return the answer for one picture, as the MLflow model gives it: the file, and the settings that it contains."""
    return {"image": encode_picture(png), "metadata": _read_settings(png)}


def _read_settings(png: bytes) -> Any:
    """Return the JSON value of the text `dreambooth` in a PNG file; {} if there is none."""
    place = 8  # after the signature
    while place + 8 <= len(png):
        length, kind = struct.unpack(">I4s", png[place:place + 8])
        keyword, _, text = png[place + 8:place + 8 + length].partition(b"\0")
        if kind == b"tEXt" and keyword == b"dreambooth":
            return json.loads(text)
        place += 12 + length  # with the length, the kind and the checksum
    return {}


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
    return {key: int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value
            for key, value in row.items()
            if value is not None and not (isinstance(value, float) and math.isnan(value))}
