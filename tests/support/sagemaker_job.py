"""A training job with SageMaker's folder layout, for tests of the entrypoint and of the image."""

import json
import shutil
from pathlib import Path

import dreambooth
from dreambooth.tracking.journal import read

ASSETS = Path(dreambooth.__file__).parent / "assets"
PROMPTS = {"dataset.instance_prompt": "a photo of a zwx toy", "dataset.class_prompt": "a photo of a toy"}
SHORT = PROMPTS | {
    "hardware": "cpu", "model": "tiny", "prior.num_class_images": "4", "prior.num_inference_steps": "2",
    "sample.every": "null", "evaluate.encoder": "none", "tracking": "none"}


def lay_out(base: Path, hyperparameters: dict[str, str], host: str = "algo-1", hosts: tuple[str, ...] = ("algo-1",),
            broken: bool = False) -> None:
    """Write photos and base model as channels, the three files of input/config, and empty output folders."""
    photos = base / "input/data/images"
    photos.mkdir(parents=True, exist_ok=True)
    for picture in sorted((ASSETS / "demo").glob("*.png")):
        shutil.copyfile(picture, photos / picture.name)
    if broken:
        (photos / "broken.png").write_bytes((photos / picture.name).read_bytes()[:200])
    shutil.copytree(ASSETS / "tiny-sd", base / "input/data/base_model", dirs_exist_ok=True)
    for name in ("model", "checkpoints", "output"):
        (base / name).mkdir(exist_ok=True)
    channel = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
    configuration = {
        "hyperparameters": hyperparameters,
        "inputdataconfig": {"images": channel, "base_model": channel},
        "resourceconfig": {"hosts": list(hosts), "current_host": host, "network_interface_name": "lo",
                           "current_instance_type": "ml.m5.large"},
    }
    (base / "input/config").mkdir(parents=True, exist_ok=True)
    for name, content in configuration.items():
        (base / f"input/config/{name}.json").write_text(json.dumps(content), encoding="utf-8")


def failure(base: Path) -> str:
    """The content of output/failure."""
    return (base / "output/failure").read_text(encoding="utf-8")


def steps(base: Path) -> int:
    """Number of steps that the job's run has logged."""
    journals = list((base / "checkpoints").glob("*/metrics.jsonl"))
    return max((entry.get("step", 0) for journal in journals for entry, _ in read(journal)
                if "loss" in entry.get("metrics", ())), default=0)


def weights(base: Path) -> dict[str, bytes]:
    """The content of every weight file of the result and of the last checkpoint."""
    last = sorted((base / "checkpoints").glob("*/checkpoints/step-*"))[-1]
    return {f"{folder.name}/{path.relative_to(folder)}": path.read_bytes()
            for folder in (base / "model/model", last) for path in sorted(folder.rglob("*.safetensors"))}
