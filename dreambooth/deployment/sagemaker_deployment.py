"""The actions of the command `deploy`: create or update a SageMaker endpoint, show it, roll it back, delete it."""

from collections.abc import Callable
from dataclasses import dataclass

from dreambooth.cloud import secrets
from dreambooth.deployment import budget, defaults, instances
from dreambooth.deployment.autoscaler import Autoscaler
from dreambooth.deployment.endpoint_backend import (
    BROKEN,
    FAILED,
    MIXED,
    SERVING,
    EndpointBackend,
    EndpointState,
    StoredVersion,
)
from dreambooth.deployment.endpoint_changes import EndpointChanges
from dreambooth.deployment.endpoint_requests import (
    Version,
    build_endpoint,
    build_update,
    build_version,
    endpoint_name,
    version_name,
)
from dreambooth.deployment.follow import Pace, describe_failure
from dreambooth.deployment.instances import Instance, Predict
from dreambooth.deployment.model_artifact import DeployedModel, find_model
from dreambooth.deployment.options import Action, Deploy
from dreambooth.deployment.serving_need import predict_with_planner, read_server_options
from dreambooth.errors import ConfigError, UserError
from dreambooth.storage import aws_errors
from dreambooth.utils.console import Console

REQUIRED = {"image": "ACCOUNT.dkr.ecr.REGION.amazonaws.com/dreambooth:TAG", "role": "arn:aws:iam::ACCOUNT:role/NAME"}


@dataclass
class Deployment(EndpointChanges):
    """The actions of the command.

    Args:
        predict: returns a function that predicts what a model needs on a machine.
    """

    predict: Callable[[DeployedModel, Deploy], Predict] = predict_with_planner

    def run(self) -> None:
        """Do what the option `action` says."""
        {Action.deploy: self.deploy, Action.status: self.status, Action.rollback: self.rollback,
         Action.delete: self.delete}[self.options.action]()

    # -- deploying --------------------------------------------------------------------------------------------------

    def deploy(self) -> None:
        """Create the endpoint, or update it without downtime, and wait until it serves.

        Raises:
            ConfigError: options are missing, or AWS would reject a request; one line per problem. Nothing was created.
            DoesNotFit: no card holds the model. Nothing was created.
            UserError: AWS refuses something, or the endpoint fails; the message says what exists now.
        """
        options, sections = self.options, defaults.read()
        missing = [key for key in REQUIRED if not getattr(options, key)
                   and not (key == "role" and sections.model.get("ExecutionRoleArn"))]
        problems = [f"{key} is missing: type {key}={REQUIRED[key]}, or set DREAMBOOTH_{key.upper()}" for key in missing]
        if options.is_async and not options.s3:
            problems.append("kind=async writes its answers to S3: type s3=s3://BUCKET/FOLDER, or set DREAMBOOTH_S3")
        problems += find_credentials(options)
        if problems:
            raise ConfigError(*problems)
        read_server_options(options.environment)
        model = find_model(options)
        instance = instances.choose(options, self.predict(model, options))
        for line in (*instances.describe_cost(options, instance), *budget.describe(options, instance)):
            self.say(line)
        version = build_version(options, model.artifact, instance.type, instance.has_own_disk, instance.has_gpu,
                                (sections.model, sections.config), instance.need.memory if instance.need else None)
        version = sections.add_tags(version)
        self._check(version, instance)
        for line in sections.describe(version):
            self.say(line)
        if options.volume_gib and instance.has_own_disk:
            self.say(f"volume_gib is not used: {instance.type} has a disk of its own")
        state = self.settle(self.find_own())
        budget.check_left(options, instance, state)
        self._require_idle(state, version)
        if state is not None:
            self.check_foreign_scaling(state, instance.type, version.scaling)
        for upload in model.uploads:
            upload.run(Console())
        self._bring_up(version, state, instance)
        if options.budget.limits:
            self._keep_budget(instance.usd_hour)

    def _keep_budget(self, usd_hour: float | None) -> None:
        """Wait until the budget is used up, then delete the endpoint and everything that belongs to it.

        If AWS does not answer, or the login has expired, the deletion is repeated until it succeeds.
        """
        with self.reporting("Watching the budget of") as mark:
            mark.exists = True
            limit = budget.watch(self.backend, self.name, self.options.budget, usd_hour, self.pace, self.say)
            self.say(f"{limit}: {self.name} is deleted")
        repeated = False
        while True:
            try:
                return self.delete(missing_ok=repeated)
            except UserError as error:  # as long as the endpoint exists, it costs money
                if error.__cause__ is None or not aws_errors.may_answer_later(error.__cause__):
                    raise
                expired = budget.renew_expired_login(error, self.backend, self.autoscaler)
                problem = str(error).partition(";")[0] if expired else (
                    f"AWS does not answer ({aws_errors.error_code(error.__cause__)})")
                self.say(f"{problem}; deleting {self.name} again in {self.pace.poll_seconds:g} s")
            repeated = True
            self.pace.sleep(self.pace.poll_seconds)

    def _check(self, version: Version, instance: Instance) -> None:
        """Check the requests and the price before anything is uploaded or created."""
        model, config = version.named(self.name, 1)
        endpoint = build_endpoint(self.name, version_name(self.name, 1), version.tags)
        update = build_update(self.name, version_name(self.name, 1), self.options, keeps_instances=True)
        requests = {"model": model, "config": config, "endpoint": endpoint, "update": update}
        problems = [problem for kind, request in requests.items()
                    for problem in self.backend.find_problems(kind, request)]
        problems += instances.find_price_problems(self.options, instance)
        problems += budget.find_problems(self.options, instance)
        if problems:
            raise ConfigError(*dict.fromkeys(problems))

    def _require_idle(self, state: EndpointState | None, version: Version) -> None:
        """Refuse to update an endpoint that others are changing, or whose clients expect another kind of answer."""
        if state is None or state.status in (FAILED, "Deleting"):
            return
        kind = "async" if state.is_async else "realtime"
        if kind != self.options.kind:
            raise UserError(f"the endpoint {self.name} has kind={kind}, and its clients expect answers of this kind: "
                            f"type another name=NAME, or kind={kind}")
        if state.status in SERVING or state.status == MIXED:
            return
        if state.status in BROKEN:
            raise UserError(f"the endpoint {self.name} {describe_failure(state)}; type {self.command(Action.delete)}, "
                            "then this command again")
        versions = {item.name: item for item in self.backend.list_versions(self.name)}
        coming = versions.get(state.pending or state.config)
        if coming is None or coming.digest != version.digest:
            raise UserError(f"the endpoint {self.name} is {state.status}, to {state.pending or state.config}: repeat "
                            f"the command when it is done; {self.command(Action.status)} shows its state")

    def _bring_up(self, version: Version, state: EndpointState | None, instance: Instance) -> None:
        """Make the version, let the endpoint serve it, and set its autoscaling."""
        usd_hour = None if instance.usd_hour is None else instance.usd_hour * self.options.instances
        with self.reporting("Creating" if state is None else "Updating") as mark:
            mark.exists = state is not None
            if state is not None and state.status in (FAILED, "Deleting"):
                self.clear_away(state)
                state, mark.exists = None, False
            stored = self._store(version, state)
            if state is None:
                self.say(f"creating the endpoint {self.name} with {stored.name}")
                self.create(build_endpoint(self.name, stored.name, version.tags), instance.type, mark)
            elif stored.name not in (state.config, state.pending):
                self.update(state, stored, instance.type)
            elif state.pending is None and state.status in SERVING:
                self.say(f"nothing is updated: {self.name} serves these settings already; to read new content of the "
                         "same image= or run=, type +environment.RELEASE=TEXT")
            self.finish(stored, version.scaling, state, usd_hour)
        self._say_how_to_call(stored)

    def _store(self, version: Version, state: EndpointState | None) -> StoredVersion:
        """Create the model and the configuration of a version, and return them.

        The newest version is used again if it was made from the same settings: the command is being repeated.
        """
        versions = self.backend.list_versions(self.name)
        if strange := [item.name for item in versions if not item.belongs_to(self.name)]:
            raise UserError(f"{strange[0]} was not created by dreambooth for the endpoint {self.name}: type another "
                            "name=NAME")
        newest = versions[-1] if versions else None
        current = next((item for item in versions if state is not None and item.name == state.config), None)
        if current is not None and current.digest == version.digest:
            return current
        last = newest.number if newest else 0
        number = last if newest and newest.digest == version.digest else last + 1
        return self.backend.store_version(number, *version.named(self.name, number))

    # -- the other actions ------------------------------------------------------------------------------------------

    def rollback(self) -> None:
        """Let the endpoint serve an earlier version again: the one that served last, or that of the option `to`.

        Raises:
            UserError: there is no endpoint or no such version, or AWS refuses the update.
        """
        state = self.settle(self.require_endpoint()) or self.require_endpoint()
        if state.status not in SERVING:
            raise UserError(f"the endpoint {self.name} "
                            + (describe_failure(state) if state.status in BROKEN else f"is {state.status}")
                            + f": it can be rolled back when it is InService; {self.command(Action.status)}")
        wanted = self._find_rollback(state)
        fleet = self.backend.describe_fleet(wanted.name)
        assert fleet is not None  # it is in the list of configurations
        limit, scaling = self.options.max_usd_hour, wanted.scaling
        self.say(f"{wanted.name}: {instances.describe_fleet(self.options, fleet.instance_type, fleet.count)}")
        price = instances.price_of(self.options, fleet.instance_type)
        if limit is not None and price is None:
            raise ConfigError(instances.describe_unknown_price(fleet.instance_type, limit))
        most = (price or 0) * max(fleet.count, scaling.greatest if scaling else 0)
        if limit is not None and most > limit:
            raise ConfigError(f"{wanted.name} costs up to ${most:.4g} per hour, and max_usd_hour={limit:g}: type a "
                              "higher max_usd_hour")
        usd_hour = None if price is None else price * fleet.count
        self.check_foreign_scaling(state, fleet.instance_type, scaling)
        with self.reporting("Updating") as mark:
            mark.exists = True
            self.update(state, wanted, fleet.instance_type)
            self.finish(wanted, scaling, state, usd_hour)

    def _find_rollback(self, state: EndpointState) -> StoredVersion:
        versions = {item.name: item for item in self.backend.list_versions(self.name)
                    if item.config_tags is not None and item.model_tags is not None and item.belongs_to(self.name)}
        others = [item for name, item in versions.items() if name != state.config]
        known = ", ".join(item.name for item in others) or "none"
        if (to := self.options.to) is not None:
            wanted = versions.get(to) or versions.get(f"{self.name}-{to}") or versions.get(f"{self.name}-v{to}")
            if wanted is None:
                raise UserError(f"there is no version {to} of {self.name}: type to= one of {known}")
            if wanted.name == state.config:
                raise UserError(f"{wanted.name} serves already: type to= one of {known}")
            return wanted
        current = versions.get(state.config)
        served = [item for item in others if item.served and (current is None or item.number < current.number)]
        if not served:
            raise UserError(f"{state.config} is the first version of {self.name} that served: type to=NAME (there are: "
                            f"{known})")
        return max(served, key=lambda item: (item.served, item.number))  # not one from which somebody has gone back

    def status(self) -> None:
        """Print the state of the endpoint, its price, its autoscaling and its versions."""
        state = self.require_endpoint()
        fleet = self.backend.describe_fleet(state.config)
        running = state.instances if state.instances is not None else 0
        self.say(f"{self.name}  {state.status}  {state.config}" + (f" -> {state.pending}" if state.pending else ""))
        if fleet is not None:
            self.say(instances.describe_fleet(self.options, fleet.instance_type, running))
        if state.status in BROKEN:
            self.say(f"{describe_failure(state)}; {self.command(Action.delete)}")
        elif state.reason:
            self.say(f"the last update failed: {state.reason}")
        for version in self.backend.list_versions(self.name):
            note = "serves" if version.name == state.config else (
                f"served from {version.served}" if version.served else "never served")
            self.say(f"{version.name}  {note}" + (f"  {version.scaling.describe()}" if version.scaling else ""))

    def delete(self, *, missing_ok: bool = False) -> None:
        """Delete the endpoint and everything that belongs to it. Files in S3 are kept.

        Args:
            missing_ok: whether it is no error that nothing exists.

        Raises:
            UserError: AWS refuses something; what is left is deleted by the same command.
        """
        state = self.find_own()
        with self.reporting("Deleting") as mark:
            mark.exists = state is not None
            problem: UserError | None = None
            try:
                if self.autoscaler.remove(self.name):
                    self.say(f"autoscaling of {self.name} removed")
            except UserError as error:  # what costs money is deleted all the same
                problem = error
            if state is not None:
                self.delete_endpoint()
                self.say(f"endpoint {self.name} deleted: it costs nothing any more")
                mark.exists = False
            versions = [item for item in self.backend.list_versions(self.name) if item.belongs_to(self.name)]
            for version in versions:
                self.backend.delete_version(version)
        if problem is not None:
            raise problem
        if state is None and not versions and not missing_ok:
            raise UserError(f"there is no endpoint {self.name} of dreambooth in {self.backend.region}: type another "
                            "name=NAME, or set AWS_DEFAULT_REGION")
        self.say(f"{len(versions)} of its versions deleted; its files in S3 are kept")

    def _say_how_to_call(self, stored: StoredVersion) -> None:
        self.say(f"to call it: docs/deployment.md; back to the version before: {self.command(Action.rollback)}; "
                 f"to end its cost: {self.command(Action.delete)}")


def find_credentials(options: Deploy) -> list[str]:
    """Return one sentence for each environment variable or tag that looks like a credential."""
    tags = [{"Key": key, "Value": value} for key, value in options.tags.items()]
    request = {"Environment": options.environment | ({secrets.SECRET_VARIABLE: options.secret} if options.secret else
                                                     {}), "HyperParameters": {}, "Tags": tags}
    return list(secrets.find_credentials(request, option="secret"))


def open_deployment(options: Deploy) -> Deployment:
    """Return the deployment of the command, with connections to AWS.

    Raises:
        UserError: the options do not name the endpoint, boto3 is not installed, or no AWS region is configured.
    """
    if options.name is None:
        if not options.run:
            raise UserError("the endpoint is missing: type name=NAME" + (
                " and run=runs/NAME" if options.action is Action.deploy else ""))
        options = options.copy_with(name=endpoint_name(options.run))
    pace = Pace(options.poll_seconds, options.timeout_minutes)
    return Deployment(options, EndpointBackend(), Autoscaler(), Console().say, pace)
