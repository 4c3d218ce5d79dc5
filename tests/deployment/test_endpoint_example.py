"""examples/endpoint.py asks a real-time and an asynchronous endpoint; botocore checks its requests and answers."""

import json
import runpy
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import ANY, Stubber

from tests.cloud.jobs import ROOT

PROMPT = "a photo of a zwx toy"
HOW = {"EndpointName": "toy", "ContentType": "application/json", "Accept": "image/png"}


@pytest.mark.usefixtures("environment")
def test_the_example_writes_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = {service: boto3.client(service) for service in ("s3", "sagemaker-runtime")}
    monkeypatch.setattr(boto3, "client", clients.__getitem__)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    file = tmp_path / "toy.png"

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["endpoint.py", "toy", PROMPT, str(file), *words])
        runpy.run_path(str(ROOT / "examples/endpoint.py"), run_name="__main__")

    with Stubber(clients["s3"]) as s3, Stubber(clients["sagemaker-runtime"]) as runtime:
        body = json.dumps({"prompt": PROMPT, "seed": 1})
        runtime.add_response("invoke_endpoint", {"Body": BytesIO(b"a picture")}, {**HOW, "Body": body})
        run()
        assert file.read_bytes() == b"a picture"

        answers = {"OutputLocation": "s3://bucket/answers/1.out", "FailureLocation": "s3://bucket/answers/failures/1"}

        def expect_polls(*found: bytes | None) -> None:
            s3.add_response("put_object", {}, {"Bucket": "bucket", "Key": ANY, "Body": body})
            runtime.add_response("invoke_endpoint_async", answers, {**HOW, "InputLocation": ANY})
            for number, content in enumerate(found):
                where: dict[str, Any] = {"Bucket": "bucket", "Key": ("answers/1.out", "answers/failures/1")[number % 2]}
                if content is None:
                    s3.add_client_error("get_object", "NoSuchKey", expected_params=where)
                else:
                    s3.add_response("get_object", {"Body": BytesIO(content)}, where)

        expect_polls(None, None, b"another picture")
        run("s3://bucket/requests")
        assert file.read_bytes() == b"another picture"
        expect_polls(None, b"prompt is missing")
        with pytest.raises(SystemExit, match="the endpoint has failed: prompt is missing"):
            run("s3://bucket/requests")
