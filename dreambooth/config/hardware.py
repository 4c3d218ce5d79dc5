"""The config group `hardware`: the machine of a run. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field, fields
from functools import cache

import yaml

from dreambooth.config.enums import Device
from dreambooth.config.section import Section, require
from dreambooth.utils.assets import conf_dir


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
