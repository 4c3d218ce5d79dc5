"""Every command in the README is real: make targets exist, training commands compose and resolve."""

import re
import shlex
from pathlib import Path

import pytest
from test_config import recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_readme_command_is_real(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        return
    assert words[:2] == ["python", "-m"], "a command that no test knows"
    assert words[2] in ("dreambooth.train", "dreambooth.generate")
    if words[2] == "dreambooth.train":
        one = [re.sub(r"=([^ ,]+),.*", r"=\1", word) for word in words[3:] if word != "-m"]
        here = ["hardware=g4dn"] if "precision=fp16" in one else []
        recipe(*here, *one)


def test_links_lead_to_files() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", README):
        assert (ROOT / "".join(link)).is_file(), link
