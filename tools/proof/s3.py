"""`make proof`, S3: a hundred uploads and downloads under faults, against the local server of the tests. Writes a part
of docs/sagemaker.md.

Each must end with no manifest over missing bytes, no local file lost and a true exit code, and be completed by the same
command; see `trial` in tests/support/s3_server.py. Ends with 1, and writes nothing, at the first that does not.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs/sagemaker.md"
BEGIN, END = "<!-- tools/proof/s3.py -->\n", "<!-- end -->\n"
ENDS = {0: "done", 1: "told why", -9: "killed"}  # exit code -> what it means
sys.path.insert(0, str(ROOT / "tests"))

from s3_server import KINDS, serving, trial  # noqa: E402

from tools.proof import page  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof.s3", description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1000, help="of the first trial")
    asked = parser.parse_args()
    began, counts = time.monotonic(), {kind: (Counter[str](), Counter[str]()) for kind in KINDS}
    with serving() as server:
        for number in range(asked.trials):
            kind = KINDS[number % len(KINDS)]
            with tempfile.TemporaryDirectory() as folder:
                codes = trial(server, Path(folder), kind, asked.seed + number)
            for ends, code in zip(counts[kind], codes, strict=True):
                ends[ENDS[code]] += 1
            print(f"{number + 1}/{asked.trials}  {kind}  exit codes {codes}", flush=True)
    rows = [f"| {' | '.join([kind, *map(_told, ways)])} |" for kind, ways in counts.items()]
    found = page.table(f"boto3 {version('boto3')}, {time.monotonic() - began:.0f} s; all {asked.trials} hold",
                       "| fault | uploads under it | downloads under it |", rows)
    print(found)
    page.put(DOCS, BEGIN, END, found)


def _told(ends: Counter[str]) -> str:
    return ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))


if __name__ == "__main__":
    main()
