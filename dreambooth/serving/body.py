"""Reads the body of a request: JSON of a bounded size, in a bounded time."""

import asyncio
import json
from typing import Any

from starlette.requests import Request

from dreambooth.serving.refusals import Refused

BODY_SECONDS = 30.0  # time that a client has to send its body


async def read_json(request: Request, max_body: int) -> Any:
    """Return the JSON value in the body of a request.

    Args:
        max_body: the largest body in bytes. A larger one is not read to its end.

    Raises:
        Refused: the body is too large (413), too slow (408), of another type (415), or not JSON (400).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site cannot send this type without asking first
        raise Refused(415, f"Content-Type must be application/json, not {kind or 'missing'}")
    too_large = Refused(413, f"the body must have at most {max_body} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_body:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_SECONDS:g} s") from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # ValueError: also no UTF-8
        raise Refused(400, f"the body is not JSON ({str(error)[:100]})") from error
