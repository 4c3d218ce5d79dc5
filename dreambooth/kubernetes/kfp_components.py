"""Passes the results of a stage to Kubeflow Pipelines: output parameters, and artifacts with metadata.

In a pipeline, a stage is a container component. Kubeflow Pipelines passes to it the executor input (`{{$}}`), a JSON
string that contains a file name for each output parameter, a URI for each artifact, and a file name for the metadata of
all artifacts.
"""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.utils import atomic_files

OUTPUT_FILES = {"Output": "trials"}  # output parameter -> the stage's output file, if the names differ
MOUNT_POINTS = {"gs://": "/gcs/", "s3://": "/s3/", "minio://": "/minio/"}  # where KFP mounts object stores
HTML_PAGE = '<!doctype html><title>dreambooth</title><img alt="contact sheet" src="data:image/png;base64,{picture}">'


def write_outputs(executor_input: str, stage_folder: Path) -> None:
    """Write the outputs of a stage to the files that Kubeflow Pipelines reads.

    Args:
        executor_input: the JSON string that Kubeflow Pipelines substitutes for `{{$}}`.
        stage_folder: folder with the output files that the stage has written.

    Raises:
        UserError: the executor input is not JSON.
    """
    try:
        outputs: dict[str, Any] = json.loads(executor_input).get("outputs", {})
    except ValueError as error:
        raise UserError("--kfp takes the executor input of Kubeflow Pipelines: type '{{$}}' in the pipeline") from error
    for name, parameter in outputs.get("parameters", {}).items():
        source = stage_folder / OUTPUT_FILES.get(name, name)
        if source.is_file():
            target = Path(parameter["outputFile"])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    artifacts = {
        name: {"artifacts": [_write_artifact(name, artifact, stage_folder) for artifact in output["artifacts"]]}
        for name, output in outputs.get("artifacts", {}).items()}
    if artifacts and outputs.get("outputFile"):
        atomic_files.write_json(Path(outputs["outputFile"]), {"artifacts": artifacts})


def to_local_path(uri: str) -> Path:
    """Return an artifact's path inside the container, where Kubeflow Pipelines mounts the object store of `uri`."""
    for scheme, folder in MOUNT_POINTS.items():
        if uri.startswith(scheme):
            return Path(folder + uri.removeprefix(scheme))
    return Path(uri)


def _write_artifact(name: str, artifact: dict[str, Any], stage_folder: Path) -> dict[str, Any]:
    entry = {key: artifact[key] for key in ("name", "uri") if key in artifact}
    return entry | {"metadata": WRITERS[name](to_local_path(artifact["uri"]), stage_folder) or {}}


def _read_result_metrics(target: Path, stage_folder: Path) -> dict[str, float]:
    """Return the objective and scores of a run as metadata, so that the Kubeflow UI can compare runs."""
    result = json.loads((stage_folder / "result.json").read_text(encoding="utf-8"))
    return {"objective": result["objective"], **result.get("scores", {})}


def _read_evaluation_metrics(target: Path, stage_folder: Path) -> dict[str, float]:
    """Return scores from evaluation.json as metadata, by name.

    These are the scores of the step whose weights the run exported. If this step was not evaluated, they are the scores
    of the last evaluated step.
    """
    evaluation = json.loads((stage_folder / "evaluation.json").read_text(encoding="utf-8"))
    steps: dict[str, dict[str, float]] = evaluation["steps"]
    result = atomic_files.read_object(stage_folder / "result.json") or {}
    exported = result.get("step") if result.get("exported_step") is None else result["exported_step"]
    return steps.get(str(exported)) or steps[max(steps, key=int)]


def _write_contact_sheet(target: Path, stage_folder: Path) -> None:
    """Write the contact sheet as an HTML page, which the Kubeflow UI can display."""
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = stage_folder / "contact_sheet.png"
    encoded = base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
    target.write_text(HTML_PAGE.format(picture=encoded), encoding="utf-8")


def _write_model(target: Path, stage_folder: Path) -> dict[str, Any]:
    """Copy the promoted model to `target`. Return the strings and numbers in promoted.json as metadata."""
    promoted: dict[str, Any] = json.loads((stage_folder / "promoted.json").read_text(encoding="utf-8"))
    shutil.copytree(promoted["model"], target, dirs_exist_ok=True)
    return {key: value for key, value in promoted.items() if isinstance(value, str | int | float)}


WRITERS = {  # artifact -> function that writes the artifact's file, if there is one, and returns the metadata
    "metrics": _read_result_metrics, "measures": _read_evaluation_metrics, "contact_sheet": _write_contact_sheet,
    "model": _write_model}
