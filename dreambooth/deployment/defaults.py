"""Defaults of a company for endpoints, from the defaults files of the SageMaker SDK: role, VPC, keys and tags."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dreambooth.cloud import sagemaker_sdk
from dreambooth.cloud.sdk_defaults import SOURCE
from dreambooth.deployment.endpoint_requests import Version, answers_key

ANSWERS_KEY = "AsyncInferenceConfig.OutputConfig.KmsKeyId"


@dataclass(frozen=True)
class Defaults:
    """The sections SageMaker.Model, SageMaker.EndpointConfig and SageMaker.Endpoint of the defaults files."""

    model: Mapping[str, Any]
    config: Mapping[str, Any]
    endpoint: Mapping[str, Any]

    def describe(self, version: Version) -> tuple[str, ...]:
        """Return one line per default that the requests of a version contain."""
        defaults = {**{key: self.model.get(key) for key in ("ExecutionRoleArn", "VpcConfig", "EnableNetworkIsolation")},
                    "KmsKeyId": self.config.get("KmsKeyId"), ANSWERS_KEY: answers_key(self.config),
                    **{f"Tags.{key}": value for key, value in self._tags.items()}}
        used = {**version.model, **version.config, ANSWERS_KEY: answers_key(version.config),
                **{f"Tags.{key}": value for key, value in version.tags.items()}}
        return tuple(f"{SOURCE}: {key}={value}" for key, value in defaults.items() if value and used.get(key) == value)

    @property
    def _tags(self) -> dict[str, str]:
        return {tag["Key"]: tag["Value"] for section in (self.model, self.config, self.endpoint)
                for tag in section.get("Tags", ())}

    def add_tags(self, version: Version) -> Version:
        """Return a version with the tags of the defaults files. Tags that the user typed take precedence."""
        return replace(version, tags=self._tags | dict(version.tags))


def read() -> Defaults:
    """Return the sections of the defaults files that concern endpoints.

    Raises:
        ConfigError: a file cannot be read, or does not follow the SDK's schema.
    """
    settings = sagemaker_sdk.read_settings().get("SageMaker") or {}
    return Defaults(*(settings.get(name) or {} for name in ("Model", "EndpointConfig", "Endpoint")))
