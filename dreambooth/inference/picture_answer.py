"""The answer for one picture, as the MLflow model and the server give it. Imports neither torch nor Pillow."""

import base64
import json
import struct
from typing import Any


def encode_picture(png: bytes) -> str:
    """Return a PNG file as base64 text."""
    return base64.b64encode(png).decode("ascii")


def prediction(png: bytes) -> dict[str, Any]:
    """Return the answer for one picture: the file, and the settings that it contains."""
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
