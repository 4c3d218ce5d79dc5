"""`make proof`, S3: a hundred uploads and downloads under faults, against the local server of the tests.

Each must end with no manifest over missing bytes, no local file lost and a true exit code, and be completed by the same
command; see `trial` in tests/s3_server.py. Ends with 1 at the first that does not.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from s3_server import KINDS, serving, trial  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof.s3", description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1000, help="of the first trial")
    asked = parser.parse_args()
    began, counts = time.monotonic(), {kind: Counter[str]() for kind in KINDS}
    with serving() as server:
        for number in range(asked.trials):
            kind = KINDS[number % len(KINDS)]
            with tempfile.TemporaryDirectory() as folder:
                codes = trial(server, Path(folder), kind, asked.seed + number)
            counts[kind].update(f"{way} {code}" for way, code in zip(("up", "down"), codes, strict=True))
            print(f"{number + 1}/{asked.trials}  {kind}  exit codes {codes}", flush=True)
    for kind, found in counts.items():
        print(f"{kind:<14}{', '.join(f'{count} x {what}' for what, count in sorted(found.items()))}")
    print(f"{asked.trials} trials hold, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
