"""Kills with SIGKILL in every stage of a run. The repeated command must give equal bits."""

import signal
import time

from tests.support.faults import FAULTS
from tests.support.moments import stop_at
from tests.support.runs import KILLED
from tests.support.s3_server import plain_client, serving
from tools.torture.trial import Place, TortureError, Trial

SEEDS = 2  # trials per fault point; the seed chooses the moment
START = (0.05, 0.15, 0.3, 0.5)  # seconds after the start of a process that has the libraries already
DATABASE = (1.0, 1.8, 2.6, 3.4)  # likewise, while the first run of a run_root creates MLflow's database
UPLOADS = (3, 12)  # the request of the upload at which the process is killed


def trials() -> list[Trial]:
    """The trials of this file."""
    kind = "kill -9"
    return [
        *(Trial(kind, f"{name.replace('_', ' ')}, seed {seed}", kill_at_fault_point, (name, seed))
          for name in FAULTS for seed in range(SEEDS)),
        *(Trial(kind, f"start, after {seconds} s", kill_after, (seconds, "tracking=none")) for seconds in START),
        *(Trial(kind, f"creation of mlflow.db, after {seconds} s", kill_after, (seconds, "tracking=mlflow"))
          for seconds in DATABASE),
        *(Trial(kind, moment, kill_at_moment, (moment,), "with evaluation") for moment in ("evaluation", "scores")),
        *(Trial(kind, f"upload, request {number}", kill_at_upload, (number,)) for number in UPLOADS)]


def kill_at_fault_point(place: Place, fault: str, seed: int) -> str:
    """Kill the run where a fault of tests/support/faults.py says."""
    if (code := place.train(fault=fault, seed=seed)) != KILLED:
        raise TortureError(f"the run was not killed, exit code {code}")
    return place.repeat()


def kill_at_moment(place: Place, moment: str) -> str:
    """Kill the run at a moment of tests/support/moments.py."""
    if (code := stop_at(place.folder, moment, *place.settings, number=signal.SIGKILL, log=place.log).code) != KILLED:
        raise TortureError(f"the run was not killed, exit code {code}")
    return place.repeat()


def kill_after(place: Place, seconds: float, tracking: str) -> str:
    """Kill the run a number of seconds after its start."""
    process = place.start(tracking)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return place.repeat(tracking)


def kill_at_upload(place: Place, number: int) -> str:
    """Kill the run when the S3 server receives an upload request of the result."""
    with serving() as server:
        plain_client().create_bucket(Bucket="torture")
        overrides = ("storage.upload=s3://torture/runs", "storage.checkpoints=true")
        process = place.start(*overrides)
        writes = iter(range(10**9))

        def kill(_: int, method: str) -> None:
            if method in ("PUT", "POST") and next(writes) == number:
                process.send_signal(signal.SIGKILL)

        server.fault = kill
        if process.wait() != KILLED:
            raise TortureError("the run was not killed")
        server.fault = lambda number, method: None
        outcome = place.repeat(*overrides)
        if not any(item["Key"].endswith("/result.json") for item in
                   plain_client().list_objects_v2(Bucket="torture")["Contents"]):
            raise TortureError("the result is not in S3 after the repeated command")
        return outcome
