"""How many processes train, where, and the command that starts them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PORT = "29500"  # PyTorch's own default
COUNT = "import torch; print(torch.cuda.device_count())"
PATIENCE = "110"  # seconds that PyTorch's launcher waits for processes to save; SageMaker kills after 120


@dataclass(frozen=True)
class Cluster:
    """The hosts of a job, and this one's processes."""

    hosts: tuple[str, ...] = ("localhost",)
    host: str = "localhost"
    processes: int = 1  # on each host
    interface: str | None = None  # network interface between hosts
    instance_type: str | None = None

    @property
    def first(self) -> bool:
        """True on the host that keeps the result."""
        return self.host == self.hosts[0]

    @property
    def world(self) -> int:
        return len(self.hosts) * self.processes

    def command(self, words: list[str], environment: Mapping[str, str] = os.environ) -> list[str]:
        """Trains with those overrides: one process, or data parallel through PyTorch's launcher."""
        door = ["-m", "dreambooth.train", *words]
        if self.world == 1:
            return [sys.executable, *door]
        launcher = [sys.executable, "-m", "dreambooth.container.torchrun", "--nproc-per-node", str(self.processes),
                    "--shutdown-timeout", PATIENCE]
        if len(self.hosts) == 1:
            return [*launcher, "--standalone", *door]
        return [*launcher, "--nnodes", str(len(self.hosts)), "--node-rank", str(self.hosts.index(self.host)),
                "--master-addr", self.hosts[0], "--master-port", environment.get("MASTER_PORT", PORT), *door]

    def environment(self) -> dict[str, str]:
        """What NCCL and gloo ask for to find the other hosts."""
        if len(self.hosts) == 1 or not self.interface:
            return {}
        return {"NCCL_SOCKET_IFNAME": self.interface, "GLOO_SOCKET_IFNAME": self.interface}


def cluster(told: Mapping[str, Any], processes: int) -> Cluster:
    """The cluster that resourceconfig.json tells of; without one, this machine."""
    if not told.get("hosts"):
        return Cluster(processes=processes, instance_type=told.get("current_instance_type"))
    hosts = tuple(sorted(told["hosts"]))  # the same order everywhere
    return Cluster(hosts, told.get("current_host", hosts[0]), processes, told.get("network_interface_name"),
                   told.get("current_instance_type"))


def on_cpu(cluster: Cluster) -> Cluster:
    """The same with one process a host: the cards are not used."""
    return replace(cluster, processes=1)


def gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """How many CUDA cards PyTorch sees here: asked in a process of its own, so that this one stays small.

    Where there is none, not even that. A container that got some of the host's cards has them by the host's numbers.
    """
    if said := environment.get("SM_NUM_GPUS"):
        return int(said) if said.isdecimal() else 0
    if not any(devices.glob("nvidia[0-9]*")):
        return 0
    asked = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=False)
    return int(asked.stdout) if asked.stdout.strip().isdecimal() else 0
