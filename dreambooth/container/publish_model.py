"""Copies the result of a finished run to the folder that SageMaker uploads as the model."""

import os
import shutil
from pathlib import Path

from dreambooth.errors import DoesNotFit
from dreambooth.storage import manifest
from dreambooth.utils.atomic_files import write_file, write_folder

# Files that are published together with the model. result.json is last, because it marks the result as complete.
RUN_FILES = ("contact_sheet.png", "run.json", "evaluation.json", "result.json")


def publish(run_dir: Path, target: Path) -> None:
    """Copy the run's model, and the files that describe the run, to `target`.

    `target`/model becomes a diffusers model folder with a manifest. After SageMaker has uploaded this folder to S3, the
    S3 URI of the folder can be used as `model.source`. Files of an earlier run are first removed from `target`, because
    these files would describe the wrong model.

    Raises:
        DoesNotFit: the files cannot be written, for example because the disk is full. The run folder is unchanged.
    """
    try:
        for name in reversed(RUN_FILES):
            (target / name).unlink(missing_ok=True)
        with write_folder(target / "model") as temporary:
            shutil.copytree(run_dir / "model", temporary, copy_function=_link_or_copy, dirs_exist_ok=True)
            manifest.write(temporary)
        for name in RUN_FILES:
            if (run_dir / name).is_file():
                with write_file(target / name) as temporary:
                    shutil.copyfile(run_dir / name, temporary)
    except (OSError, shutil.Error) as error:
        raise DoesNotFit(f"the model could not be written to {target} ({error}) and is kept in {run_dir}: "
                         "give the job a larger volume and repeat the job") from error


def _link_or_copy(source: str, target: str) -> None:
    """Hard-link a file, which takes no disk space. If the folders are on different disks, copy the file instead."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
