"""The bodies of OpenAI's API for images: requests, answers, errors and events of a stream."""

import json
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dreambooth.inference.picture_answer import encode_picture
from dreambooth.inference.picture_request import PictureRequest
from dreambooth.serving.refusals import Refused

NAMES = {"prompt": "prompt", "n": "num_images", "size": "size"}  # OpenAI's keys, and ours
OWN = ("seed", "num_inference_steps", "guidance_scale", "negative_prompt", "adapter_scale", "width", "height")
# Keys of OpenAI's API that choose something that this server does not have, with the values that change nothing.
FIXED = {"response_format": ("b64_json",), "output_format": ("png",), "quality": ("auto", "standard"),
         "style": (), "background": ("auto", "opaque"), "moderation": ("auto",), "output_compression": (100,),
         "partial_images": (0,)}
IGNORED = ("user",)  # says who asks, and changes nothing
KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def read_request(data: Any, base_names: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """Return the request as a dictionary with our keys, and whether the answer is a stream of events.

    Args:
        base_names: names of the model without an adapter.

    Raises:
        Refused: a key is not known, or has a value that this server does not support (status 422).
    """
    if not isinstance(data, Mapping):
        raise Refused(422, 'the body must be a JSON object, such as {"prompt": "a photo of a zwx toy"}')
    ours: dict[str, Any] = {}
    for key, value in data.items():
        if key in FIXED:
            choices = FIXED[key]
            if value is not None and value not in choices:
                rule = f"must be {' or '.join(map(str, choices))}" if choices else "must be left out"
                raise Refused(422, f"{key} {rule}, not {value!r}")
        elif key in NAMES:
            ours[NAMES[key]] = value
        elif key in OWN:
            ours[key] = value
        elif key not in (*IGNORED, "model", "stream"):
            raise Refused(422, f"{key} is not known: the keys are "
                               f"{', '.join(sorted([*NAMES, *OWN, 'model', 'stream', 'response_format']))}")
    if ours.get("size") == "auto":
        del ours["size"]
    model, stream = data.get("model"), data.get("stream")
    if stream not in (None, True, False):
        raise Refused(422, f"stream must be true or false, not {stream!r}")
    if model is not None and not isinstance(model, str):
        raise Refused(422, f"model must be the name of a model, see GET /v1/models, not {model!r}")
    if model is not None and model not in base_names:
        ours["adapter"] = model
    return {key: value for key, value in ours.items() if value is not None}, bool(stream)


def rename_field(sentence: str) -> str:
    """Return a sentence about a wrong field with OpenAI's name of the field, with which the sentence begins."""
    for theirs, ours in NAMES.items():
        if sentence.startswith(f"{ours} "):
            return theirs + sentence.removeprefix(ours)
    return sentence


def answer(requests: Sequence[PictureRequest], files: Sequence[bytes]) -> dict[str, Any]:
    """Return the answer with all pictures of a request."""
    return {"created": int(time.time()), "output_format": "png", "size": _size(files[0]),
            "data": [{"b64_json": encode_picture(file), "seed": request.seed}
                     for request, file in zip(requests, files, strict=True)]}


def error(refusal: Refused) -> dict[str, Any]:
    """Return the answer to a request that is refused."""
    kind = KINDS.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    code = "model_not_found" if refusal.status == 404 else None
    return {"error": {"message": refusal.sentence, "type": kind, "param": None, "code": code}}


def queued(position: int, total: int) -> bytes:
    """Return the event which says how many pictures are before those of this request."""
    return _event("image_generation.queued", {"ahead": position, "pictures": total})


def progress(index: int, done: int, total: int) -> bytes:
    """Return the event of a denoising step."""
    return _event("image_generation.progress", {"index": index, "step": done, "steps": total})


def completed(index: int, request: PictureRequest, file: bytes) -> bytes:
    """Return the event of a finished picture."""
    return _event("image_generation.completed", {
        "index": index, "b64_json": encode_picture(file), "created_at": int(time.time()), "output_format": "png",
        "size": _size(file), "seed": request.seed})


def failed(refusal: Refused) -> bytes:
    """Return the event that ends a stream without its pictures."""
    return _event("error", {"status": refusal.status, **error(refusal)})


def _event(kind: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


def _size(png: bytes) -> str:
    """Return the size of a PNG file, such as 512x768. The file begins with it, after 16 other bytes."""
    width, height = struct.unpack(">II", png[16:24])
    return f"{width}x{height}"
