"""Executes the SageMaker Pipeline of a sweep in local mode of the SageMaker SDK. Arguments: IMAGE SPACE OVERRIDES.

container_image.py starts it with a container engine and a local S3 server. It prints one line of JSON: the version of
the SDK, the names of the steps, and the choice that the pipeline has made.
"""

import json
import sys
from importlib.metadata import version

import boto3

from dreambooth.cloud.pipeline_requests import BEST_FILE, CHOOSE
from dreambooth.cloud.sagemaker_pipeline import build_pipeline
from dreambooth.workflows import build_spec, to_sagemaker

BUCKET = "sweeps"
ROLE = "arn:aws:iam::123456789012:role/training"


def main() -> None:
    image, space, *overrides = sys.argv[1:]
    spec = to_sagemaker(build_spec(overrides, space, image))
    build_pipeline(spec)  # imports the SDK, which needs a region to do so
    from sagemaker.mlops.local import LocalPipelineSession

    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    session = LocalPipelineSession(boto_session=boto3.Session())
    pipeline = build_pipeline(spec, session)
    session.create_pipeline(pipeline, "a sweep")
    settings = {"PipelineParameters": {"RoleArn": ROLE, "S3Folder": f"s3://{BUCKET}", "InstanceType": "local",
                                       "ProcessingInstanceType": "local"}}
    execution = session.start_pipeline_execution(pipeline.name, **settings)
    if execution.status != "Succeeded":
        sys.exit(f"the pipeline ended with {execution.status}: {execution.failure_reason}")
    chosen = s3.get_object(Bucket=BUCKET, Key=f"{execution.pipeline_execution_name}/{CHOOSE}/{BEST_FILE}")
    print(json.dumps({"version": version("sagemaker"), "steps": [step.name for step in pipeline.steps],
                      "best": json.loads(chosen["Body"].read())}))


if __name__ == "__main__":
    main()
