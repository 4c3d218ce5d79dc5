"""Asks an endpoint that `python -m dreambooth.deploy` made for a picture. Needs boto3 and AWS credentials.

    python examples/endpoint.py toy "a photo of a zwx toy on the beach" toy.png
    python examples/endpoint.py toy "a photo of a zwx toy on the beach" toy.png s3://BUCKET/requests

The last argument is for an endpoint of kind=async: the S3 folder that receives the request.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3

ACCEPT = {"ContentType": "application/json", "Accept": "image/png"}


def ask(endpoint: str, body: dict[str, Any]) -> bytes:
    """Return the picture that a real-time endpoint draws."""
    answer = boto3.client("sagemaker-runtime").invoke_endpoint(EndpointName=endpoint, Body=json.dumps(body), **ACCEPT)
    picture: bytes = answer["Body"].read()
    return picture


def ask_later(endpoint: str, body: dict[str, Any], folder: str, patience: float = 3600.0) -> bytes:
    """Return the picture that an asynchronous endpoint writes to S3, when it is there.

    Args:
        folder: S3 folder that receives the request.
        patience: seconds to wait. The first picture of an endpoint without instances takes minutes.
    """
    s3 = boto3.client("s3")
    place = urlsplit(folder)
    key = f"{place.path.strip('/')}/{time.time_ns()}.json"
    s3.put_object(Bucket=place.netloc, Key=key, Body=json.dumps(body))
    answer = boto3.client("sagemaker-runtime").invoke_endpoint_async(
        EndpointName=endpoint, InputLocation=f"s3://{place.netloc}/{key}", **ACCEPT)
    output, failure = urlsplit(answer["OutputLocation"]), urlsplit(answer["FailureLocation"])
    end = time.monotonic() + patience
    while time.monotonic() < end:
        for address in (output, failure):
            try:
                content: bytes = s3.get_object(Bucket=address.netloc, Key=address.path.lstrip("/"))["Body"].read()
            except s3.exceptions.NoSuchKey:
                continue
            if address == failure:
                sys.exit(f"the endpoint has failed: {content.decode(errors='replace')}")
            return content
        time.sleep(5)
    sys.exit(f"no picture after {patience:.0f} s: {answer['OutputLocation']}")


def main() -> None:
    endpoint, prompt, file, *folder = sys.argv[1:]
    body = {"prompt": prompt, "seed": 1}
    picture = ask_later(endpoint, body, folder[0]) if folder else ask(endpoint, body)
    Path(file).write_bytes(picture)


if __name__ == "__main__":
    main()
