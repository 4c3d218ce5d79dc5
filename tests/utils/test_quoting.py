"""Printed commands are pasted into bash, and what Hydra's parser then receives is compared with what was meant."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dreambooth import cli
from dreambooth.cloud import sweep_results
from dreambooth.runs import report
from dreambooth.runs.run_folder import Result
from dreambooth.tracking import run_tracker
from dreambooth.utils import markdown, quoting
from tests.utils.test_console import on_a_terminal, recipe

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\1\r")).filter(
    lambda text: text != "???")  # which OmegaConf keeps for a missing value
SPECIAL = st.text(st.sampled_from("a1-.= \t\n,'\"\\$!`(){}[]~*?|&;<>#%@:é😀/"), max_size=12)
PROMPTS = ["a zwx toy, red (big)", "a $zwx dog", "it's a \"zwx\" dog", "zwx!", "`zwx`", "${zwx}", "\\${oc.env:HOME}",
           "~/photos", "12", "1e-4", "null", "True", "", " a", "a ", "a=b", "{a: b}", "[zwx]", "zwx\\", "'", '"',
           "a\nb", "zwx & toy; ls", "#zwx", "ein süßer zwx 🐶", "a:b", "-zwx", "choice(a,b)", "$(ls) $HOME", "!!",
           "a\\,b", "a  b"]


def pasted(lines: list[str]) -> list[list[str]]:
    """The words that `python` receives from each line, typed into an interactive bash, which expands "!" also."""
    bash = subprocess.run(
        ["bash", "--noprofile", "--norc", "--noediting", "-i"],
        env={"PATH": "/usr/bin:/bin", "HISTFILE": "/dev/null", "zwx": "EMPTY"},
        input="python() { printf '%s\\0' \"$@\" $'\\1'; }\n" + "".join(f"{line}\n" for line in lines),
        capture_output=True, text=True, check=False, start_new_session=True)
    records = bash.stdout.split("\1\0")[:-1]
    assert len(records) == len(lines), bash.stderr
    return [record.split("\0")[:-1] for record in records]


def received(word: str) -> tuple[str, object]:
    """The key and value of an override as a command receives them."""
    parsed = OverridesParser.create().parse_override(word)
    assert not parsed.is_sweep_override()
    return parsed.get_key_element(), OmegaConf.create({"it": parsed.value()})["it"]


@settings(deadline=None, max_examples=10)
@given(st.lists(TEXTS | SPECIAL, min_size=1, max_size=12))
@example(PROMPTS)
@example(["\\\n", "a\\\\\n"])  # a backslash before the last newline is not at the end
def test_a_pasted_command_receives_the_texts_that_it_was_printed_for(texts: list[str]) -> None:
    lines = [quoting.command("generate", {"run": text, "prompt": text}) for text in texts]
    for text, line, words in zip(texts, lines, pasted(lines), strict=True):
        assert words[:2] == ["-m", "dreambooth.generate"]
        assert [received(word) for word in words[2:]] == [("run", text), ("prompt", text)], line


@settings(deadline=None, max_examples=10)
@given(st.lists(st.lists(TEXTS | SPECIAL, max_size=4), min_size=1, max_size=8))
@example([["train.max_train_steps=2", "prompt='a, $zwx'", "", "a b", "=", "x=", "=x", "a b=c d"]])
def test_a_pasted_line_of_words_is_these_words(lines: list[list[str]]) -> None:
    assert pasted([f"python {quoting.shell_line(words)}" for words in lines]) == lines


def test_what_is_simple_stays_readable() -> None:
    assert quoting.command("generate", {"run": "runs/demo-1", "prompt": "a photo of a zwx toy"}) == \
        'python -m dreambooth.generate run=runs/demo-1 prompt="a photo of a zwx toy"'
    assert quoting.override("prompt", "a zwx toy, red (big)") == "prompt=\"'a zwx toy, red (big)'\""
    assert [quoting.hydra_value(value) for value in (None, True, 3, 1e-4)] == ["null", "true", "3", "0.0001"]
    assert quoting.shell_line(["python", "prompt=a b"]) == 'python prompt="a b"'


@pytest.mark.parametrize("prompt", ["a zwx toy, red (big)", "a $zwx dog", "it's ```zwx``` | *big*"])
def test_every_printed_command_can_be_pasted(prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of a run, on a terminal too; MLflow's notes of a run and of a sweep."""
    resolved = recipe(tmp_path / "my runs (2)")
    monkeypatch.setattr(type(resolved), "instance_prompt", prompt)
    use_it = report.summary_table(Result(4, 0.1, 1.0, str(resolved.run_dir), "model"), resolved, None)["use it"]
    on_screen = on_a_terminal({"done": "x " * 60, "use it": use_it}).splitlines()[-1].removeprefix("use it").strip()
    note = run_tracker.describe_run(resolved).splitlines()[-2]
    sweep = sweep_results.next_commands("it's 1, 2", resolved.run_dir)
    words = pasted([use_it, on_screen, note, *sweep])
    meant = ["-m", "dreambooth.generate", ("run", str(resolved.run_dir)), ("prompt", prompt)]
    for line in words[:3]:
        assert [*line[:2], *map(received, line[2:])] == meant
    for name, line in zip(("compare", "promote"), words[3:], strict=True):
        monkeypatch.setattr(sys, "argv", line[1:])
        cli.intercept_override("sweep")
        assert (line[1], cli.intercepted_override("sweep")) == (f"dreambooth.{name}", "it's 1, 2")
        assert received(sys.argv[1]) == ("run_root", str(resolved.run_dir))


@pytest.mark.parametrize("typed, meant", [("a,b", "a,b"), ("1e5", "1e5"), ("'a b'", "a b"), ("'", "'"), ("007", "007")])
def test_the_id_of_a_sweep_is_a_text(typed: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", f"sweep={typed}", "out=x"])
    cli.intercept_override("sweep")
    assert (cli.intercepted_override("sweep"), sys.argv[1:]) == (meant, ["out=x"])


@pytest.mark.parametrize("text, escaped", [
    ("a zwx_2 toy", "a zwx_2 toy"), ("_a_ *b* `c`", r"\_a\_ \*b\* \`c\`"), ("a|b\n[c](d)", r"a\|b \[c\](d)")])
def test_a_prompt_in_markdown_is_not_formatting(text: str, escaped: str) -> None:
    assert markdown.escape(text) == escaped
