"""The committed files of workflows/, and one stage of them as a process."""

import itertools
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dreambooth.config import compose
from tests.support.warm_python import PYTHON

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workflows"
Json = dict[str, Any]
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
SPACES = sorted(path.stem for path in (compose.conf_dir() / "sweep").glob("*.yaml"))


def documents(name: str) -> list[Json]:
    return list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))


OBJECTS = [pytest.param(one, id=f"{name}: {one['kind']}") for name in FILES for one in documents(name)
           if one.get("kind") not in (None, "Kustomization")]


# -- what a container receives --------------------------------------------------------------------------------------

SECRET = "AWS_SECRET_ACCESS_KEY"


def expanded(text: str) -> str:
    """What a container receives: the function Expand of Kubernetes, third_party/forked/golang/expansion."""
    out, characters = "", iter(text)
    for character in characters:
        if character != "$":
            out += character
            continue
        after = next(characters, "")
        if after != "(":
            out += "$" if after == "$" else f"${after}"
            continue
        name = "".join(itertools.takewhile(lambda one: one != ")", characters))
        out += "LEAKED" if name == SECRET else f"$({name})"
    return out


def katib_jobs(experiment: Json) -> list[Json]:
    """The Job of each point of an Experiment, in the order of the grid.

    As Katib's generator does, put the values into the JSON text of the Job, without escaping them.
    """
    spec = experiment["spec"]
    lists = {one["name"]: one["feasibleSpace"]["list"] for one in spec["parameters"]}
    jobs = []
    for point in itertools.product(*lists.values()):
        values, text = dict(zip(lists, point, strict=True)), json.dumps(spec["trialTemplate"]["trialSpec"])
        for one in spec["trialTemplate"]["trialParameters"]:
            text = text.replace(f"${{trialParameters.{one['name']}}}", values[one["reference"]])
        jobs.append(json.loads(text))
    return jobs


def katib_container(job: Json) -> tuple[list[str], dict[str, str]]:
    """Command with args, and own environment variables, of a trial's container, as Kubernetes passes them."""
    [container] = job["spec"]["template"]["spec"]["containers"]
    return ([*container["command"], *map(expanded, container["args"])],
            {one["name"]: expanded(one["value"]) for one in container["env"]})


def katib_trials(experiment: Json) -> list[list[str]]:
    """The overrides of each trial. The script of a trial passes environment variables only."""
    trials = []
    for job in katib_jobs(experiment):
        [*_, script], environment = katib_container(job)
        command = re.fullmatch(r'python -m dreambooth.train((?: "\$\w+")+)', script)
        assert command, script
        trials.append([environment[name] for name in re.findall(r"\w+", command[1])])
    return trials


# -- a stage -------------------------------------------------------------------------------------------------------

def run_stage(folder: Path, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-m", "dreambooth.stage", name, "--out", str(folder / "out"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
