"""Calls SageMaker for endpoints: describes, creates, updates and deletes them, and translates errors to one sentence.

The boto3 client is called directly, with requests that were checked against botocore's shapes. The SageMaker SDK's
Endpoint.create describes the new endpoint afterwards, and raises the errors of that second call as if the endpoint had
not been created: an endpoint that costs money would be reported as failed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from dreambooth.cloud import request_validation
from dreambooth.deployment.endpoint_requests import (
    DIGEST_TAG,
    OWNER_TAG,
    SCALING_TAG,
    SERVED_TAG,
    Scaling,
    version_number,
)
from dreambooth.errors import UserError
from dreambooth.storage import aws_errors, folders
from dreambooth.storage.s3_bucket import call_with_retries

PAGE = "docs/deployment.md"
OPERATIONS = {"model": "CreateModel", "config": "CreateEndpointConfig", "endpoint": "CreateEndpoint",
              "update": "UpdateEndpoint"}
SERVING = {"InService"}
BUSY = {"Creating", "Updating", "SystemUpdating", "RollingBack"}
FAILED = "Failed"  # such an endpoint can only be deleted
MIXED = "UpdateRollbackFailed"  # such an endpoint serves, partly an old and partly a new version; it can be updated
BROKEN = {FAILED, MIXED, "OutOfService"}
T = TypeVar("T")


@dataclass(frozen=True)
class EndpointState:
    """What SageMaker says about an endpoint."""

    name: str
    arn: str
    status: str
    config: str  # name of the configuration that serves, or was to serve when the endpoint was created
    pending: str | None = None  # name of the configuration to which the endpoint is being updated
    reason: str = ""  # SageMaker's reason of a failure
    instances: int | None = None  # that run
    is_async: bool = False
    created: datetime | None = None


@dataclass(frozen=True)
class StoredVersion:
    """A version of an endpoint that SageMaker keeps: a model, a configuration, or both."""

    number: int
    name: str
    model_tags: Mapping[str, str] | None  # None: there is no model of this name
    config_tags: Mapping[str, str] | None  # None: there is no configuration of this name

    def belongs_to(self, endpoint: str) -> bool:
        """Return whether the tags of what exists say that it belongs to the endpoint."""
        return all(tags is None or tags.get(OWNER_TAG) == endpoint for tags in (self.model_tags, self.config_tags))

    @property
    def digest(self) -> str:
        tags = self.model_tags if self.config_tags is None else self.config_tags
        return (tags or {}).get(DIGEST_TAG, "")

    @property
    def served(self) -> str:
        """When the version last began to serve, as text that can be compared; empty if it never did."""
        return (self.config_tags or {}).get(SERVED_TAG, "")

    @property
    def scaling(self) -> Scaling | None:
        return Scaling.from_tag((self.config_tags or {}).get(SCALING_TAG, ""))


@dataclass(frozen=True)
class Fleet:
    """The instances that a configuration asks for."""

    instance_type: str
    count: int


class EndpointBackend:
    """SageMaker's endpoints of one account and region.

    Args:
        client: boto3's SageMaker client; None: create one.
    """

    def __init__(self, client: Any | None = None) -> None:
        self._client, self._is_own_client = client or folders.client("sagemaker"), client is None
        self._known_tags: dict[str, dict[str, str]] = {}  # ARN -> tags that were read

    def renew_login(self) -> None:
        """Create the client again, because a boto3 client keeps the credentials that it has read once."""
        if self._is_own_client:
            self._client = folders.client("sagemaker")

    @property
    def region(self) -> str:
        return str(self._client.meta.region_name)

    def find_problems(self, kind: str, request: Mapping[str, Any]) -> list[str]:
        """Return the reasons why SageMaker would reject a request, one sentence per reason.

        Args:
            kind: a key of OPERATIONS.
        """
        shape = self._client.meta.service_model.operation_model(OPERATIONS[kind]).input_shape
        return list(request_validation.find_problems(request, shape))

    # -- endpoints --------------------------------------------------------------------------------------------------

    def describe(self, endpoint: str) -> EndpointState | None:
        """Return the state of an endpoint, or None if there is none of this name."""
        found = self._find("sagemaker:DescribeEndpoint", endpoint,
                           lambda: self._client.describe_endpoint(EndpointName=endpoint))
        if found is None:
            return None
        variants = found.get("ProductionVariants", ())
        return EndpointState(
            endpoint, found["EndpointArn"], found["EndpointStatus"], found.get("EndpointConfigName", ""),
            found.get("PendingDeploymentSummary", {}).get("EndpointConfigName"), found.get("FailureReason", ""),
            sum(item.get("CurrentInstanceCount", 0) for item in variants) if variants else None,
            "AsyncInferenceConfig" in found, found.get("CreationTime"))

    def is_owned(self, state: EndpointState) -> bool:
        """Return whether the endpoint was created by this package: it has the tag OWNER_TAG with its own name."""
        return self._tags(state.arn).get(OWNER_TAG) == state.name

    def create_endpoint(self, request: dict[str, Any], instance_type: str) -> None:
        """Create an endpoint. A lost answer is no error if the endpoint exists afterwards with this configuration."""
        name = request["EndpointName"]
        if not self._create("sagemaker:CreateEndpoint", name, lambda: self._client.create_endpoint(**request),
                            instance_type):
            state = self.describe(name)
            if state is None or state.config != request["EndpointConfigName"]:
                raise UserError(f"another command has created the endpoint {name} at the same time: repeat the command")

    def update_endpoint(self, request: dict[str, Any], instance_type: str) -> None:
        """Start an update. A refusal is no error if the endpoint is already being updated to this configuration."""
        name, config = request["EndpointName"], request["EndpointConfigName"]
        try:
            call_service("sagemaker:UpdateEndpoint", name, lambda: self._client.update_endpoint(**request),
                         instance_type)
        except UserError:
            state = self.describe(name)  # the answer to an earlier attempt may have been lost
            if state is None or state.status in SERVING or config not in (state.pending, state.config):
                raise

    def delete_endpoint(self, endpoint: str) -> bool:
        """Start to delete an endpoint. Return False if SageMaker deletes it only when its present change has ended.

        It is no error if there is no endpoint.
        """
        try:
            self._find("sagemaker:DeleteEndpoint", endpoint,
                       lambda: self._client.delete_endpoint(EndpointName=endpoint))
        except UserError as error:
            if error.__cause__ is not None and is_busy(error.__cause__):
                return False
            raise
        return True

    # -- versions ---------------------------------------------------------------------------------------------------

    def store_version(self, number: int, model: dict[str, Any], config: dict[str, Any]) -> StoredVersion:
        """Create the model and the configuration of a version, or find those of an earlier attempt.

        Args:
            model, config: the requests of CreateModel and CreateEndpointConfig.

        Raises:
            UserError: a model or a configuration of this name was made from other settings.
        """
        name = model["ModelName"]
        if not self._create("sagemaker:CreateModel", name, lambda: self._client.create_model(**model)):
            arn = call_service("sagemaker:DescribeModel", name,
                               lambda: self._client.describe_model(ModelName=name))["ModelArn"]
            self._require_same(arn, model)
        if not self._create("sagemaker:CreateEndpointConfig", name,
                            lambda: self._client.create_endpoint_config(**config)):
            arn = call_service("sagemaker:DescribeEndpointConfig", name, lambda: self._client.describe_endpoint_config(
                EndpointConfigName=name))["EndpointConfigArn"]
            tags = self._require_same(arn, config)
        else:
            tags = _tags_in(config)
        return StoredVersion(number, name, _tags_in(model), tags)

    def _require_same(self, arn: str, request: Mapping[str, Any]) -> dict[str, str]:
        """Return the tags of an existing resource; raise UserError if it was not made from this request."""
        tags, own = self._tags(arn), _tags_in(request)
        if any(tags.get(key) != own[key] for key in (OWNER_TAG, DIGEST_TAG)):
            raise UserError(f"{arn.rpartition('/')[2]} exists and was made from other settings, perhaps by another "
                            "command at the same time: repeat the command")
        return tags

    def list_versions(self, endpoint: str) -> list[StoredVersion]:
        """Return all versions with the names of an endpoint's versions, by number."""
        configs = {item["EndpointConfigName"]: item["EndpointConfigArn"] for item in self._list(
            "list_endpoint_configs", "sagemaker:ListEndpointConfigs", "EndpointConfigs", endpoint)}
        models = {item["ModelName"]: item["ModelArn"] for item in self._list(
            "list_models", "sagemaker:ListModels", "Models", endpoint)}
        numbers = {name: number for name in configs.keys() | models.keys()
                   if (number := version_number(endpoint, name)) is not None}
        return [StoredVersion(numbers[name], name, self._tags(models[name]) if name in models else None,
                              self._tags(configs[name]) if name in configs else None)
                for name in sorted(numbers, key=lambda name: numbers[name])]

    def mark_served(self, version: StoredVersion, when: str) -> None:
        """Record when a version began to serve, so that a rollback can find it."""
        arn = call_service("sagemaker:DescribeEndpointConfig", version.name, lambda: (
            self._client.describe_endpoint_config(EndpointConfigName=version.name)))["EndpointConfigArn"]
        call_service("sagemaker:AddTags", version.name, lambda: self._client.add_tags(
            ResourceArn=arn, Tags=[{"Key": SERVED_TAG, "Value": when}]))
        self._known_tags.pop(arn, None)

    def describe_fleet(self, config: str) -> Fleet | None:
        """Return the instances that an endpoint configuration asks for; None if there is no such configuration."""
        found = self._find("sagemaker:DescribeEndpointConfig", config,
                           lambda: self._client.describe_endpoint_config(EndpointConfigName=config))
        if found is None:
            return None
        variants = found["ProductionVariants"]
        return Fleet(variants[0].get("InstanceType", ""), variants[0].get("InitialInstanceCount", 0))

    def delete_version(self, version: StoredVersion) -> None:
        """Delete the configuration and the model of a version. Files in S3 are kept."""
        if version.config_tags is not None:
            self._find("sagemaker:DeleteEndpointConfig", version.name,
                       lambda: self._client.delete_endpoint_config(EndpointConfigName=version.name))
        if version.model_tags is not None:
            self._find("sagemaker:DeleteModel", version.name,
                       lambda: self._client.delete_model(ModelName=version.name))

    # -- calls ------------------------------------------------------------------------------------------------------

    def _tags(self, arn: str) -> dict[str, str]:
        if arn not in self._known_tags:
            found = self._find("sagemaker:ListTags", arn, lambda: self._client.list_tags(ResourceArn=arn))
            self._known_tags[arn] = _tags_in(found or {})
        return self._known_tags[arn]

    def _list(self, operation: str, permission: str, key: str, endpoint: str) -> list[dict[str, Any]]:
        pages = self._client.get_paginator(operation).paginate(NameContains=f"{endpoint}-v")
        return [item for page in call_service(permission, endpoint, lambda: list(pages)) for item in page[key]]

    def _create(self, permission: str, name: str, call: Callable[[], Any], instance_type: str = "") -> bool:
        """Create something. Return False if its name is taken.

        A repeated call creates nothing twice, because names are unique.
        """
        try:
            call_service(permission, name, call, instance_type)
        except UserError as error:
            if error.__cause__ is not None and is_taken(error.__cause__):
                return False
            raise
        return True

    def _find(self, permission: str, name: str, call: Callable[[], T]) -> T | None:
        """Call the service, and return None if what the call names does not exist."""
        try:
            return call_service(permission, name, call)
        except UserError as error:
            if error.__cause__ is not None and is_missing(error.__cause__):
                return None
            raise


def call_service(permission: str, name: str, call: Callable[[], T], instance_type: str = "") -> T:
    """Call AWS, repeat the call after a transient error, and translate other errors to a UserError of one sentence.

    Args:
        permission: the IAM action that the call needs.
        name: the resource of the call.
        instance_type: type of the instances that the call starts, for messages about quotas.
    """
    try:
        return call_with_retries(call, permission, name)
    except UserError as error:
        cause = error.__cause__
        if cause is None:
            raise
        if aws_errors.error_code(cause) in ("ResourceLimitExceeded", "LimitExceededException"):
            what = f"{instance_type} for endpoint usage" if instance_type else "the service of this message"
            text = " ".join(str(cause).split())[:200]
            raise UserError(f"a quota of the account is used up ({text}): request an increase of {what} in Service "
                            "Quotas, or delete an endpoint (an update needs the new and the old instances at once)"
                            ) from cause
        raise UserError(str(error).replace("docs/sagemaker.md", PAGE)) from cause


def is_missing(error: BaseException) -> bool:
    """Return whether an error of SageMaker says that a resource does not exist."""
    return aws_errors.error_code(error) in ("ResourceNotFound", "ResourceNotFoundException") or (
        aws_errors.error_code(error) == "ValidationException" and "could not find" in str(error).lower())


def is_busy(error: BaseException) -> bool:
    """Return whether an error of SageMaker says that an endpoint is being changed."""
    return aws_errors.error_code(error) == "ValidationException" and "in-progress" in str(error).lower()


def is_taken(error: BaseException) -> bool:
    """Return whether an error of SageMaker says that a name is already in use."""
    return aws_errors.error_code(error) in ("ResourceInUse", "ResourceInUseException") or (
        aws_errors.error_code(error) == "ValidationException" and "already exist" in str(error).lower())


def _tags_in(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of a request or of a response as a dictionary."""
    return {tag["Key"]: tag["Value"] for tag in content.get("Tags", ())}
