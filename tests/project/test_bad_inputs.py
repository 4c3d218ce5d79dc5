"""Bad input through the real doors of every command: one sentence that says what to type, and nothing left behind."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import dreambooth
from tests.support.warm_python import PYTHON

ROOT = Path(__file__).parents[2]
INPUTS: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("bad_inputs.toml").read_text("utf-8"))["input"]
COMMANDS = {"train", "plan", "class_images", "generate", "convert", "compare", "promote", "evaluate", "stage",
            "workflows", "storage.__main__", "entrypoint", "serve", "deploy", "prepare"}
# What a refused command may leave behind: empty folders, locks, Hydra's record of a sweep, a job's reason of failure.
LEFT_BEHIND = re.compile(r".*\.lock|multirun\.yaml|failure")


class RunsCode:
    """An object that a careless reader of pickles would let write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("hacked"),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working folder that bad_inputs.toml describes."""
    for name in ("photos", "empty", "garbage", "job"):
        (tmp_path / name).mkdir()
    shutil.copy(Path(dreambooth.__file__).parent / "assets/demo/00.png", tmp_path / "photos")
    (tmp_path / "garbage/a.png").write_bytes(b"\x89PNG garbage" * 9)
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage" * 99)
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(RunsCode(), protocol=2))
    (tmp_path / "text.txt").write_text("some words\n")
    (tmp_path / "blank.txt").write_text("\n# a comment\n")
    (tmp_path / "latin.txt").write_text("ein Hündchen {subject}", encoding="latin-1")
    return tmp_path


def test_the_list_is_long_and_covers_every_command() -> None:
    assert len(INPUTS) >= 100
    assert {entry["command"] for entry in INPUTS} == COMMANDS


@pytest.mark.slow
@pytest.mark.parametrize("entry", INPUTS, ids=lambda entry: f"{entry['command']} {' '.join(entry['arguments'])}"[:60])
def test_bad_input_is_one_sentence(entry: dict[str, Any], folder: Path, uninterrupted: Path) -> None:
    run = str(uninterrupted)
    before = {path for path in folder.rglob("*") if path.is_file()}
    python = sys.executable if entry.get("fresh") else PYTHON
    result = subprocess.run(
        [python, "-m", f"dreambooth.{entry['command']}", *(word.replace("{run}", run) for word in entry["arguments"])],
        cwd=folder, capture_output=True, encoding="utf-8", timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | entry.get("environment", {}))
    said = result.stderr.strip()
    assert result.returncode == entry.get("code", 1), said
    assert "Traceback" not in said + result.stdout
    assert result.stdout == entry.get("prints", result.stdout)
    assert said.startswith("dreambooth: ") and said.count("dreambooth: ") == 1, said
    assert len(said.splitlines()) <= 3, said
    for words in entry["says"]:
        assert words.replace("{run}", run) in said
    left = {path for path in folder.rglob("*") if path.is_file()} - before
    assert {path for path in left if not LEFT_BEHIND.fullmatch(path.name)} == set()
