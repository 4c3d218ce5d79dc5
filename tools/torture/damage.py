"""Damages every file of a run folder in turn. The repeated command must give equal bits, or one clear sentence."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.support.faults import train
from tests.support.runs import flip_bit, the_run
from tools.torture.trial import PROFILES, Place, TortureError, Trial

WARNINGS = {"losses": "metrics.jsonl lacks the loss of", "samples": "the samples in"}  # beginnings of warnings


def truncate(path: Path) -> None:
    """Keep the first half of the file."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def empty(path: Path) -> None:
    """Keep no byte of the file."""
    path.write_bytes(b"")


def remove(path: Path) -> None:
    """Remove the file."""
    path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate, "emptied": empty, "one bit flipped": flip_bit, "removed": remove}


def trials(folder: Path) -> list[Trial]:
    """The trials of this file. Creates the run folders to damage below `folder`: one interrupted, one finished."""
    found = []
    for state, overrides in (("an interrupted", ["train.max_train_steps=6"]), ("a finished", [])):
        template = folder / state.replace(" ", "-")
        if train(template, *PROFILES["one prompt"], *overrides, log=template.with_suffix(".log")):
            raise SystemExit(f"The run to damage failed: see {template}.log")
        for path in sorted(path for path in template.rglob("*") if path.is_file() and path.stat().st_size):
            # A finished run does not read its checkpoints, unless more steps are trained.
            extended = state == "a finished" and "checkpoints" in path.parts
            found += [Trial(f"damage in {state} run", f"{_short(path, template)} {damage}", damage_and_repeat,
                            (template, path, damage), "extended" if extended else "one prompt") for damage in DAMAGES]
    return found


def damage_and_repeat(place: Place, template: Path, path: Path, damage: str) -> str:
    """Damage one file in a copy of a run folder, and repeat the command.

    Losses and samples of earlier steps cannot be computed again. Without them, the run must be equal, and a warning
    must name the damaged file.
    """
    shutil.copytree(template, place.folder, dirs_exist_ok=True)
    DAMAGES[damage](place.folder / path.relative_to(template))
    if code := place.train():
        return f"exit code {code}: {_general(place.sentence(), place)}"
    for lost, warning in WARNINGS.items():
        if warning in place.output():
            place.repeat(except_for=lost)
            return f"equal, except for {lost} of earlier steps, with a warning"
    return place.repeat()


def _short(path: Path, template: Path) -> str:
    run = the_run(template)
    return str(path.relative_to(run if path.is_relative_to(run) else template))


def _general(sentence: str, place: Place) -> str:
    if not sentence:
        raise TortureError("no sentence")
    return sentence.replace(str(place.folder), "RUN_ROOT")
