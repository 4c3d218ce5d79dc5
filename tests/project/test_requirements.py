"""Requirements and commands of the repository: pins inside their bounds, the targets of make, the script of the CI."""

import os
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [Requirement(text) for group in (project["dependencies"], extras["dev"], extras["cuda"]) for text in group]


def test_constraints_pin_every_requirement_inside_its_bounds() -> None:
    lines = (line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and line[0] != "#")
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0"  # plain: no local version, so pip may take the CPU or the CUDA wheel
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-", "triton"))]
    loose = [str(need) for need in requirements() if not need.specifier.contains(pins.get(need.name, "0"))]
    assert loose == []


def test_make_alone_lists_the_targets() -> None:
    env = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}}
    result = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    listed = [line.split()[1] for line in result.stdout.splitlines()]
    assert listed == ["help", "setup", "demo", "test", "test-slow", "test-all", "test-container", "test-services",
                      "image", "lint", "ci", "mlflow-ui", "proof", "torture", "outdated", "tiny-base", "mutants"]


def test_the_ci_script_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
