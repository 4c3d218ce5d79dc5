"""Serves a model in local mode of the SageMaker SDK, with the requests of `dreambooth.deploy`. Arguments: IMAGE FOLDER.

container_image.py starts it with a container engine. FOLDER is the folder of a model. The script prints one line of
JSON: the version of the SDK, the seconds until the container answered /ping, and the size of the picture that it drew.
"""

import io
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.deployment.endpoint_requests import Artifact, build_version
from dreambooth.deployment.options import Deploy

ROLE = "arn:aws:iam::123456789012:role/serving"
NAME = "toy"
PROMPT = "a photo of a zwx toy"


def to_local(model: dict[str, Any], config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the requests with what local mode lacks replaced: folders in S3, and instances."""
    container = {key: value for key, value in model["PrimaryContainer"].items() if key != "ModelDataSource"}
    variants = [{**variant, "InstanceType": "local"} for variant in config["ProductionVariants"]]
    return ({"ModelName": model["ModelName"], "PrimaryContainer": container | {"ModelDataUrl": folder.as_uri()}},
            {"EndpointConfigName": config["EndpointConfigName"], "ProductionVariants": variants})


def main() -> None:
    image, text = sys.argv[1:]
    folder = Path(text).absolute()
    environment = {"DREAMBOOTH_SERVE_MAX_STEPS": "5"}
    options = Deploy(name=NAME, image=image, role=ROLE, environment=environment)
    version_requests = build_version(options, Artifact("s3://bucket/model"), "ml.g4dn.xlarge", True, False)
    model, config = to_local(*version_requests.named(NAME, 1), folder)
    from sagemaker.core.local.local_session import LocalSession

    session = LocalSession()
    client, runtime = session.sagemaker_client, session.sagemaker_runtime_client
    client.create_model(**model)
    client.create_endpoint_config(**config)
    start = time.monotonic()
    client.create_endpoint(NAME, config["EndpointConfigName"])
    seconds = time.monotonic() - start
    try:
        def ask(steps: int) -> Any:
            body = json.dumps({"prompt": PROMPT, "seed": 1, "num_inference_steps": steps})
            return runtime.invoke_endpoint(body, NAME, "application/json", "image/png")["Body"].read()

        picture = Image.open(io.BytesIO(ask(3)))
        refusal = ask(6)  # more than the environment variable of the request allows
    finally:
        client.delete_endpoint(NAME)
    assert b"num_inference_steps" in refusal, refusal
    print(json.dumps({"version": version("sagemaker"), "seconds": round(seconds), "format": picture.format,
                      "size": list(picture.size), "prompt": PROMPT in json.dumps(picture.info)}))


if __name__ == "__main__":
    main()
