"""The options of `python -m dreambooth.deploy`. Imports neither torch nor Hydra."""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from dreambooth.config.hardware import Budget
from dreambooth.config.section import Section, finite, require
from dreambooth.config.storage import is_s3_folder

NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,39}")  # the name of a version, NAME-v12, is longer; AWS allows 63
SIZE = re.compile(r"0*([89]|[1-9]\d{1,4})x0*([89]|[1-9]\d{1,4})")  # the least side is that of the server's max_side
DEFAULT_CONCURRENT = 4
SERVERLESS = (
    "kind=serverless cannot draw pictures: AWS's Serverless Inference offers no GPU, at most 6144 MB of memory, and 60 "
    "seconds per request (docs.aws.amazon.com/sagemaker/latest/dg/serverless-endpoints.html): type kind=async, which "
    "also costs nothing while it is idle, or kind=realtime")


class Target(StrEnum):
    """Where a model is deployed."""

    sagemaker = "sagemaker"


class Action(StrEnum):
    """What the command does with the endpoint."""

    deploy = "deploy"
    status = "status"
    rollback = "rollback"
    delete = "delete"


class Kind(StrEnum):
    """Kind of the endpoint: answers in the response, or in S3. `serverless` exists only to be refused with a reason."""

    realtime = "realtime"
    asynchronous = "async"
    serverless = "serverless"


class ScaleOn(StrEnum):
    """What the number of instances of a real-time endpoint follows."""

    concurrency = "concurrency"
    invocations = "invocations"


@dataclass
class Deploy(Section):
    """Options of `python -m dreambooth.deploy`; conf/deploy.yaml explains each key."""

    target: Target = Target.sagemaker
    action: Action = Action.deploy
    name: str | None = None
    run: str | None = None
    base: str | None = None
    adapters: str | None = None
    uri: str | None = None
    kind: str = "realtime"  # a Kind; Hydra's enums are compared by their Python names, and `async` cannot be one
    to: str | None = None
    image: str | None = None
    role: str | None = None
    s3: str | None = None
    instance: str = "auto"
    size: str | None = None
    price_usd_hour: float | None = None
    max_usd_hour: float | None = None
    instances: int = 1
    max_instances: int | None = None
    scale_on: ScaleOn = ScaleOn.concurrency
    scale_target: float | None = None
    idle_minutes: int = 10
    concurrent: int = DEFAULT_CONCURRENT
    success_topic: str | None = None
    error_topic: str | None = None
    rollback_alarms: list[str] = field(default_factory=list)
    bake_minutes: int = 5
    canary_percent: int | None = None
    inference_ami: str | None = None
    volume_gib: int | None = None
    download_minutes: int = 30
    startup_minutes: int = 15
    subnets: list[str] = field(default_factory=list)
    security_groups: list[str] = field(default_factory=list)
    kms_key: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    secret: str | None = None
    poll_seconds: float = 15.0
    timeout_minutes: float = 60.0
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        if self.kind == Kind.serverless:
            raise ValueError(SERVERLESS)
        kinds = [kind.value for kind in Kind]
        top = self.max_instances
        require("", {
            "kind": (self.kind in kinds, f"realtime or async, not {self.kind}"),
            "name": (self.name is None or NAME.fullmatch(self.name) is not None,
                     f"1 to 40 letters, digits and single hyphens, not {self.name}"),
            "adapters": (self.adapters is None or is_s3_folder(self.adapters),
                         f"s3://BUCKET/FOLDER, a folder of adapters, not {self.adapters}"),
            "s3": (self.s3 is None or is_s3_folder(self.s3), f"s3://BUCKET/FOLDER, not {self.s3}"),
            "size": (self.size is None or SIZE.fullmatch(self.size) is not None,
                     f"WIDTHxHEIGHT in pixels, 8 or more, such as 1024x1024, not {self.size}"),
            "price_usd_hour": (self.price_usd_hour is None or finite(self.price_usd_hour, 0),
                               f"0 or more, not {self.price_usd_hour}"),
            "max_usd_hour": (self.max_usd_hour is None or finite(self.max_usd_hour, 0),
                             f"0 or more, not {self.max_usd_hour}"),
            "instances": (self.instances >= 1, f"1 or more, not {self.instances}"),
            "max_instances": (top is None or top >= self.instances,
                              f"at least instances={self.instances}, or null, not {top}"),
            "scale_target": (self.scale_target is None or finite(self.scale_target, 0.1),
                             f"0.1 or more, not {self.scale_target}"),
            "idle_minutes": (1 <= self.idle_minutes <= 1440, f"from 1 to 1440, not {self.idle_minutes}"),
            "bake_minutes": (0 <= self.bake_minutes <= 60, f"from 0 to 60, not {self.bake_minutes}"),
            "canary_percent": (self.canary_percent is None or 1 <= self.canary_percent <= 50,
                               f"from 1 to 50, or null, not {self.canary_percent}"),
            "volume_gib": (self.volume_gib is None or 1 <= self.volume_gib <= 512,
                           f"from 1 to 512, or null, not {self.volume_gib}"),
            "download_minutes": (1 <= self.download_minutes <= 60, f"from 1 to 60, not {self.download_minutes}"),
            "startup_minutes": (1 <= self.startup_minutes <= 60, f"from 1 to 60, not {self.startup_minutes}"),
            "subnets": (bool(self.subnets) == bool(self.security_groups), "set together with security_groups"),
            "poll_seconds": (finite(self.poll_seconds, 1, 600), f"from 1 to 600, not {self.poll_seconds}"),
            "timeout_minutes": (finite(self.timeout_minutes, 1, 1440), f"from 1 to 1440, not {self.timeout_minutes}"),
            "to": (self.to is None or self.action is Action.rollback, "null unless action=rollback"),
            "scale_on": (not self.is_async or self.scale_on is ScaleOn.concurrency,
                         "left out with kind=async, which follows the waiting requests"),
            "concurrent": ((1 <= self.concurrent <= 1000) if self.is_async else self.concurrent == DEFAULT_CONCURRENT,
                           f"from 1 to 1000 with kind=async, and else left out, not {self.concurrent}"),
            "success_topic": (self.success_topic is None or self.is_async, "null unless kind=async"),
            "budget": (not self.budget.limits or self.action is Action.deploy, "left out unless action=deploy"),
            "error_topic": (self.error_topic is None or self.is_async, "null unless kind=async"),
        })

    @property
    def is_async(self) -> bool:
        return self.kind == Kind.asynchronous

    @property
    def sides(self) -> tuple[int, int] | None:
        """Width and height of the option `size` in pixels; None without it."""
        if self.size is None:
            return None
        width, height = map(int, self.size.split("x"))
        return width, height

    @property
    def scaling(self) -> tuple[int, int] | None:
        """The least and the greatest number of instances of autoscaling; None without autoscaling.

        An asynchronous endpoint always scales, between no instance and at least `instances`.
        """
        if self.is_async:
            return 0, self.max_instances or self.instances
        return None if self.max_instances is None else (self.instances, self.max_instances)
