"""The config groups `hardware`, the machine of a run, and `budget`, what the machine may cost.

Imports neither torch nor Hydra.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache

import yaml

from dreambooth.config.enums import Device
from dreambooth.config.section import Section, finite, require
from dreambooth.utils.assets import conf_dir
from dreambooth.utils.plurals import counted


@dataclass
class Hardware(Section):
    """The machine that a run is planned for. Sizes are in GiB (2**30 bytes), prices in US dollars per hour."""

    name: str = "local"
    device: Device = Device.local
    gpu: str | None = None
    gpus: int = 1
    usable_vram_gib: float | None = None
    compute_capability: float | None = None
    instance_type: str | None = None
    price_usd_hour: float | None = None
    spot_price_usd_hour: float | None = None
    host_ram_gib: float | None = None
    disk_gib: float | None = None
    node_selector: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require("hardware", {"gpus": (self.gpus >= 1, f"1 or more, not {self.gpus}")})


@dataclass
class Budget(Section):
    """The limits of a run, of all runs of a sweep together, or of an endpoint. None: no limit."""

    max_usd: float | None = None
    max_hours: float | None = None

    def __post_init__(self) -> None:
        require("budget", self._rules())

    def _rules(self) -> dict[str, tuple[bool, str]]:
        return {key: (value is None or (finite(value, 0) and value > 0), f"above 0, or null for no limit, not {value}")
                for key, value in (("max_usd", self.max_usd), ("max_hours", self.max_hours))}

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by the names of their keys."""
        return {f"budget.{key}": value for key, value in (("max_usd", self.max_usd), ("max_hours", self.max_hours))
                if value is not None}

    def hours(self, usd_hour: float | None) -> tuple[float, str]:
        """Return the hours that the budget allows, and the limit that decides, such as "budget.max_hours=2".

        Args:
            usd_hour: price per hour; None: unknown, and max_usd is left out.
        """
        hours = {} if self.max_hours is None else {f"budget.max_hours={self.max_hours:g}": self.max_hours}
        if self.max_usd is not None and usd_hour:
            hours[f"budget.max_usd={self.max_usd:g}"] = self.max_usd / usd_hour
        return min(((value, key) for key, value in hours.items()), default=(math.inf, ""))

    def shortfall(self, noun: str, usd: Sequence[float | None], hours: Sequence[float | None],
                  used_usd: float = 0.0, used_hours: float = 0.0) -> str:
        """Return a sentence that says how many runs fit in the budget, and what to type; empty if all of them fit.

        Args:
            noun: what is counted: run, or job.
            usd: predicted cost of each run, in the order in which they start; None: unknown, and counted as 0.
            hours: predicted hours of each run, likewise.
            used_usd: what earlier runs have cost.
            used_hours: hours of earlier runs.
        """
        for key, limit, values, used in (("budget.max_usd", self.max_usd, usd, used_usd),
                                         ("budget.max_hours", self.max_hours, hours, used_hours)):
            if limit is None:
                continue
            needs = [value or 0.0 for value in values]
            if used + sum(needs) <= limit:
                continue
            sums = [used + sum(needs[:count]) for count in range(1, len(needs) + 1)]
            fitting = sum(total <= limit for total in sums)
            need, spent = (f"${value:.2f}" if key == "budget.max_usd" else f"{value:.3g} h"
                           for value in (sum(needs), used))
            if used >= limit:
                return f"{key}={limit:g} is used up ({spent}): type a higher {key}"
            rest = f", of which {spent} are used," * bool(used)
            who = (f"fits {fitting} of {counted(len(needs), noun)}, which need" if len(needs) > 1
                   else f"does not fit this {noun}, which needs")
            return (f"{key}={limit:g}{rest} {who} about {need}: type {key}={_round_up(sums[-1]):g}"
                    + f", or fewer {noun}s" * (len(needs) > 1))
        return ""


@dataclass
class RunBudget(Budget):
    """The budget of a run or of a sweep, and how often its instance is taken away if it is a spot instance."""

    interruptions_per_hour: float | None = None

    def _rules(self) -> dict[str, tuple[bool, str]]:
        rate = self.interruptions_per_hour
        return super()._rules() | {"interruptions_per_hour": (
            rate is None or finite(rate, 0, 60), f"from 0 to 60, or null for an instance on demand, not {rate}")}


def budget_problems(budget: RunBudget, hardware: Hardware) -> Iterator[str]:
    """Yield one sentence per limit that cannot be kept, because a price is unknown."""
    on_spot = budget.interruptions_per_hour is not None
    if on_spot and hardware.spot_price_usd_hour is None:
        yield ("budget.interruptions_per_hour is about spot instances, whose price is unknown: type "
               "hardware.spot_price_usd_hour=PRICE")
    elif budget.max_usd is not None and hardware.price_usd_hour is None and not on_spot:
        yield (f"budget.max_usd={budget.max_usd:g} cannot be kept, because the price of this machine is unknown: type "
               "hardware.price_usd_hour=PRICE, or budget.max_hours=HOURS in its place")


def _round_up(value: float) -> float:
    """Return a positive number, rounded up to two digits: 11.73 becomes 12."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(round(value / unit, 6)) * unit:.6g}")


@cache
def presets() -> dict[str, Hardware]:
    """Return the machines of conf/hardware by name."""
    names = {item.name for item in fields(Hardware)}
    machines = {}
    for path in sorted((conf_dir() / "hardware").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        known = {key: value for key, value in values.items() if key in names}
        machines[path.stem] = Hardware(**known | {"device": Device(known["device"])})
        machines[path.stem].seal()
    return machines
