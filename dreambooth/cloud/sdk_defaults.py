"""Defaults of a company for SageMaker's training jobs, from the defaults files of the SageMaker SDK.

The SDK's own TrainingJob.create does not apply them: it looks in a section that its own schema forbids, and continues
without defaults after any error.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from dreambooth.cloud import sagemaker_sdk

CONFIDENTIAL = ("Environment",)  # parts of a request whose values are not printed
SOURCE = "from the defaults of the SageMaker SDK"


def read() -> dict[str, Any]:
    """Return the section SageMaker.TrainingJob of the defaults files. Its keys are those of CreateTrainingJob.

    Raises:
        ConfigError: a file cannot be read, or does not follow the SDK's schema.
    """
    found: dict[str, Any] = (sagemaker_sdk.read_settings().get("SageMaker") or {}).get("TrainingJob") or {}
    return found


def apply(request: Mapping[str, Any], defaults: Mapping[str, Any], *,
          has_own_disk: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Add defaults to a CreateTrainingJob request, wherever the request has no value of its own.

    Tags and environment variables are added one by one, the VPC as a whole.

    Args:
        has_own_disk: whether the instance has a disk of its own, for which SageMaker accepts no VolumeKmsKeyId.

    Returns:
        The new request, and one line per value for the user.
    """
    result, rest = deepcopy(dict(request)), deepcopy(dict(defaults))
    lines: list[str] = []
    if has_own_disk and rest.get("ResourceConfig", {}).pop("VolumeKmsKeyId", None):
        lines.append(f"{SOURCE}: not ResourceConfig.VolumeKmsKeyId, because the instance itself encrypts its own disk")
    typed_tags = {tag["Key"] for tag in result.get("Tags", ())}
    for tag in rest.pop("Tags", ()):
        if tag["Key"] not in typed_tags:
            result.setdefault("Tags", []).append(tag)
            lines.append(f"{SOURCE}: Tags.{tag['Key']}={tag['Value']}")
    for key, value in rest.items():
        if isinstance(value, Mapping) and key != "VpcConfig":
            own = result.get(key, {})
            added = {name: item for name, item in value.items() if name not in own}
            if added:
                result[key] = own | added
            lines += [f"{SOURCE}: {key}.{name}" + ("" if key in CONFIDENTIAL else f"={item}")
                      for name, item in added.items()]
        elif not result.get(key):
            result[key] = value
            lines.append(f"{SOURCE}: {key}={value}")
    return result, tuple(lines)
