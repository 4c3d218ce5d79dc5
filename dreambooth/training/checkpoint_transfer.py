"""Gives every host of a run the checkpoint from which the run resumes.

Only the main process writes checkpoints, or downloads them from S3. A host that does not share a disk with the main
process has no checkpoint, or an older one. Such a host receives the files from the main process.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth.runs.checkpoint_files import STATE_FILE, find_damage
from dreambooth.runs.run_folder import find_resume_point
from dreambooth.runtime.engine import Engine
from dreambooth.storage import manifest
from dreambooth.utils import atomic_files

BLOCK = 2**26  # bytes that the main process sends at a time


def resume_point(run_dir: Path, resume: str, engine: Engine) -> Path | None:
    """Return the path on this host of the checkpoint from which training continues; None: training starts at step 0.

    The main process chooses the checkpoint. This is a collective operation: every process must call it.

    Args:
        resume: auto, never, or the path of a checkpoint.
    """
    return share(engine.run_on_main(partial(find_resume_point, run_dir, resume)), run_dir / "checkpoints", engine)


def share(chosen: Path | None, folder: Path, engine: Engine) -> Path | None:
    """Copy a checkpoint of the main process to every host that lacks it. Return the checkpoint's path on this host.

    This is a collective operation: every process must call it.

    Args:
        chosen: the path on the host of the main process; None: no checkpoint.
        folder: the `checkpoints` folder of the run. The copy has the path `chosen` if this path is in the run folder.
            Otherwise the copy is in `folder`.
    """
    if chosen is None or engine.world_size == engine.local_world_size:
        return chosen
    identity: list[bytes | None] = engine.run_on_main(partial(_read_identity, chosen))
    is_first = engine.local_rank == 0 and not engine.is_main_process  # of another host
    receives = is_first and (_read_identity(chosen) != identity or find_damage(chosen) is not None)
    if not engine.reduce_flag(receives).read()[0]:
        return chosen
    copy = chosen if chosen.is_relative_to(folder.parent) else folder / chosen.name
    _send(chosen, copy, engine, receives)
    engine.barrier()  # the other processes of a host wait for its files
    return copy if _read_identity(copy) == identity else chosen


def _send(path: Path, copy: Path, engine: Engine, receives: bool) -> None:
    """Send the files of a checkpoint, in blocks, from the main process to all processes in which `receives` is True.

    Args:
        path: the checkpoint on the host of the main process.
        copy: the folder that a receiving process writes. The process also removes all other checkpoints beside it,
            because checkpoint rotation removes files only on the host of the main process.
        receives: whether this process writes the files. It differs between processes.

    Raises:
        DoesNotFit: the disk of a receiving process is full.
        UserError: the files cannot be read or written for another reason.
    """
    sizes: dict[str, int] = engine.run_on_main(lambda: {file.name: file.stat().st_size for file in path.iterdir()})
    try:
        if receives:
            atomic_files.remove_leftovers(copy.parent)
            for older in set(copy.parent.glob("step-*")) - {copy}:
                atomic_files.remove_folder(older)
        folder: Any = atomic_files.write_folder(copy) if receives else nullcontext()
        with folder as temporary:
            for name, size in sizes.items():
                output: Any = (temporary / name).open("wb") if receives else nullcontext()
                with output as file:
                    for start in range(0, size, BLOCK):
                        block = engine.run_on_main(partial(_read_block, path / name, start))
                        if file is not None:
                            file.write(block)
    except OSError as error:
        raise atomic_files.write_failure(f"the checkpoint {path.name} in {copy.parent}", error,
                                         "make the folder writable and repeat the command") from error


def _read_identity(checkpoint: Path) -> list[bytes | None]:
    """Return the contents of a checkpoint's state file and of its manifest. Equal checkpoints have equal contents.

    The manifest has the checksums of all other files. None stands for a file that cannot be read. Checkpoints of
    earlier versions of this package have no manifest.
    """
    contents: list[bytes | None] = []
    for name in (STATE_FILE, manifest.NAME):
        try:
            contents.append((checkpoint / name).read_bytes())
        except OSError:
            contents.append(None)
    return contents


def _read_block(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(BLOCK)
