"""Describes the hosts and training processes of a job, and builds the command that starts training on this host."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MASTER_PORT = "29500"  # PyTorch's default
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
# Seconds that PyTorch's launcher gives its processes to save a checkpoint. SageMaker kills the job after 120 seconds.
SHUTDOWN_TIMEOUT = "110"


@dataclass(frozen=True)
class Cluster:
    """The hosts of a job, and the number of training processes per host."""

    hosts: tuple[str, ...] = ("localhost",)
    host: str = "localhost"  # name of this host
    processes_per_host: int = 1
    network_interface: str | None = None  # network interface that connects the hosts
    instance_type: str | None = None

    @property
    def is_first_host(self) -> bool:
        """Whether this host is the first in `hosts`. Only the first host publishes the result."""
        return self.host == self.hosts[0]

    @property
    def world_size(self) -> int:
        """Number of training processes on all hosts."""
        return len(self.hosts) * self.processes_per_host

    def train_command(self, overrides: list[str], environment: Mapping[str, str] = os.environ) -> list[str]:
        """Return the command that starts training with the given overrides on this host.

        For a single training process, the command starts the training process itself. For several training processes,
        the command starts PyTorch's launcher, which starts the training processes for data parallel training.
        """
        train = ["-m", "dreambooth.train", *overrides]
        if self.world_size == 1:
            return [sys.executable, *train]
        launcher = [sys.executable, "-m", "dreambooth.container.torchrun",
                    "--nproc-per-node", str(self.processes_per_host), "--shutdown-timeout", SHUTDOWN_TIMEOUT]
        if len(self.hosts) == 1:
            return [*launcher, "--standalone", *train]
        return [*launcher, "--nnodes", str(len(self.hosts)), "--node-rank", str(self.hosts.index(self.host)),
                "--master-addr", self.hosts[0], "--master-port", environment.get("MASTER_PORT", MASTER_PORT), *train]

    def network_environment(self) -> dict[str, str]:
        """Return the environment variables that set the network interface for NCCL and Gloo.

        Return {} if there is only one host, or if the interface is unknown.
        """
        if len(self.hosts) == 1 or not self.network_interface:
            return {}
        return {"NCCL_SOCKET_IFNAME": self.network_interface, "GLOO_SOCKET_IFNAME": self.network_interface}


def parse_resource_config(resource_config: Mapping[str, Any], processes_per_host: int) -> Cluster:
    """Return the cluster that resourceconfig.json describes.

    If the file names no hosts, return a cluster that consists of this machine alone.
    """
    if not resource_config.get("hosts"):
        return Cluster(processes_per_host=processes_per_host,
                       instance_type=resource_config.get("current_instance_type"))
    hosts = tuple(sorted(resource_config["hosts"]))  # sorted: all hosts must use the same order
    return Cluster(hosts, resource_config.get("current_host", hosts[0]), processes_per_host,
                   resource_config.get("network_interface_name"), resource_config.get("current_instance_type"))


def limit_to_one_process(cluster: Cluster) -> Cluster:
    """Return a copy of a cluster with one process per host, for a run that does not use the GPUs."""
    return replace(cluster, processes_per_host=1)


def count_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """Return the number of CUDA devices on this host.

    If the variable SM_NUM_GPUS is set, return its value. If there is no file /dev/nvidiaN, return 0. Otherwise, count
    the devices with PyTorch in a separate process, so that this process need not import torch. The files /dev/nvidiaN
    tell only that there are GPUs, not how many: in a container that may use only some of the machine's GPUs, the files
    are numbered as on the machine.
    """
    if gpus := environment.get("SM_NUM_GPUS"):
        return int(gpus) if gpus.isdecimal() else 0
    if not any(devices.glob("nvidia[0-9]*")):
        return 0
    process = subprocess.run([sys.executable, "-c", COUNT_GPUS], capture_output=True, text=True, check=False)
    return int(process.stdout) if process.stdout.strip().isdecimal() else 0
