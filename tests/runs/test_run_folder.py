"""Run folders: one process at a time, finished or not, an earlier run is never lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dreambooth.config.recipe import Recipe, resolve
from dreambooth.config.schema import Checkpoint, Config, Dataset, Train
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import Result, check_disk, discard_if_unused, finished, locked, resume_point

HOLDER = """
import sys
from pathlib import Path
from filelock import FileLock
Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
with FileLock(Path(sys.argv[1]) / ".lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


def recipe(run_dir: Path, steps: int = 4, resume: str = "auto") -> Recipe:
    data = Dataset(instance_dir="package:demo", instance_prompt="a zwx toy", class_prompt="a toy")
    return resolve(Config(dataset=data, train=Train(max_train_steps=steps), checkpoint=Checkpoint(resume=resume)),
                   run_dir)


def checkpoint(run_dir: Path, step: int) -> Path:
    """The least that counts as an intact checkpoint."""
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "sizes": {}}))
    return folder


def ended(run_dir: Path, step: int = 4) -> Result:
    """A run that has a result and a model."""
    (run_dir / "model").mkdir(parents=True)
    (run_dir / "model/model_index.json").write_text("{}")
    result = Result(step, 0.5, 1.5, str(run_dir), "model")
    result.write()
    return result


def everything(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def held_elsewhere(tmp_path):
    """A run folder that another process holds."""
    folder = tmp_path / "held"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        yield folder
        holder.stdin.close()


def test_a_folder_held_by_another_process_is_refused_in_a_sentence(held_elsewhere):
    with pytest.raises(UserError, match=r"another process is training in .*held: wait") as refused, \
            locked(held_elsewhere):
        pass
    assert refused.value.exit_code == 1


def test_a_folder_held_by_another_process_is_not_discarded(held_elsewhere):
    """A second command must not take the folder from a first one that is still loading."""
    discard_if_unused(held_elsewhere)
    assert (held_elsewhere / ".lock").exists()
    with pytest.raises(UserError), locked(held_elsewhere):
        pass


def test_the_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "run"):
        _ = 1 / 0
    with locked(tmp_path / "run"):
        pass


def test_result_survives_a_round_trip(tmp_path):
    assert finished(recipe(tmp_path)) is None
    result = ended(tmp_path)
    assert finished(recipe(tmp_path)) == result
    assert finished(recipe(tmp_path, steps=3)) == result


def test_more_steps_or_starting_over_is_not_finished(tmp_path):
    ended(tmp_path, step=4)
    assert finished(recipe(tmp_path, steps=5)) is None
    assert finished(recipe(tmp_path, resume="never")) is None
    assert finished(recipe(tmp_path, resume=str(checkpoint(tmp_path, 2)))) is None


def test_without_its_model_a_run_is_not_finished(tmp_path):
    ended(tmp_path)
    (tmp_path / "model/model_index.json").unlink()
    assert finished(recipe(tmp_path)) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 4}', '{"another": "format"}'])
def test_an_unreadable_result_is_not_finished(tmp_path, content):
    ended(tmp_path)
    (tmp_path / "result.json").write_text(content)
    assert finished(recipe(tmp_path)) is None


def test_resume_auto_takes_the_newest_and_sweeps_half_done_things(tmp_path):
    assert resume_point(tmp_path, "auto") is None
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 4)
    (tmp_path / "checkpoints/.writing-step-000006").mkdir()
    (tmp_path / "checkpoints/.removing-step-000001").mkdir()
    (tmp_path / ".writing-7-run.json").write_text("{")
    assert resume_point(tmp_path, "auto") == newest
    assert everything(tmp_path) == {"state.json"}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_resume_never_sets_the_earlier_run_aside_and_deletes_nothing(tmp_path):
    checkpoint(tmp_path, 2)
    ended(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / ".hydra").mkdir()
    before = everything(tmp_path)
    assert resume_point(tmp_path, "never") is None
    [aside] = tmp_path.glob("earlier-*")
    assert everything(aside) == before == everything(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".hydra", aside.name}


def test_an_earlier_run_set_aside_stays_where_it_is(tmp_path, monkeypatch):
    for second in ("10", "11"):
        monkeypatch.setattr(run_folder.time, "strftime", lambda form, now=second: f"earlier-{now}")
        checkpoint(tmp_path, int(second))
        resume_point(tmp_path, "never")
    assert (tmp_path / "earlier-10/checkpoints/step-000010/state.json").is_file()
    assert (tmp_path / "earlier-11/checkpoints/step-000011/state.json").is_file()


def test_a_resume_path_inside_the_run_follows_the_move(tmp_path):
    chosen = checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 4)
    found = resume_point(tmp_path, str(chosen))
    [aside] = tmp_path.glob("earlier-*")
    assert found == aside / "checkpoints/step-000002"
    assert (found / "state.json").is_file()
    assert (aside / "checkpoints/step-000004/state.json").is_file()


def test_a_resume_path_of_another_run_stays(tmp_path):
    chosen = checkpoint(tmp_path / "other", 2)
    run_dir = tmp_path / "run"
    checkpoint(run_dir, 4)
    assert resume_point(run_dir, str(chosen)) == chosen


def test_too_little_disk_ends_with_code_3(tmp_path):
    check_disk(tmp_path, 1)
    with pytest.raises(DoesNotFit, match="type run_root=DIR") as refused:
        check_disk(tmp_path, 2**60)
    assert refused.value.exit_code == 3


def test_a_folder_in_which_nothing_happened_is_removed(tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / ".hydra").mkdir(parents=True)
    with locked(run_dir):
        pass
    discard_if_unused(run_dir)
    assert not run_dir.exists()
    discard_if_unused(run_dir)  # a folder that is not there is fine


@pytest.mark.parametrize("work", ["checkpoints/step-000002/state.json", "metrics.jsonl", "result.json",
                                  "earlier-20260101-000000/result.json", "notes.txt"])
def test_a_folder_that_holds_work_is_kept(tmp_path, work):
    (tmp_path / work).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / work).write_text("{}")
    discard_if_unused(tmp_path)
    assert (tmp_path / work).is_file()


def test_two_new_starts_in_one_second_keep_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "earlier-20261124-120000")
    for step in (1, 2):
        checkpoint(tmp_path, step)
        assert resume_point(tmp_path, "never") is None
    kept = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("earlier-*/checkpoints/step-*"))
    assert kept == [f"earlier-20261124-120000{name}" for name in (
        "-2/checkpoints/step-000002", "/checkpoints/step-000001")]
