"""Runs a training job in local mode of the SageMaker SDK. Arguments: VERSION IMAGE HYPERPARAMETERS PHOTOS FOLDER.

container_image.py calls it in an environment that has the SDK. It prints one line of JSON: the SDK's version, the files
that the job wrote, and how a job with an invalid hyperparameter failed.
"""

import io
import json
import re
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROLE = "arn:aws:iam::123456789012:role/training"


def run_with_sdk_2(image: str, hyperparameters: dict[str, str], photos: str, folder: Path) -> list[str]:
    """Run a job with the Estimator of SDK version 2; return the names of the files in its model archive."""
    import boto3
    from sagemaker.estimator import Estimator
    from sagemaker.local import LocalSession

    s3 = boto3.client("s3")
    if not any(bucket["Name"] == "jobs" for bucket in s3.list_buckets()["Buckets"]):
        s3.create_bucket(Bucket="jobs")
    estimator = Estimator(image_uri=image, role=ROLE, instance_count=1, instance_type="local",
                          hyperparameters=hyperparameters, output_path="s3://jobs/out",
                          sagemaker_session=LocalSession(default_bucket="jobs"))
    estimator.fit({"images": f"file://{photos}"})
    key = estimator.model_data.removeprefix("s3://jobs/")
    with tarfile.open(fileobj=io.BytesIO(s3.get_object(Bucket="jobs", Key=key)["Body"].read())) as archive:
        return archive.getnames()


def run_with_sdk_3(image: str, hyperparameters: dict[str, str], photos: str, folder: Path) -> list[str]:
    """Run a job with the ModelTrainer of SDK version 3; return the paths of the files in its folder."""
    from sagemaker.train import ModelTrainer
    from sagemaker.train.configs import Compute, InputData
    from sagemaker.train.model_trainer import Mode

    trainer = ModelTrainer(
        training_mode=Mode.LOCAL_CONTAINER, training_image=image, role=ROLE, hyperparameters=hyperparameters,
        compute=Compute(instance_type="local_cpu", instance_count=1), local_container_root=str(folder),
        base_job_name="local")
    trainer.train(input_data_config=[InputData(channel_name="images", data_source=photos)])
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


def main() -> None:
    sdk, image, text, photos, folder = sys.argv[1:]
    hyperparameters: dict[str, str] = json.loads(text)
    run: Any = {"2": run_with_sdk_2, "3": run_with_sdk_3}[sdk]
    paths = run(image, hyperparameters, photos, Path(folder))
    expected = ("result.json", "model_index.json")
    files = [name for name in expected if any(Path(path).name == name for path in paths)]
    try:
        run(image, hyperparameters | {"use_ema": "maybe"}, photos, Path(folder))
        failure = ""
    except RuntimeError as error:
        code = re.search(r"Process exited with code: (\d+)", str(error))  # the SDK's message for a failed job
        if code is None:
            raise
        failure = f"{type(error).__name__}, exit code {code[1]}"
    print(json.dumps({"version": version("sagemaker"), "files": files if len(files) == len(expected) else [],
                      "failure": failure}))


if __name__ == "__main__":
    main()
