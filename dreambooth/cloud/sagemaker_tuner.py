"""Builds the request of a SageMaker hyperparameter tuning job from a search space. SageMaker chooses the trials.

Of a key with numbers, the tuner may try every value from the smallest to the largest, also between the listed ones.
"""

import json
import re
from typing import Any

from dreambooth.cloud.pipeline_requests import SageMakerSpec
from dreambooth.cloud.training_job_request import CHANNELS, OBJECTIVE, JobSettings, build_hyperparameters, build_request
from dreambooth.errors import UserError

EXAMPLE_ROLE, EXAMPLE_S3 = "arn:aws:iam::123456789012:role/NAME", "s3://BUCKET/dreambooth"  # to be replaced by the user
PARALLEL_JOBS = 4
STATIC_PARTS = ("TrainingJobName", "HyperParameters", "Tags")  # of a job's request; the tuner has its own
# A tuning job has one address for the checkpoints of all its jobs. Each job would download those of the other jobs.
NOT_SHARED = ("CheckpointConfig",)


def build_tuning_request(spec: SageMakerSpec, role: str = EXAMPLE_ROLE, s3: str = EXAMPLE_S3,
                         name: str | None = None) -> dict[str, Any]:
    """Return the arguments for a call of SageMaker's CreateHyperParameterTuningJob.

    The tuner minimises the metric `objective`, which it reads from the last line of each run. It may start as many jobs
    as the search space has points. It stops no job early, because a run has an objective only at its end.

    Args:
        role: ARN of the role of the jobs.
        s3: S3 folder for results.
        name: name of the tuning job, and of the sweep in MLflow; None: a name that contains the search space's.

    Raises:
        UserError: the machine has no SageMaker instance type, or no key of the search space has several values.
    """
    instance_type = spec.require_instance_type()
    ranges, fixed = _ranges(spec)
    if not any(ranges.values()):
        raise UserError(f"sweep={spec.space.name} has nothing left to search: leave out an override of its keys")
    name = name or re.sub(r"[^A-Za-z0-9]+", "-", f"sagemaker-{spec.space.name}")[:32].rstrip("-")
    channels = {CHANNELS[key]: value for key, value in spec.input_folders.items()}
    static = build_hyperparameters([*spec.overrides, f"sweep={spec.space.name}", *fixed], channels, name)
    request = build_request(JobSettings(spec.image, role, s3, instance_type), name, name, static, channels,
                            spec.hardware.disk_gib, None)
    definition = {key: value for key, value in request.items() if key not in STATIC_PARTS + NOT_SHARED}
    goal = {"Type": "Minimize", "MetricName": OBJECTIVE}
    return {
        "HyperParameterTuningJobName": name,
        "HyperParameterTuningJobConfig": {
            "Strategy": "Bayesian", "HyperParameterTuningJobObjective": goal, "ParameterRanges": ranges,
            "ResourceLimits": {"MaxNumberOfTrainingJobs": len(spec.space.trials()),
                               "MaxParallelTrainingJobs": PARALLEL_JOBS},
            "TrainingJobEarlyStoppingType": "Off"},
        "TrainingJobDefinition": {"StaticHyperParameters": static, **definition},
        "Tags": request["Tags"]}


def render_tuning_request(spec: SageMakerSpec) -> str:
    """Return the request as JSON, with an example role and an example bucket that the user replaces."""
    return json.dumps(build_tuning_request(spec), indent=1) + "\n"


def _ranges(spec: SageMakerSpec) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Return the ranges of the tuner, and an override for each key of the search space that has one value only."""
    ranges: dict[str, list[dict[str, Any]]] = {
        "IntegerParameterRanges": [], "ContinuousParameterRanges": [], "CategoricalParameterRanges": []}
    fixed = []
    for key, values in spec.space.values.items():
        numbers = spec.space.numbers(key)
        if len(set(numbers or values)) == 1:
            fixed.append(f"{key}={values[0]}")
        elif numbers is None:
            ranges["CategoricalParameterRanges"].append({"Name": key, "Values": list(dict.fromkeys(values))})
        else:
            kind = "Integer" if all(isinstance(number, int) for number in numbers) else "Continuous"
            texts = dict(zip(numbers, values, strict=True))
            smallest, largest = (texts[number].replace("_", "") for number in (min(texts), max(texts)))
            ranges[f"{kind}ParameterRanges"].append({
                "Name": key, "MinValue": smallest, "MaxValue": largest,
                "ScalingType": "Logarithmic" if key in spec.space.logarithmic else "Linear"})
    return {kind: items for kind, items in ranges.items() if items}, fixed
