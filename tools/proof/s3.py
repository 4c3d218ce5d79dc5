"""Part of `make proof`: tests S3 transfers with injected faults, and writes a section of docs/sagemaker.md.

A hundred trials upload and download a folder with the local S3 server of the tests. After each fault, no manifest may
list missing bytes, no local file may be lost, the exit code must be right, and the same command without faults must
complete the transfer; see `trial` in tests/support/s3_server.py. At the first failure this program ends with exit code
1 and writes nothing.
"""

import argparse
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tests.support.s3_server import FAULTS, serving, trial
from tools.proof.docs_section import format_table, write_section

PAGE = Path(__file__).parents[2] / "docs/sagemaker.md"
BEGIN, END = "<!-- tools/proof/s3.py -->\n", "<!-- end -->\n"
OUTCOMES = {0: "done", 1: "failed with a message", -9: "killed"}  # by exit code


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.proof.s3", description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1000, help="seed of the first trial")
    options = parser.parse_args()
    start = time.monotonic()
    counts = {kind: (Counter[str](), Counter[str]()) for kind in FAULTS}  # outcomes of uploads, of downloads
    with serving() as server:
        for number in range(options.trials):
            kind = FAULTS[number % len(FAULTS)]
            with tempfile.TemporaryDirectory() as folder:
                codes = trial(server, Path(folder), kind, options.seed + number)
            for outcomes, code in zip(counts[kind], codes, strict=True):
                outcomes[OUTCOMES[code]] += 1
            print(f"{number + 1}/{options.trials}  {kind}  exit codes {codes}", flush=True)
    rows = [f"| {' | '.join([kind, *map(_describe, directions)])} |" for kind, directions in counts.items()]
    table = format_table(f"boto3 {version('boto3')}, {time.monotonic() - start:.0f} s; all {options.trials} pass",
                         "| fault | uploads with this fault | downloads with this fault |", rows)
    print(table)
    write_section(PAGE, BEGIN, END, table)


def _describe(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))


if __name__ == "__main__":
    main()
