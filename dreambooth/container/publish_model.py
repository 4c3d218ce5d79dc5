"""What is kept of a finished run: copied from its folder to where SageMaker takes the model from."""

import os
import shutil
from pathlib import Path

from dreambooth.errors import DoesNotFit
from dreambooth.storage import manifest
from dreambooth.utils.atomic_files import whole_file, whole_folder

BESIDE = ("contact_sheet.png", "run.json", "evaluation.json", "result.json")  # the last says that the rest is there


def publish(run_dir: Path, target: Path) -> None:
    """`target` gets model/, a diffusers folder with a manifest (in S3 it is a `model.source`), and what tells of it.

    What tells of an earlier run there goes first: it would stand beside another model, and be sent with it.

    Raises:
        DoesNotFit: the disk is full; the run's own folder is untouched.
    """
    try:
        for name in reversed(BESIDE):
            (target / name).unlink(missing_ok=True)
        with whole_folder(target / "model") as aside:
            shutil.copytree(run_dir / "model", aside, copy_function=_take, dirs_exist_ok=True)
            manifest.write(aside)
        for name in BESIDE:
            if (run_dir / name).is_file():
                with whole_file(target / name) as aside:
                    shutil.copyfile(run_dir / name, aside)
    except (OSError, shutil.Error) as error:
        raise DoesNotFit(f"the model could not be written to {target} ({error}): it is kept in {run_dir}; "
                         "give the job a larger volume and repeat it") from error


def _take(source: str, target: str) -> None:
    """A second name for a file takes no room, where both folders are on one disk; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
