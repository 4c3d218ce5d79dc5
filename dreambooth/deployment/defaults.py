"""Defaults of a company for endpoints, from the defaults files of the SageMaker SDK: role, VPC, keys and tags."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dreambooth.cloud import sagemaker_sdk
from dreambooth.cloud.sdk_defaults import SOURCE
from dreambooth.deployment.endpoint_requests import Version


@dataclass(frozen=True)
class Defaults:
    """The sections SageMaker.Model, SageMaker.EndpointConfig and SageMaker.Endpoint of the defaults files."""

    model: Mapping[str, Any]
    config: Mapping[str, Any]
    endpoint: Mapping[str, Any]

    @property
    def lines(self) -> tuple[str, ...]:
        """One line per default that is used unless an option replaces it."""
        return (*(f"{SOURCE}: {key}={value}" for key, value in self.model.items()
                  if key in ("ExecutionRoleArn", "VpcConfig", "EnableNetworkIsolation")),
                *(f"{SOURCE}: {key}={value}" for key, value in self.config.items()
                  if key in ("KmsKeyId", "AsyncInferenceConfig")),
                *(f"{SOURCE}: Tags.{key}={value}" for key, value in self._tags.items()))

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
