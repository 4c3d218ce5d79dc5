"""A real Slurm on this machine, for tests: munged, slurmctld and slurmd with one node of two CPUs.

Missing programs are installed: Debian's munge, slurmctld, slurmd and slurm-client. The daemons need root, but neither
systemd nor cgroups. All files are in a folder that is removed.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.services import WAIT, free_port, installed

PROGRAMS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
# A job of the partition urgent preempts those of spot, which are queued again. A job that is queued again starts
# cred_expire seconds later, by default 120. A job that is preempted or cancelled is killed after KillWait seconds.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,defer_batch=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={kill_wait}
MinJobAge=3600
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=64000 State=UNKNOWN
PartitionName=spot Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10
"""
KILL_WAIT = 30  # seconds
ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"}


class Slurm:
    """The running cluster. Its commands read SLURM_CONF, which is set in this process while the cluster runs."""

    def __call__(self, program: str, *words: str, text: str | None = None, cwd: Path | None = None) -> str:
        """Run a command of Slurm and return its output without the last line break."""
        result = subprocess.run([program, *words], input=text, capture_output=True, text=True, check=False, cwd=cwd)
        assert result.returncode == 0, f"{program} {words}: {result.stderr}"
        return result.stdout.strip()

    def submit(self, script: str, *options: str, cwd: Path | None = None) -> str:
        """Submit a batch script and return the job's number."""
        return self("sbatch", "--parsable", *options, text=script, cwd=cwd)

    def field(self, job: str, name: str) -> str:
        """Return a field of a job, such as JobState or Restarts."""
        words = self("scontrol", "show", "job", "--oneliner", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING."""
        return self.field(job, "JobState")

    def ended(self, job: str, seconds: float = 120) -> str:
        """Wait until all tasks of a job have ended, and return their states, without repetitions."""
        def states() -> set[str]:
            return set(self("squeue", "--noheader", "--array", "--states=all", "--format=%T", f"--jobs={job}").split())

        wait_until(lambda: not states() & ACTIVE, seconds, lambda: f"job {job}: {states()}")
        return " ".join(sorted(states()))


def wait_until(holds: Callable[[], object], seconds: float, problem: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, problem()
        time.sleep(0.2)


@contextmanager
def slurm() -> Iterator[Slurm]:
    """Start the daemons, and stop them after the block."""
    paths = {program: installed(program, package) for program, package in PROGRAMS.items()}
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(
        folder=folder, host=host, ctld_port=free_port(), d_port=free_port(), kill_wait=KILL_WAIT))
    key = folder / "munge/key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for path in (folder / "munge", key):
        shutil.chown(path, "munge", "munge")
    (folder / "munge").chmod(0o755)  # clients reach the socket
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    cluster = Slurm()
    try:
        subprocess.run(["runuser", "-u", "munge", "--", paths["munged"], f"--socket={folder}/munge/socket",
                        f"--key-file={key}", f"--pid-file={folder}/munge/pid", f"--log-file={folder}/munge/log",
                        f"--seed-file={folder}/munge/seed", "--num-threads=2"], check=True, timeout=WAIT)
        for program in ("slurmctld", "slurmd"):
            subprocess.run([paths[program]], check=True, timeout=WAIT, cwd=folder)
        sinfo = ["sinfo", "--noheader", "--format=%T"]
        wait_until(lambda: b"idle" in subprocess.run(sinfo, capture_output=True, check=False).stdout, WAIT,
                   lambda: (folder / "slurmctld.log").read_text()[-3000:])
        yield cluster
    finally:
        with suppress(OSError, AssertionError):
            cluster("scancel", "--signal=KILL", "--full", "--user=root")
            cluster("scancel", "--user=root")
            wait_until(lambda: not cluster("squeue", "--noheader"), KILL_WAIT)
        for name in ("slurmctld.pid", "slurmd.pid", "munge/pid"):
            _stop(folder / name)
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)
        shutil.rmtree(folder, ignore_errors=True)


def _stop(pid_file: Path) -> None:
    """End a daemon, by the number in its file, and wait until it has ended."""
    with suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
