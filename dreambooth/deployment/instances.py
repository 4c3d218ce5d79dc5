"""Chooses the instance of an endpoint from the presets in conf/hardware, and says what it costs before it is created.

A preset's price is the on-demand price of training. For these types AWS's lists have the same price for endpoints, as
far as public repositories quote them; it was not checked on AWS.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dreambooth.config.hardware import Hardware, presets
from dreambooth.deployment.endpoint_requests import INVOCATION_SECONDS
from dreambooth.deployment.options import Deploy
from dreambooth.errors import ConfigError, DoesNotFit

AUTO = "auto"
HOURS_A_MONTH = 730


@dataclass(frozen=True)
class Need:
    """What serving a model needs on a card, as the planner predicts it."""

    gib: float  # of the card
    picture_seconds: float | None = None  # for one picture with the default number of steps; None: unknown
    host_gib: float = 0.0
    memory: tuple[str, ...] = ()  # memory options of the server that make it fit
    exact: bool = True  # whether these options leave the pictures as they are


Predict = Callable[[Hardware], Need | None]  # None: the model cannot be planned


@dataclass(frozen=True)
class Instance:
    """The instance type of an endpoint."""

    type: str
    usd_hour: float | None  # on demand; None: unknown
    has_gpu: bool
    has_own_disk: bool
    need: Need | None = None
    card: str | None = None


def machines() -> list[Hardware]:
    """Return the machines of conf/hardware with a SageMaker instance type and a price, the cheapest first."""
    known = [machine for machine in presets().values() if machine.instance_type and machine.price_usd_hour is not None]
    return sorted(known, key=lambda machine: machine.price_usd_hour or 0.0)


def find_machine(instance_type: str) -> Hardware | None:
    """Return the machine of conf/hardware with an instance type; None if there is none."""
    return next((machine for machine in machines() if machine.instance_type == instance_type), None)


def choose(options: Deploy, predict: Predict) -> Instance:
    """Return the instance that the options ask for. For instance=auto, the cheapest whose card holds the model.

    Raises:
        ConfigError: instance=auto, and the model cannot be planned.
        DoesNotFit: no card, or not the card of the typed instance, holds the model.
    """
    if options.instance != AUTO:
        preset = find_machine(options.instance)
        need = predict(preset) if preset else None
        if preset and need and not _holds(preset, need):
            raise DoesNotFit(f"drawing with this model needs {need.gib:.1f} GiB and {preset.gpu or 'the machine'} of "
                             f"{options.instance} has {preset.usable_vram_gib:g}: type instance=auto")
        return _instance(options, options.instance, preset, need)
    inexact: tuple[Hardware, Need] | None = None  # the cheapest machine that only such options make large enough
    largest: tuple[Hardware, Need] | None = None
    for preset in machines():
        need = predict(preset)
        if need is None:
            raise ConfigError("the memory of this model cannot be predicted here: type instance=TYPE, such as "
                              "instance=ml.g5.xlarge")
        if _holds(preset, need):
            if need.exact:
                return _instance(options, preset.instance_type or "", preset, need)
            inexact = inexact or (preset, need)
        if largest is None or (preset.usable_vram_gib or 0) > (largest[0].usable_vram_gib or 0):
            largest = preset, need
    if inexact is not None:
        return _instance(options, inexact[0].instance_type or "", *inexact)
    assert largest is not None
    preset, need = largest
    raise DoesNotFit(f"drawing with this model needs {need.gib:.1f} GiB and the largest card of conf/hardware, "
                     f"{preset.gpu}, has {preset.usable_vram_gib:g}: type instance=TYPE with a larger card, or a "
                     "smaller size=WIDTHxHEIGHT")


def find_price_problems(options: Deploy, instance: Instance) -> Iterator[str]:
    """Yield a sentence if the endpoint may cost more per hour than max_usd_hour."""
    limit = options.max_usd_hour
    if limit is None:
        return
    if instance.usd_hour is None:
        yield describe_unknown_price(instance.type, limit)
        return
    first, most = options.instances * instance.usd_hour, greatest_count(options) * instance.usd_hour
    if most > limit:
        reason = f"autoscaling may run {greatest_count(options)} x {instance.type}, ${most:.4g} per hour"
        if first > limit:
            reason = f"{options.instances} x {instance.type} costs ${first:.4g} per hour"
        yield (f"{reason}, above max_usd_hour={limit:g}: type a higher max_usd_hour, fewer instances, or another "
               "instance=TYPE")


def describe_unknown_price(instance_type: str, limit: float) -> str:
    return (f"the price of {instance_type} is not known, so max_usd_hour={limit:g} cannot be kept: type "
            "price_usd_hour=PRICE")


def greatest_count(options: Deploy) -> int:
    """Return the largest number of instances that the endpoint may have, apart from updates."""
    return max(options.instances, options.scaling[1] if options.scaling else 0)


def describe_cost(options: Deploy, instance: Instance) -> Iterator[str]:
    """Yield what the endpoint costs and why this instance was chosen, one line each."""
    if (need := instance.need) is not None and instance.card:
        seconds = "" if need.picture_seconds is None else f", about {need.picture_seconds:.1f} s per picture"
        memory = f", with {' and '.join(need.memory)}" if need.memory else ""
        changed = "" if need.exact else ", which changes the pictures a little"
        yield (f"{instance.type}: drawing needs {need.gib:.1f} GiB on its {instance.card}{memory}{changed}{seconds} "
               "(prediction)")
        longest = INVOCATION_SECONDS[options.kind]
        if need.picture_seconds is not None and need.picture_seconds > longest:
            yield (f"AWS ends a request after {longest} s, and one picture takes about {need.picture_seconds:.0f} s: "
                   + ("type kind=async, which allows an hour" if not options.is_async else "type a faster instance="))
    price = instance.usd_hour
    if price is None:
        yield f"{options.instances} x {instance.type}, price unknown: type price_usd_hour=PRICE to see the cost"
        return
    first, most = options.instances * price, greatest_count(options) * price
    yield (f"{options.instances} x {instance.type} at ${price:.4g}/h: ${first:.4g} per hour, "
           f"${first * HOURS_A_MONTH:,.0f} per month, as long as the endpoint exists")
    if (limits := options.scaling) is not None:
        least = limits[0] * price
        yield (f"autoscaling: {limits[0]} to {limits[1]} instances, ${least:.4g} to ${most:.4g} per hour"
               + ("; without requests it costs nothing" if not limits[0] else ""))


def price_of(options: Deploy, instance_type: str) -> float | None:
    """Return the price per hour of an instance: the typed one, or else that of conf/hardware; None: unknown."""
    if options.price_usd_hour is not None:
        return options.price_usd_hour
    preset = find_machine(instance_type)
    return None if preset is None else preset.price_usd_hour


def describe_fleet(options: Deploy, instance_type: str, count: int) -> str:
    """Return how many instances there are, and what they cost per hour."""
    price = price_of(options, instance_type)
    cost = "price unknown: type price_usd_hour=PRICE" if price is None else f"${price * count:.4g} per hour"
    return f"{count} x {instance_type}, {cost}"


def _holds(preset: Hardware, need: Need) -> bool:
    return (preset.usable_vram_gib is None or need.gib <= preset.usable_vram_gib) and (
        preset.host_ram_gib is None or need.host_gib <= preset.host_ram_gib)


def _instance(options: Deploy, kind: str, preset: Hardware | None, need: Need | None) -> Instance:
    # An unknown type of a family with a letter for GPUs has a GPU; only such types need another driver.
    has_gpu = preset.gpu is not None if preset else kind.startswith(("ml.g", "ml.p"))
    has_disk = preset.disk_gib is not None if preset else kind.startswith(("ml.g4", "ml.g5", "ml.g6", "ml.p4", "ml.p5"))
    return Instance(kind, price_of(options, kind), has_gpu, has_disk, need, preset.gpu if preset else None)
