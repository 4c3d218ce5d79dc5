"""Run folders: locked by one process, finished or resumed, and an earlier run is never lost."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dreambooth.config.recipe import Recipe, resolve
from dreambooth.config.schema import Checkpoint, Config, Dataset, Train
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.runs import run_folder
from dreambooth.runs.report import already_finished
from dreambooth.runs.run_folder import (
    Result,
    check_disk_space,
    find_resume_point,
    load_finished,
    locked,
    remove_if_unused,
)
from dreambooth.storage import manifest
from tests.support.runs import flip_bit

HOLDER = """
import sys
from pathlib import Path
from filelock import FileLock
Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
with FileLock(Path(sys.argv[1]) / ".lock"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def make_recipe(run_dir: Path, steps: int = 4, resume: str = "auto") -> Recipe:
    data = Dataset(instance_dir="package:demo", instance_prompt="a zwx toy", class_prompt="a toy")
    return resolve(Config(dataset=data, train=Train(max_train_steps=steps), checkpoint=Checkpoint(resume=resume)),
                   run_dir)


def write_checkpoint(run_dir: Path, step: int) -> Path:
    """Write the minimum that counts as an intact checkpoint."""
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "sizes": {}}))
    return folder


def write_finished_run(run_dir: Path, step: int = 4) -> Result:
    """Write a result and a model."""
    (run_dir / "model").mkdir(parents=True)
    (run_dir / "model/model_index.json").write_text("{}")
    result = Result(step, 0.5, 1.5, str(run_dir), "model")
    result.write()
    return result


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def locked_elsewhere(tmp_path):
    """A run folder that another process has locked."""
    folder = tmp_path / "locked"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        yield folder
        holder.stdin.close()


def test_locking_a_folder_that_another_process_has_locked_is_an_error(locked_elsewhere):
    with pytest.raises(UserError, match=r"another process is training in .*locked: wait") as raised, \
            locked(locked_elsewhere):
        pass
    assert raised.value.exit_code == 1


def test_a_folder_that_another_process_has_locked_is_not_removed(locked_elsewhere):
    """A second command must not remove the folder of a first one that is still loading."""
    remove_if_unused(locked_elsewhere, locked_elsewhere.parent)
    assert (locked_elsewhere / ".lock").exists()
    with pytest.raises(UserError), locked(locked_elsewhere):
        pass


def test_the_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "run"):
        _ = 1 / 0
    with locked(tmp_path / "run"):
        pass


def test_a_result_is_written_and_read_unchanged(tmp_path):
    assert load_finished(make_recipe(tmp_path)) is None
    result = write_finished_run(tmp_path)
    assert load_finished(make_recipe(tmp_path)) == result
    assert load_finished(make_recipe(tmp_path, steps=3)) == result


def test_a_result_names_the_folder_in_which_it_is(tmp_path):
    """The folder may have been moved since; the file has the old name."""
    result = write_finished_run(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert load_finished(make_recipe(tmp_path / "new")) == replace(result, run_dir=str(tmp_path / "new"))


def test_a_run_with_more_steps_or_starting_over_is_not_finished(tmp_path):
    write_finished_run(tmp_path, step=4)
    assert load_finished(make_recipe(tmp_path, steps=5)) is None
    assert load_finished(make_recipe(tmp_path, resume="never")) is None
    assert load_finished(make_recipe(tmp_path, resume=str(write_checkpoint(tmp_path, 2)))) is None


def test_a_run_that_was_stopped_early_is_finished_at_its_step(tmp_path):
    result = replace(write_finished_run(tmp_path), stopped="dino is 0.6, and train.stop_when.bound is 0.5")
    result.write()
    assert load_finished(make_recipe(tmp_path, steps=9)) == result
    said = already_finished(result, make_recipe(tmp_path, steps=9))
    assert "it was stopped after 4 steps of 9, because dino is 0.6" in said and "type train.max" not in said


def test_a_run_without_its_model_is_not_finished(tmp_path):
    write_finished_run(tmp_path)
    (tmp_path / "model/model_index.json").unlink()
    assert load_finished(make_recipe(tmp_path)) is None


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("gone", ["unet/diffusion_pytorch_model.safetensors", "model_index.json", "unet"])
def test_a_run_whose_model_lacks_a_file_is_not_finished(tmp_path, gone, sealed):
    """Models of earlier versions have no manifest."""
    write_finished_run(tmp_path)
    (tmp_path / "model/model_index.json").write_text('{"_class_name": "P", "unet": ["diffusers", "U"], "x": [null]}')
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / "model/unet").mkdir(exist_ok=True)
        (tmp_path / "model/unet" / name).write_text("{}")
    if sealed:
        manifest.write(tmp_path / "model")
    assert load_finished(make_recipe(tmp_path)) is not None
    path = tmp_path / "model" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert load_finished(make_recipe(tmp_path)) is None or (gone == "unet" and not sealed)


def test_a_run_whose_model_is_damaged_is_not_finished(tmp_path, caplog):
    write_finished_run(tmp_path)
    (tmp_path / "model/weights.safetensors").write_text("weights")
    (tmp_path / "model/README.md").write_text("card")
    manifest.write(tmp_path / "model")
    (tmp_path / "model/README.md").write_text("a card that the user has changed")
    assert load_finished(make_recipe(tmp_path)) is not None
    flip_bit(tmp_path / "model/weights.safetensors")
    assert load_finished(make_recipe(tmp_path)) is None
    assert "model is damaged (weights.safetensors has other content) and is written again" in caplog.text


@pytest.mark.parametrize("content", [
    "", "{", "[]", '{"step": 4}', '{"another": "format"}',
    *('{"seconds": 1, "run_dir": "", ' + values for values in (
        '"step": 4, "objective": NaN, "model": "model"}', '"step": 4, "objective": null, "model": "model"}',
        '"step": [4], "objective": 0.5, "model": "model"}', '"step": 4, "objective": 0.5, "model": null}'))])
def test_a_run_with_an_unreadable_result_is_not_finished(tmp_path, content):
    write_finished_run(tmp_path)
    (tmp_path / "result.json").write_text(content)
    assert load_finished(make_recipe(tmp_path)) is None


def test_resume_auto_uses_the_newest_checkpoint_and_removes_temporary_files(tmp_path):
    assert find_resume_point(tmp_path, "auto") is None
    write_checkpoint(tmp_path, 2)
    newest = write_checkpoint(tmp_path, 4)
    (tmp_path / "checkpoints/.writing-step-000006").mkdir()
    (tmp_path / "checkpoints/.removing-step-000001").mkdir()
    (tmp_path / ".writing-7-run.json").write_text("{")
    assert find_resume_point(tmp_path, "auto") == newest
    assert file_names(tmp_path) == {"state.json"}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_resume_never_moves_the_earlier_run_and_deletes_nothing(tmp_path):
    write_checkpoint(tmp_path, 2)
    write_finished_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / ".hydra").mkdir()
    before = file_names(tmp_path)
    assert find_resume_point(tmp_path, "never") is None
    [earlier] = tmp_path.glob("earlier-*")
    assert file_names(earlier) == before == file_names(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".hydra", earlier.name}


def test_a_run_that_was_moved_away_is_not_moved_again(tmp_path, monkeypatch):
    for second in ("10", "11"):
        monkeypatch.setattr(run_folder.time, "strftime", lambda form, now=second: f"earlier-{now}")
        write_checkpoint(tmp_path, int(second))
        find_resume_point(tmp_path, "never")
    assert (tmp_path / "earlier-10/checkpoints/step-000010/state.json").is_file()
    assert (tmp_path / "earlier-11/checkpoints/step-000011/state.json").is_file()


def test_a_resume_path_inside_the_run_folder_follows_the_move(tmp_path):
    path = write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 4)
    checkpoint = find_resume_point(tmp_path, str(path))
    [earlier] = tmp_path.glob("earlier-*")
    assert checkpoint == earlier / "checkpoints/step-000002"
    assert (checkpoint / "state.json").is_file()
    assert (earlier / "checkpoints/step-000004/state.json").is_file()


def test_a_resume_path_of_another_run_is_unchanged(tmp_path):
    path = write_checkpoint(tmp_path / "other", 2)
    run_dir = tmp_path / "run"
    write_checkpoint(run_dir, 4)
    assert find_resume_point(run_dir, str(path)) == path


def test_too_little_disk_space_is_an_error_with_exit_code_3(tmp_path):
    check_disk_space(tmp_path, 1)
    with pytest.raises(DoesNotFit, match="type run_root=DIR") as raised:
        check_disk_space(tmp_path, 2**60)
    assert raised.value.exit_code == 3


def test_a_folder_without_work_is_removed(tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / ".hydra").mkdir(parents=True)
    with locked(run_dir):
        pass
    remove_if_unused(run_dir, tmp_path)
    assert not run_dir.exists()
    remove_if_unused(run_dir, tmp_path)  # a missing folder is no error


def test_empty_folders_of_a_name_with_a_slash_are_removed_but_the_root_is_not(tmp_path):
    for name in ("root/pets/small/rex", "root/other/cat", "oops"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "root/other/file").touch()
    for name in ("pets/small/rex", "other/cat", "../oops"):
        remove_if_unused(tmp_path / "root" / name, tmp_path / "root")
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["root", "root/other", "root/other/file"]


@pytest.mark.parametrize("work", ["checkpoints/step-000002/state.json", "metrics.jsonl", "result.json",
                                  "earlier-20260101-000000/result.json", "notes.txt"])
def test_a_folder_with_work_is_kept(tmp_path, work):
    (tmp_path / work).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / work).write_text("{}")
    remove_if_unused(tmp_path, tmp_path.parent)
    assert (tmp_path / work).is_file()


def test_starting_over_twice_in_one_second_keeps_both_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "earlier-20261124-120000")
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
        assert find_resume_point(tmp_path, "never") is None
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("earlier-*/checkpoints/step-*"))
    assert paths == [f"earlier-20261124-120000{name}" for name in (
        "-2/checkpoints/step-000002", "/checkpoints/step-000001")]


def test_damaged_samples_of_earlier_steps_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (0, 4):
        with manifest.write_folder(tmp_path / f"samples/step-{step:06d}") as folder:
            (folder / "prompt-0-0.png").write_bytes(bytes(1000))
    find_resume_point(tmp_path, "auto")
    assert not caplog.messages
    flip_bit(tmp_path / "samples/step-000004/prompt-0-0.png")
    find_resume_point(tmp_path, "auto")
    [message] = caplog.messages
    assert f"{tmp_path / 'samples/step-000004'} are damaged (prompt-0-0.png has other content)" in message
