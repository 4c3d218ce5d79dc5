"""`make torture`: disturbs short training runs in every way of this folder, and writes docs/torture.md.

Each disturbed run is repeated without the disturbance and compared with an undisturbed run, bit for bit. If a trial
fails, the command prints the folder of the trial, keeps it, ends with exit code 1 and writes nothing. Mounting small
disks and creating users needs root; without it, these trials are left out, and no page is written.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tests.support import warm_python

PAGE = Path(__file__).parents[2] / "docs/torture.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.torture", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", help="only trials whose kind or name contains this; writes no page")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="trials at the same time")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    warm_python.start()
    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    rows = run(folder, options.only or "", options.workers)
    if failed := [row for row in rows if row[-1].startswith("FAILED")]:
        sys.exit(f"{len(failed)} of {len(rows)} trials failed; their runs are in {folder}.")
    print(f"{len(rows)} trials passed in {time.monotonic() - begin:.0f} s.")
    if not options.only and not os.geteuid():
        from tools.torture.report import write

        write(PAGE, rows, time.monotonic() - begin)


def run(folder: Path, only: str, workers: int) -> list[tuple[str, str, str]]:
    """Perform the trials whose kind or name contains `only`. Return their kinds, names and outcomes."""
    from tools.torture import damage, kills, limits, servers, shared_roots, stops, users
    from tools.torture.trial import PROFILES, perform, reference_run

    references = {profile: reference_run(folder / profile.replace(" ", "-"), profile) for profile in PROFILES}
    trials = [*kills.trials(), *damage.trials(folder), *limits.trials(), *servers.trials(),
              *stops.trials(), *users.trials(), *shared_roots.trials()]
    trials = [trial for trial in trials if only in f"{trial.kind}: {trial.name}"]
    if os.geteuid():
        left_out, trials = len(trials), [trial for trial in trials if not trial.needs_root]
        left_out -= len(trials)
        print(f"{left_out} trials mount disks or create users and are left out: type sudo make torture for all of them "
              "and the page.")
    print(f"{len(trials)} trials:", *(f"{count} {kind}," for kind, count in Counter(t.kind for t in trials).items()))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(perform, trial, folder, references[trial.profile]) for trial in trials]
        return [(trial.kind, trial.name, future.result()) for trial, future in zip(trials, futures, strict=True)]


if __name__ == "__main__":
    main()
