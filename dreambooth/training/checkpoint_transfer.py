"""Gives every host of a run the checkpoint from which the run resumes.

Only the main process writes checkpoints, or downloads them from S3. A host that does not share a disk with the main
process has no checkpoint, or an older one. Such a host receives the files from the main process.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth.errors import DoesNotFit
from dreambooth.runs.checkpoint_files import STATE_FILE, is_intact
from dreambooth.runs.run_folder import find_resume_point
from dreambooth.runtime.engine import Engine
from dreambooth.utils import atomic_files

BLOCK = 2**26  # bytes that the main process sends at a time


def resume_point(run_dir: Path, resume: str, engine: Engine) -> Path | None:
    """Return the path on this host of the checkpoint from which training continues; None: training starts at step 0.

    The main process chooses the checkpoint. This is a collective operation: every process must call it.

    Args:
        resume: auto, never, or the path of a checkpoint.
    """
    chosen: Path | None = engine.run_on_main(partial(find_resume_point, run_dir, resume))
    if chosen is None or engine.world_size == engine.local_world_size:
        return chosen
    state: bytes | None = engine.run_on_main(partial(_read_state, chosen))
    if state is None:
        return chosen  # the path that the user typed is not a checkpoint: the caller reports that
    present = _read_state(chosen) == state and is_intact(chosen)
    if not engine.reduce_flag(not present).read()[0]:
        return chosen
    copy = chosen if chosen.is_relative_to(run_dir) else run_dir / "checkpoints" / chosen.name
    _send(chosen, copy, engine, receives=not present and engine.local_rank == 0)
    engine.barrier()  # the other processes of a host wait for its files
    return chosen if present else copy


def _send(path: Path, copy: Path, engine: Engine, receives: bool) -> None:
    """Send the files of a checkpoint of the main process to the processes that receive them, in blocks.

    Args:
        copy: the folder that a receiving process writes. Other checkpoints beside it are removed, because rotation
            removes those of the main process only.

    Raises:
        DoesNotFit: the disk of a receiving process is full.
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
        raise DoesNotFit(f"the checkpoint {path.name} could not be written to {copy.parent} ({error}): free some space "
                         "and repeat the command") from error


def _read_state(checkpoint: Path) -> bytes | None:
    """Return the content of a checkpoint's state file, or None if the file cannot be read."""
    try:
        return (checkpoint / STATE_FILE).read_bytes()
    except OSError:
        return None


def _read_block(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(BLOCK)
