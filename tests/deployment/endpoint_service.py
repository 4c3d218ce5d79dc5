"""SageMaker's endpoints, Application Auto Scaling and CloudWatch in memory, behind real boto3 clients.

botocore checks the parameters of every call; then `before-call` answers in place of the network. In addition, every
request is checked against the patterns and limits of botocore's model of the service.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from botocore.exceptions import EndpointConnectionError, ReadTimeoutError

from dreambooth.cloud import request_validation
from dreambooth.storage import folders

ACCOUNT = "123456789012"
_clients: dict[str, Any] = {}  # boto3 clients are expensive: each test has a new service behind the same clients
_current: list[Any] = [None]  # the service behind the clients
_request: list[dict[str, Any]] = [{}]  # the parameters of the call that is being made
MISSING = "Could not find {} \"{}\"."


class Refusal(Exception):
    """An error response of AWS."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.code, self.status = code, status


def network_failure() -> BaseException:
    error: BaseException = EndpointConnectionError(endpoint_url="https://api.sagemaker.us-east-1.amazonaws.com/")
    return error


def expired_login() -> BaseException:
    return Refusal("ExpiredTokenException", "The security token included in the request is expired")


def lost_answer() -> BaseException:
    error: BaseException = ReadTimeoutError(endpoint_url="https://api.sagemaker.us-east-1.amazonaws.com/")
    return error


@dataclass
class Fault:
    """What happens at a call instead of, or after, its effect."""

    error: Callable[[], BaseException]
    after: bool = False  # True: the call takes effect, and its answer is lost
    times: int = 1


@dataclass
class EndpointService:
    """The state of an account. Every describe_endpoint moves a changing endpoint one step."""

    steps: int = 2  # descriptions until a change is complete
    outcome: str = ""  # a failure reason: the next change of an endpoint fails with it
    faults: dict[str, list[Fault]] = field(default_factory=dict)  # operation -> faults of its next calls
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    tags: dict[str, dict[str, str]] = field(default_factory=dict)  # ARN -> tags
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    alarms: dict[str, dict[str, Any]] = field(default_factory=dict)
    on_describe: Callable[[], None] = lambda: None

    def client(self, service: str) -> Any:
        """Return a boto3 client whose calls this object answers."""
        _current[0] = self
        if service not in _clients:
            _clients[service] = folders.client(service)
            _clients[service].meta.events.register("provide-client-params", _remember)
            _clients[service].meta.events.register("before-call", _respond)
        return _clients[service]

    def respond(self, model: Any, request: dict[str, Any]) -> Any:
        """Return the HTTP response and the parsed content that answer a call."""
        self.calls.append((model.name, request))
        problems = list(request_validation.find_problems(request, model.input_shape))
        assert problems == [], f"{model.name}: {problems}"
        try:
            return SimpleNamespace(status_code=200, headers={}), self.answer(model.name, request)
        except Refusal as refusal:
            return SimpleNamespace(status_code=refusal.status, headers={}), {
                "Error": {"Code": refusal.code, "Message": str(refusal)},
                "ResponseMetadata": {"HTTPStatusCode": refusal.status}}

    def named(self, *operations: str) -> list[dict[str, Any]]:
        """Return the requests of operations, in order."""
        return [request for operation, request in self.calls if operation in operations]

    def fail(self, operation: str, error: Callable[[], BaseException], *, after: bool = False, times: int = 1) -> None:
        self.faults.setdefault(operation, []).append(Fault(error, after, times))

    def answer(self, operation: str, request: dict[str, Any]) -> dict[str, Any]:
        queue = self.faults.get(operation, [])
        fault = queue[0] if queue else None
        if fault is not None:
            fault.times -= 1
            if not fault.times:
                queue.pop(0)
            if not fault.after:
                raise fault.error()
        result: dict[str, Any] = getattr(self, f"_{operation}")(**request)
        if fault is not None:
            raise fault.error()
        return result

    # -- SageMaker --------------------------------------------------------------------------------------------------

    def _CreateModel(self, ModelName: str, Tags: Any = (), **rest: Any) -> dict[str, Any]:
        return {"ModelArn": self._add(self.models, "model", ModelName, Tags, rest)}

    def _CreateEndpointConfig(self, EndpointConfigName: str, Tags: Any = (), **rest: Any) -> dict[str, Any]:
        for variant in rest["ProductionVariants"]:
            self._require(self.models, "model", variant["ModelName"])
        return {"EndpointConfigArn": self._add(self.configs, "endpoint-config", EndpointConfigName, Tags, rest)}

    def _CreateEndpoint(self, EndpointName: str, EndpointConfigName: str, Tags: Any = ()) -> dict[str, Any]:
        self._require(self.configs, "endpoint configuration", EndpointConfigName)
        arn = self._add(self.endpoints, "endpoint", EndpointName, Tags, {
            "status": "Creating", "config": EndpointConfigName, "pending": None, "reason": "", "left": self.steps})
        return {"EndpointArn": arn}

    def _UpdateEndpoint(self, EndpointName: str, EndpointConfigName: str, **rest: Any) -> dict[str, Any]:
        found = self._require(self.endpoints, "endpoint", EndpointName)
        self._require(self.configs, "endpoint configuration", EndpointConfigName)
        if found["status"] not in ("InService", "UpdateRollbackFailed"):
            raise Refusal("ValidationException", f"Cannot update in-progress endpoint \"{found['arn']}\".")
        kinds = {self._instance_type(name) for name in (found["config"], EndpointConfigName)}
        if len(kinds) > 1 and f"endpoint/{EndpointName}/variant/main" in self.targets:
            raise Refusal("ValidationException", "The variant(s) \"main\" must be deregistered as a scalable target")
        found |= {"status": "Updating", "pending": EndpointConfigName, "left": self.steps, "reason": ""}
        return {"EndpointArn": found["arn"]}

    def _DeleteEndpoint(self, EndpointName: str) -> dict[str, Any]:
        found = self._require(self.endpoints, "endpoint", EndpointName)
        if found["status"] in ("Creating", "Updating"):
            raise Refusal("ValidationException", f"Cannot update in-progress endpoint \"{found['arn']}\".")
        found |= {"status": "Deleting", "left": self.steps}
        return {}

    def _DescribeEndpoint(self, EndpointName: str) -> dict[str, Any]:
        self.on_describe()
        found = self._require(self.endpoints, "endpoint", EndpointName)
        if found["status"] in ("Creating", "Updating", "Deleting"):
            found["left"] -= 1
            if found["left"] < 0:
                self._complete(EndpointName, found)
        found = self._require(self.endpoints, "endpoint", EndpointName)
        config = self.configs.get(found["config"], {"ProductionVariants": [{"InitialInstanceCount": 0}]})
        count = config["ProductionVariants"][0]["InitialInstanceCount"] if found["status"] == "InService" else 0
        now = datetime.now(UTC)
        return {"EndpointName": EndpointName, "EndpointArn": found["arn"], "EndpointStatus": found["status"],
                "EndpointConfigName": found["config"], "CreationTime": now, "LastModifiedTime": now,
                "ProductionVariants": [{"VariantName": "main", "CurrentInstanceCount": count,
                                        "DesiredInstanceCount": count}],
                **({"FailureReason": found["reason"]} if found["reason"] else {}),
                **({"PendingDeploymentSummary": {"EndpointConfigName": found["pending"]}} if found["pending"] else {}),
                **{key: config[key] for key in ("AsyncInferenceConfig",) if key in config}}

    def _complete(self, name: str, found: dict[str, Any]) -> None:
        if found["status"] == "Deleting":
            del self.endpoints[name]
            return
        failed, self.outcome = self.outcome, ""
        if found["status"] == "Creating":
            found |= {"status": "Failed" if failed else "InService", "reason": failed}
        else:
            config = found["config"] if failed else found["pending"] or found["config"]
            found |= {"status": "InService", "config": config, "pending": None, "reason": failed}

    def _DescribeModel(self, ModelName: str) -> dict[str, Any]:
        return {"ModelName": ModelName, "ModelArn": self._require(self.models, "model", ModelName)["arn"]}

    def _DescribeEndpointConfig(self, EndpointConfigName: str) -> dict[str, Any]:
        found = self._require(self.configs, "endpoint configuration", EndpointConfigName)
        return {"EndpointConfigArn": found["arn"], **found}

    def _ListEndpointConfigs(self, NameContains: str, **rest: Any) -> dict[str, Any]:
        return {"EndpointConfigs": [{"EndpointConfigName": name, "EndpointConfigArn": item["arn"]}
                                    for name, item in self.configs.items() if NameContains in name]}

    def _ListModels(self, NameContains: str, **rest: Any) -> dict[str, Any]:
        return {"Models": [{"ModelName": name, "ModelArn": item["arn"]}
                           for name, item in self.models.items() if NameContains in name]}

    def _ListTags(self, ResourceArn: str) -> dict[str, Any]:
        return {"Tags": [{"Key": key, "Value": value} for key, value in self.tags[ResourceArn].items()]}

    def _AddTags(self, ResourceArn: str, Tags: Any) -> dict[str, Any]:
        self.tags[ResourceArn] |= {tag["Key"]: tag["Value"] for tag in Tags}
        return {"Tags": Tags}

    def _DeleteModel(self, ModelName: str) -> dict[str, Any]:
        self._require(self.models, "model", ModelName)
        del self.models[ModelName]
        return {}

    def _DeleteEndpointConfig(self, EndpointConfigName: str) -> dict[str, Any]:
        self._require(self.configs, "endpoint configuration", EndpointConfigName)
        del self.configs[EndpointConfigName]
        return {}

    def _add(self, kept: dict[str, Any], kind: str, name: str, tags: Any, content: dict[str, Any]) -> str:
        if name in kept:
            raise Refusal("ValidationException", f"Cannot create already existing {kind} \"{name}\".")
        arn = f"arn:aws:sagemaker:us-east-1:{ACCOUNT}:{kind}/{name}"
        kept[name] = {**content, "arn": arn}
        self.tags[arn] = {tag["Key"]: tag["Value"] for tag in tags}
        return arn

    def _require(self, kept: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
        if name not in kept:
            raise Refusal("ValidationException", MISSING.format(kind, name))
        found: dict[str, Any] = kept[name]
        return found

    def _instance_type(self, config: str) -> str:
        return str(self.configs[config]["ProductionVariants"][0]["InstanceType"])

    # -- Application Auto Scaling and CloudWatch --------------------------------------------------------------------

    def _RegisterScalableTarget(self, ResourceId: str, Tags: Any = None, **rest: Any) -> dict[str, Any]:
        arn = f"arn:aws:application-autoscaling:us-east-1:{ACCOUNT}:scalable-target/{ResourceId.split('/')[1]}"
        if ResourceId in self.targets and Tags:
            raise Refusal("ValidationException", "Tags can only be specified for a new scalable target")
        if (state := self.endpoints.get(ResourceId.split("/")[1])) is None or state["status"] != "InService":
            raise Refusal("ValidationException", "ECS service doesn't exist")
        self.targets[ResourceId] = self.targets.get(ResourceId, {}) | rest | {"ScalableTargetARN": arn}
        self.tags.setdefault(arn, {}).update(Tags or {})
        return {"ScalableTargetARN": arn}

    def _DescribeScalableTargets(self, ResourceIds: list[str], **rest: Any) -> dict[str, Any]:
        return {"ScalableTargets": [self.targets[item] for item in ResourceIds if item in self.targets]}

    def _ListTagsForResource(self, ResourceARN: str) -> dict[str, Any]:
        return {"Tags": self.tags[ResourceARN]}

    def _DeregisterScalableTarget(self, ResourceId: str, **rest: Any) -> dict[str, Any]:
        if ResourceId not in self.targets:
            raise Refusal("ObjectNotFoundException", "No scalable target found")
        del self.targets[ResourceId]
        self.policies.clear()
        return {}

    def _PutScalingPolicy(self, PolicyName: str, ResourceId: str, **rest: Any) -> dict[str, Any]:
        if ResourceId not in self.targets:
            raise Refusal("ObjectNotFoundException", "No scalable target registered")
        self.policies[PolicyName] = rest
        return {"PolicyARN": f"arn:aws:autoscaling:us-east-1:{ACCOUNT}:scalingPolicy:1:policyName/{PolicyName}"}

    def _PutMetricAlarm(self, AlarmName: str, **rest: Any) -> dict[str, Any]:
        self.alarms[AlarmName] = rest
        return {}

    def _DescribeAlarms(self, AlarmNames: list[str]) -> dict[str, Any]:
        return {"MetricAlarms": [{"AlarmName": name, **self.alarms[name]} for name in AlarmNames
                                 if name in self.alarms]}

    def _DeleteAlarms(self, AlarmNames: list[str]) -> dict[str, Any]:
        for name in AlarmNames:
            del self.alarms[name]
        return {}


def _remember(params: dict[str, Any], **more: Any) -> None:
    _request[0] = dict(params)


def _respond(model: Any, **more: Any) -> Any:
    return _current[0].respond(model, _request[0])
