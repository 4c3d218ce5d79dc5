"""Requests for pictures: parses and checks the fields of a request. Imports neither torch nor Hydra.

The fields and their defaults are those of `python -m dreambooth.generate`.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from dreambooth.config.generate import parse_size
from dreambooth.errors import UserError

MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARACTERS = 10_000  # of the prompt and of the negative prompt
MAX_GUIDANCE_SCALE = 100.0
MAX_ADAPTER_SCALE = 10.0  # the smallest scale is the negative of it


class InvalidRequest(UserError):
    """A field of a request is wrong; the message is one sentence that names the field and the allowed values."""


@dataclass(frozen=True)
class PictureRequest:
    """The settings of one picture."""

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float | None = None  # None: that of the samples of the adapter's or the model's run
    width: int | None = None  # in pixels; None: the resolution of the adapter's or the model's run
    height: int | None = None
    adapter: str | None = None  # name of an adapter; None: the model as it is, with its own adapter if it has one
    adapter_scale: float = 1.0  # 1: as strong as in training; 0: no effect


@dataclass(frozen=True)
class Limits:
    """The largest values that a request may have."""

    max_side: int = 2048  # pixels
    max_steps: int = 1000
    max_images: int = 16


OWN_FIELDS = tuple(field.name for field in fields(PictureRequest))
FIELDS = (*OWN_FIELDS, "size", "num_images")


def parse(data: Mapping[str, Any], limits: Limits) -> list[PictureRequest]:
    """Return the requests that one JSON object describes: `num_images` of them, of which picture i has seed + i.

    Args:
        data: values by FIELDS. `size` ("512x768") stands for width and height. A value of None means that the field is
            absent.

    Raises:
        InvalidRequest: a field is unknown, missing, of the wrong type or outside of its bounds.
    """
    if unknown := sorted(set(map(str, data)) - set(FIELDS)):
        raise InvalidRequest(f"there is no field {unknown[0]!r}: the fields are {', '.join(FIELDS)}")
    values = {key: value for key, value in data.items() if value is not None}
    if "size" in values:
        if values.keys() & {"width", "height"}:
            raise InvalidRequest("size must be absent if width or height is given")
        values["width"], values["height"] = _size(values.pop("size"))
    count = _integer(values, "num_images", 1, 1, limits.max_images)
    last = MAX_SEED - (count - 1)
    shared = {
        "prompt": _prompt(values, "prompt"), "negative_prompt": _prompt(values, "negative_prompt"),
        "num_inference_steps": _integer(values, "num_inference_steps", 25, 1, limits.max_steps),
        "guidance_scale": _number(values, "guidance_scale", None, 0.0, MAX_GUIDANCE_SCALE),
        "width": _integer(values, "width", None, 1, limits.max_side),
        "height": _integer(values, "height", None, 1, limits.max_side),
        "adapter": _text(values, "adapter"),
        "adapter_scale": _number(values, "adapter_scale", 1.0, -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)}
    if not shared["prompt"]:
        raise InvalidRequest("prompt is missing: it must be a text that says what to draw")
    seed = _integer(values, "seed", 0, 0, last)
    return [PictureRequest(seed=seed + number, **shared) for number in range(count)]


def whole_number(value: Any) -> Any:
    """Return a whole float as an int, because a column of whole numbers that has gaps holds floats.

    Any other value is returned unchanged. So is a whole number that a float cannot hold exactly, which is no valid
    seed.
    """
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def batch_key(request: PictureRequest) -> Hashable:
    """Return a key. Requests with equal keys may be drawn in one batch: they differ in prompt and seed only."""
    return tuple(getattr(request, name) for name in OWN_FIELDS if name not in ("prompt", "seed"))


def _text(values: Mapping[str, Any], key: str) -> str | None:
    text = values.get(key)
    if text is not None and not isinstance(text, str):
        raise InvalidRequest(f"{key} must be a text, not {_shown(text)}")
    if text and len(text) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest(f"{key} must have at most {MAX_PROMPT_CHARACTERS} characters, not {len(text)}")
    return text


def _prompt(values: Mapping[str, Any], key: str) -> str | None:
    text = _text(values, key)
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:  # half a pair of surrogates, which no tokenizer reads
        raise InvalidRequest(f"{key} must be text that UTF-8 can express") from error
    return text


def _integer(values: Mapping[str, Any], key: str, default: Any, low: int, high: int) -> Any:
    value = values.get(key, default)
    if value is not default and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
        raise InvalidRequest(f"{key} must be a whole number from {low} to {high}, not {_shown(value)}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None, low: float, high: float) -> float | None:
    value = values.get(key, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(f"{key} must be a number from {low:g} to {high:g}, not {_shown(value)}")
    return float(value)


def _size(value: Any) -> tuple[int, int]:
    try:
        return parse_size(value if isinstance(value, str) else "")
    except ValueError as error:
        raise InvalidRequest(f"size must be width x height in pixels, such as 512x768, not {_shown(value)}") from error


def _shown(value: Any) -> str:
    """Return a value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
