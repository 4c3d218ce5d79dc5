"""Breaks the code on purpose, once for each patch in mutants/, and shows that the test it names turns red.

A patch begins with `# trap: ...` and `# test: tests/file.py::name`. The test must be green on an unbroken copy first:
one that is red anyway would find every mutant. `--seen-green`: all tests have just been run here, and were.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ["dreambooth", "hydra_plugins", "conf", "tests", "workflows", "pyproject.toml"]


def test_of(patch: Path) -> str:
    """The test that a patch names."""
    return next(line for line in patch.read_text().splitlines() if line.startswith("# test: ")).removeprefix("# test: ")


def green(test: str, patch: Path | None = None) -> bool:
    """True if the test passes on a copy of the code, broken by `patch` if there is one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in PARTS:
            (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, folder / part)
        if patch:
            subprocess.run(["patch", "-p1", "-s", "-i", str(patch)], cwd=folder, check=True)
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", test],
                             cwd=folder, env=environment, capture_output=True, text=True)
    if ran.returncode not in (0, 1) or (ran.returncode and not patch):
        raise SystemExit(f"{patch.name if patch else 'unbroken code'}: {test} could not be run or is red\n"
                         f"{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return ran.returncode == 0


def main() -> None:
    patches = sorted((ROOT / "mutants").glob("*.patch"))
    alive = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each in a process of one thread
        if "--seen-green" not in sys.argv[1:]:
            list(pool.map(green, sorted({test_of(patch) for patch in patches})))
        for patch, lives in zip(patches, pool.map(lambda patch: green(test_of(patch), patch), patches), strict=True):
            print(f"{'SURVIVED' if lives else 'red'}  {patch.stem}", flush=True)
            alive += [patch.stem] * lives
    print(f"{len(patches) - len(alive)} of {len(patches)} mutants found")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
