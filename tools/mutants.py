"""Breaks the code on purpose, once for each patch in mutants/, and shows that the test it names turns red.

A patch begins with `# trap: ...` and `# test: tests/file.py::name` (a pytest -k expression may follow after a space).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ["dreambooth", "conf", "tests", "pyproject.toml"]


def survives(patch: Path, folder: Path) -> bool:
    """True if the named test stays green on the broken code, which is what must not happen."""
    test = next(line for line in patch.read_text().splitlines() if line.startswith("# test: ")).removeprefix("# test: ")
    for part in PARTS:
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, folder / part)
    subprocess.run(["patch", "-p1", "-s", "-i", str(patch)], cwd=folder, check=True)
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", test],
                         cwd=folder, env=environment, capture_output=True, text=True)
    if ran.returncode not in (0, 1):
        raise SystemExit(f"{patch.name}: {test} could not be run\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return ran.returncode == 0


def main() -> None:
    patches = sorted((ROOT / "mutants").glob("*.patch"))
    alive = []
    for patch in patches:
        with tempfile.TemporaryDirectory() as folder:
            lives = survives(patch, Path(folder))
        print(f"{'SURVIVED' if lives else 'red'}  {patch.stem}", flush=True)
        alive += [patch.stem] * lives
    print(f"{len(patches) - len(alive)} of {len(patches)} mutants found")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
