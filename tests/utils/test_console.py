"""Tests of terminal output: plain lines in a pipe; tables that fit a terminal of 80 columns."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from dreambooth.config.enums import LrSchedule
from dreambooth.config.recipe import resolve
from dreambooth.config.schema import Config, Dataset, Prior, Tracking, Train
from dreambooth.runs import report
from dreambooth.runs.run_folder import Result
from dreambooth.utils.console import Bar, Console


def recipe(run_dir: Path, **sections):
    data = Dataset(instance_dir="package:demo", instance_prompt="a photo of a zwx toy", class_prompt="a photo of a toy")
    return resolve(Config(**{"dataset": data} | sections), run_dir)


def on_a_terminal(rows) -> str:
    """The text that a terminal of 80 columns shows for a table."""
    console, screen = Console(), io.StringIO()
    console._rich = RichConsole(file=screen, width=80, force_terminal=True, color_system=None)
    console.table(rows)
    return screen.getvalue()


def test_a_pipe_gets_plain_lines_one_for_every_tenth(capsys):
    with Console().bar("training", 40) as bar:
        for _ in range(40):
            bar.tick(note="loss 0.123")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{done}/40" for done in range(4, 41, 4)]
    assert all(line.endswith("/s  loss 0.123") for line in lines)
    assert all(character.isprintable() for line in lines for character in line), "control characters in a pipe"


@pytest.mark.parametrize("total, done, ticks, last", [(3, 0, 3, "3/3"), (10, 5, 5, "10/10"), (1, 0, 1, "1/1")])
def test_the_last_line_says_that_all_is_done(capsys, total, done, ticks, last):
    with Console().bar("encoding", total, done) as bar:
        for _ in range(ticks):
            bar.tick()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == ticks
    assert lines[-1].split()[1] == last


def test_a_resumed_bar_goes_on_where_it_was(capsys):
    with Console().bar("training", 100, done=55) as bar:
        bar.tick()
        assert capsys.readouterr().out == "", "shown by an earlier run"
        bar.tick(4)
    assert capsys.readouterr().out.startswith("training 60/100")


def test_a_pipe_gets_a_line_a_minute_of_what_takes_hours(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Console().bar("training", 1000) as bar:
        for _ in range(90):
            now[0] += 2
            bar.tick(note="[loss] 0.1")
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["30/1000", "60/1000", "90/1000"]


def test_a_terminal_gets_one_bar():
    screen = io.StringIO()
    with Bar(RichConsole(file=screen, width=80, force_terminal=True, color_system=None), "training", 4, 0) as bar:
        bar.tick(4, note="loss 0.1")
    assert "4/4" in screen.getvalue()
    assert "loss 0.1" in screen.getvalue()


def test_other_processes_are_silent(capsys):
    console = Console(quiet=True)
    console.say("hello")
    console.table({"a": "b"})
    with console.bar("training", 1) as bar:
        bar.tick()
    assert capsys.readouterr().out == ""


def test_text_is_shown_as_it_is_and_a_piped_line_is_not_broken(capsys):
    text = "[bold]a photo[/bold] :smile: " + "x" * 100
    Console().say(text)
    Console().table({"prompt": text[:28]})
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [text, f"prompt  {text[:28]}"]


def test_plan_and_summary_fit_80_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs/demo-tiny-full-0123456789"
    run_dir.mkdir(parents=True)
    (run_dir / "contact_sheet.png").touch()
    resolved = recipe(run_dir, train=Train(train_batch_size=4, train_text_encoder=True))
    plan = on_a_terminal(report.plan_table(resolved))
    result = Result(800, 0.123456, 1234.5, str(run_dir), "model")
    summary = on_a_terminal(report.summary_table(result, resolved, "sqlite:////very/long/path/of/a/home/folder/runs/mlflow.db"))
    lines = [line.rstrip() for line in (plan + summary).splitlines()]
    assert max(len(line) for line in lines if "python -m" not in line) <= 80
    assert lines[-1].endswith(' prompt="a photo of a zwx toy"'), "a command is one line: it is there to be copied"
    for words in (
            "a photo of a zwx toy", "a photo of a toy", "denoiser and text encoder", "800, 4 photos", "fp32", "CPU"):
        assert words in plan
    for words in ("800 steps", "0.1235", "contact_sheet.png", "model", "metrics.jsonl", "dreambooth.generate"):
        assert words in summary


def test_plan_says_when_there_is_no_prior_preservation(tmp_path):
    plan = report.plan_table(recipe(tmp_path, prior=Prior(with_prior_preservation=False)))
    assert plan["class"] == "no prior preservation"
    assert plan["trains"] == "denoiser"


def test_a_finished_run_says_how_to_get_more(tmp_path):
    result = Result(400, 0.1, 1.0, str(tmp_path), "model")
    message = report.already_finished(result, recipe(tmp_path, train=Train(max_train_steps=400)))
    assert "this run is finished: 400 steps," in message
    assert "train.max_train_steps=800" in message
    assert "checkpoint.resume=never" in message
    assert "(you asked for 300)" in report.already_finished(result, recipe(tmp_path, train=Train(max_train_steps=300)))


@pytest.mark.parametrize("lr_scheduler, fixed_length, why", [
    (LrSchedule.constant_with_warmup, False, None), (LrSchedule.constant, True, "a sweep over train.max_train_steps"),
    (LrSchedule.cosine, False, "train.lr_scheduler=cosine"), (LrSchedule.linear, True, "train.lr_scheduler=linear")])
def test_more_steps_are_offered_as_what_they_are(tmp_path, lr_scheduler, fixed_length, why):
    """A run whose name contains the number of steps is not extended: more steps make another run."""
    made = recipe(tmp_path, train=Train(lr_scheduler=lr_scheduler), tracking=Tracking(sweep="team"))
    message = report.already_finished(Result(400, 0.1, 1.0, str(tmp_path), "model"),
                                      replace(made, fixed_length=fixed_length, overrides=(
                                          "train.max_train_steps=400",)))
    assert ("To train more, type train.max_train_steps=800" in message) == (why is None)
    assert why is None or (f"With {why}, " in message
                           and "train.max_train_steps=800 is another run, which begins at step 0" in message)


def test_the_console_writes_to_stdout_only(capsys):
    Console().say("hello")
    assert capsys.readouterr() == ("hello\n", "")
    assert not sys.stdout.isatty()
