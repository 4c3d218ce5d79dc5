"""The processes that `srun python -m dreambooth.train` starts find each other, as under PyTorch's launcher."""

import os
import re
from collections.abc import Mapping, MutableMapping

PORTS = range(20000, 30000)  # ports of the main process; the number of the job chooses one


def join_step(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that torch.distributed reads, from the variables of srun. Do nothing outside of such a step.

    A step is what one srun starts (https://slurm.schedmd.com/srun.html, "output environment variables"). A step of one
    task, the batch script itself, and processes of PyTorch's launcher are left as they are: SLURM_NTASKS, which many
    programs read, also exists where no other task was started.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1 or "RANK" in environment:
        return
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    node = int(environment.get("SLURM_NODEID", "0"))
    values = {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": str(tasks),
              "LOCAL_RANK": environment["SLURM_LOCALID"],
              "LOCAL_WORLD_SIZE": str(tasks_of_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
              "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
              "MASTER_PORT": str(PORTS[(job + step) % len(PORTS)])}
    for name, value in values.items():
        environment.setdefault(name, value)


def is_other_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether srun started this process and others, of which another one is the main process."""
    return has_other_processes(environment) and environment.get("RANK", "0") != "0"


def has_other_processes(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether srun started this process and others."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def first_host(nodes: str) -> str:
    """Return the first host of a list of nodes in Slurm's notation, such as node003 for `node[003-007,9],other`."""
    start, _, rest = nodes.partition("[")
    if "," in start or not rest:
        return start.partition(",")[0]
    numbers, _, end = rest.partition("]")
    return start + re.split("[-,]", numbers)[0] + end.partition(",")[0]


def tasks_of_nodes(text: str) -> list[int]:
    """Return the number of tasks of each node; Slurm writes `2(x3),1` for 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts
