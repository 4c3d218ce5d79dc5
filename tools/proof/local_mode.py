"""Run by tools/proof/image.py in an environment of the SageMaker SDK: VERSION IMAGE HYPERPARAMETERS PHOTOS FOLDER.

Prints one line of JSON: what a job in local mode left, and how one with a bad hyperparameter ended.
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


def version_2(image: str, asked: dict[str, str], photos: str, folder: Path) -> list[str]:
    import boto3
    from sagemaker.estimator import Estimator
    from sagemaker.local import LocalSession

    s3 = boto3.client("s3")
    if not any(found["Name"] == "jobs" for found in s3.list_buckets()["Buckets"]):
        s3.create_bucket(Bucket="jobs")
    estimator = Estimator(image_uri=image, role=ROLE, instance_count=1, instance_type="local", hyperparameters=asked,
                          sagemaker_session=LocalSession(default_bucket="jobs"), output_path="s3://jobs/out")
    estimator.fit({"images": f"file://{photos}"})
    key = estimator.model_data.removeprefix("s3://jobs/")
    with tarfile.open(fileobj=io.BytesIO(s3.get_object(Bucket="jobs", Key=key)["Body"].read())) as archive:
        return archive.getnames()


def version_3(image: str, asked: dict[str, str], photos: str, folder: Path) -> list[str]:
    from sagemaker.train import ModelTrainer
    from sagemaker.train.configs import Compute, InputData
    from sagemaker.train.model_trainer import Mode

    trainer = ModelTrainer(
        training_mode=Mode.LOCAL_CONTAINER, training_image=image, role=ROLE, hyperparameters=asked,
        compute=Compute(instance_type="local_cpu", instance_count=1), local_container_root=str(folder),
        base_job_name="local")
    trainer.train(input_data_config=[InputData(channel_name="images", data_source=photos)])
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


def main() -> None:
    kind, image, text, photos, folder = sys.argv[1:]
    asked: dict[str, str] = json.loads(text)
    run: Any = {"2": version_2, "3": version_3}[kind]
    names = run(image, asked, photos, Path(folder))
    wanted = ("result.json", "model_index.json")
    files = [name for name in wanted if any(Path(found).name == name for found in names)]
    try:
        run(image, asked | {"use_ema": "maybe"}, photos, Path(folder))
        refused = ""
    except RuntimeError as error:
        code = re.search(r"Process exited with code: (\d+)", str(error))  # the SDK's words for a job that failed
        if code is None:
            raise
        refused = f"{type(error).__name__}, exit code {code[1]}"
    print(json.dumps({"version": version("sagemaker"), "files": files if len(files) == len(wanted) else [],
                      "refused": refused}))


if __name__ == "__main__":
    main()
