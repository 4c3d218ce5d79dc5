"""Asks a server of `python -m dreambooth.serve` for a picture, and shows the progress. Needs the standard library only.

    python examples/serve_client.py http://127.0.0.1:8000 "a photo of a toy" toy.png [ADAPTER]

The token is read from the environment variable DREAMBOOTH_SERVE_TOKEN. If the queue is full, the request is repeated
after the time that the server tells.
"""

import base64
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRIES = 10


def events(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of one picture: its place in the queue, its steps, the picture itself, or an error."""
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("DREAMBOOTH_SERVE_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(f"{url}/v1/images/generations", json.dumps(body | {"stream": True}).encode(),
                                     headers)
    with urllib.request.urlopen(request, timeout=60) as answer:  # a comment every 10 s keeps a waiting stream alive
        for line in answer:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def draw(url: str, body: dict[str, Any]) -> bytes:
    """Return the PNG file of one picture."""
    for _ in range(TRIES):
        try:
            for event in events(url, body):
                if event["type"] == "image_generation.progress":
                    print(f"\rstep {event['step']} of {event['steps']}", end="", flush=True)
                elif event["type"] == "image_generation.completed":
                    print()
                    return base64.b64decode(event["b64_json"])
                elif event["type"] == "error":
                    sys.exit(event["error"]["message"])
        except urllib.error.HTTPError as error:
            message = json.load(error)["error"]["message"]
            if error.code not in (429, 503):
                sys.exit(message)
            print(message)
            time.sleep(int(error.headers["Retry-After"]))
    sys.exit(f"no picture after {TRIES} tries")


def main() -> None:
    url, prompt, file, *adapter = sys.argv[1:]
    body = {"prompt": prompt} | ({"model": adapter[0]} if adapter else {})
    Path(file).write_bytes(draw(url.rstrip("/"), body))
    print(file)


if __name__ == "__main__":
    main()
