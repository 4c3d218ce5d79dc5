"""Atomic files and folders on a full disk: the error names the file, and a command ends with a sentence."""

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dreambooth import cli
from dreambooth.utils.atomic_files import write_file, write_folder

FULL = (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("error", FULL, ids=repr)
def test_a_full_disk_names_the_file_and_leaves_nothing(
    write: Callable[[Path], AbstractContextManager[Path]], error: Exception, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*/target'"), write(tmp_path / "target"):
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_a_command_on_a_full_disk_ends_with_3_and_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_exit_codes", [])

    def job() -> None:
        raise error

    cli.run_job(job, sweep=False)
    assert cli._exit_codes == [3]
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith("dreambooth: the disk is full (")
    assert sentence.endswith("): free some space and repeat the command")


def test_another_error_of_a_write_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), write_file(tmp_path / "target"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
