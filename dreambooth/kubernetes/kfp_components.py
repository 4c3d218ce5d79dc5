"""Kubeflow Pipelines' side of a stage: what it made becomes parameters and artifacts with metrics.

A container component is told where in its executor input (`{{$}}`): a file for each parameter, a place for each
artifact, and a file for what is said about them.
"""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.utils import atomic_files

MADE_AS = {"Output": "trials"}  # an output's name in the pipeline -> the file of the stage, where they differ
MOUNTED = {"gs://": "/gcs/", "s3://": "/s3/", "minio://": "/minio/"}  # where the launcher sees object stores
PAGE = '<!doctype html><title>dreambooth</title><img alt="contact sheet" src="data:image/png;base64,{picture}">'


def hand_over(executor_input: str, out: Path) -> None:
    """Write a stage's outputs where Kubeflow Pipelines looks for them.

    Raises:
        UserError: the executor input is none.
    """
    try:
        outputs: dict[str, Any] = json.loads(executor_input).get("outputs", {})
    except ValueError as error:
        raise UserError("--kfp takes the executor input of Kubeflow Pipelines: type '{{$}}' in the pipeline") from error
    for name, told in outputs.get("parameters", {}).items():
        made = out / MADE_AS.get(name, name)
        if made.is_file():
            target = Path(told["outputFile"])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made, target)
    said = {name: {"artifacts": [_artifact(name, artifact, out) for artifact in told["artifacts"]]}
            for name, told in outputs.get("artifacts", {}).items()}
    if said and outputs.get("outputFile"):
        atomic_files.write_json(Path(outputs["outputFile"]), {"artifacts": said})


def local(uri: str) -> Path:
    """Where an artifact's address is in the container."""
    for scheme, folder in MOUNTED.items():
        if uri.startswith(scheme):
            return Path(folder + uri.removeprefix(scheme))
    return Path(uri)


def _artifact(name: str, artifact: dict[str, Any], out: Path) -> dict[str, Any]:
    made = {key: artifact[key] for key in ("name", "uri") if key in artifact}
    return made | {"metadata": WRITERS[name](local(artifact["uri"]), out) or {}}


def _metrics(target: Path, out: Path) -> dict[str, float]:
    """Objective and measures of a result: MLMD keeps them, the UI compares them."""
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return {"objective": result["objective"], **result.get("scores", {})}


def _measures(target: Path, out: Path) -> dict[str, float]:
    """What an evaluation says of the exported weights, the last that it looked at."""
    steps: dict[str, dict[str, float]] = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["steps"]
    return steps[max(steps, key=int)]


def _sheet(target: Path, out: Path) -> None:
    """The contact sheet as a page that the UI shows."""
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = out / "contact_sheet.png"
    encoded = base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
    target.write_text(PAGE.format(picture=encoded), encoding="utf-8")


def _model(target: Path, out: Path) -> dict[str, Any]:
    """The promoted model's folder, and what promoted.json says."""
    promoted: dict[str, Any] = json.loads((out / "promoted.json").read_text(encoding="utf-8"))
    shutil.copytree(promoted["model"], target, dirs_exist_ok=True)
    return {key: value for key, value in promoted.items() if isinstance(value, str | int | float)}


WRITERS = {"metrics": _metrics, "measures": _measures, "contact_sheet": _sheet, "model": _model}
