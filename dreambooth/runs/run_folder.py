"""The folder of a run: locks it, loads the result of a finished run, and finds the checkpoint from which to resume.

Content of the folder:

    configuration          run.json
    metrics and images     metrics.jsonl, samples/, contact_sheet.png
    training state         checkpoints/
    evaluation             evaluation/, evaluation.json, best/
    the result             model/, result.json
"""

import itertools
import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dreambooth.config import evaluate
from dreambooth.config.recipe import Recipe
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.runs.checkpoint_files import find_damage, latest
from dreambooth.serialization import export_layout
from dreambooth.storage import manifest
from dreambooth.utils import atomic_files, file_lock, permissions
from dreambooth.utils.hardware import GIB

log = logging.getLogger(__name__)
KEPT_ON_RESTART = {".hydra", ".lock", ".lock.leases", "train.log", "remote.json"}  # not moved by `_move_earlier_run`


@dataclass(frozen=True)
class Result:
    """The result of a finished run; also the content of `result.json`."""

    step: int  # completed steps
    objective: float  # the value that a sweep minimises: the instance loss, or the value of evaluate.objective
    seconds: float  # training time in the process that finished the run
    run_dir: str
    model: str  # folder of the exported model, relative to run_dir
    exported_step: int | None = None  # steps of the exported weights; may be less than `step`, see evaluate.select
    scores: dict[str, float] = field(default_factory=dict)  # measures and instance_loss, for the exported weights
    base_scores: dict[str, float] = field(default_factory=dict)  # measures, for the base model before training
    stopped: str | None = None  # why train.stop_when ended the run before train.max_train_steps; None: it did not
    objectives: dict[str, float] = field(default_factory=dict)  # if evaluate.objective names several: the value of each

    def write(self) -> None:
        """Write this result to `result.json` in the run folder, atomically."""
        content = asdict(self)
        if not self.objectives:
            del content["objectives"]
        atomic_files.write_json(Path(self.run_dir) / "result.json", content)


def with_objective(result: Result, recipe: Recipe) -> Result:
    """Return a copy of `result`, with the fields `objective` and `objectives` that evaluate.objective asks for.

    Raises:
        UserError: `result` lacks a score that evaluate.objective needs.
    """
    name, scores = recipe.evaluate.objective, {evaluate.INSTANCE_LOSS: result.objective} | result.scores
    try:
        return replace(result, objective=evaluate.compute_objective(name, recipe.measure_roles, scores),
                       objectives=evaluate.compute_objectives(name, recipe.measure_roles, scores))
    except KeyError as error:
        raise UserError(f"this run did not measure {error.args[0]}, which evaluate.objective={name} needs: type "
                        f"evaluate.objective={evaluate.INSTANCE_LOSS}, or checkpoint.resume=never to train it again"
                        ) from error


@contextmanager
def locked(run_dir: Path, watch: bool = True) -> Iterator[None]:
    """Context manager that locks the run folder for this process.

    Args:
        watch: see `file_lock.hold`.

    Raises:
        UserError: another process has locked the folder, or it has files that this user may not change.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    _check_writable(run_dir, (run_dir, run_dir / ".lock"))
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock.hold(run_dir / ".lock", timeout=0, watch=watch))
        except file_lock.Locked as error:
            owner = f" ({error.owner})" if error.owner else ""
            raise UserError(f"another process{owner} is training in {run_dir}: wait for it, or change a setting (such "
                            "as train.seed) for another run") from error
        _check_writable(run_dir, _changed_paths(run_dir))  # not before: the holder of the lock removes folders
        yield


def _check_writable(run_dir: Path, paths: Iterable[Path]) -> None:
    """Raise UserError if this user may not write to one of the `paths` in a run folder."""
    if path := permissions.first_unwritable(paths):
        refusal = permissions.refusal_of(path)
        raise UserError(f"{run_dir} cannot be changed by this user ({refusal.describe(str(run_dir))}): type "
                        f"{refusal.command(run_dir)}, or change a setting (such as train.seed) for another run")


def _changed_paths(run_dir: Path) -> Iterator[Path]:
    """Yield the folders in a run folder to which a run adds files or from which it removes files, and its journal.

    Checked before training, a folder of another user loses no work: a model that can be renamed but not removed would
    otherwise end the run after training.
    """
    yield from (run_dir / name for name in ("metrics.jsonl", "train.log", "samples", "evaluation"))
    for name in ("checkpoints", "model", "best"):
        yield run_dir / name
        yield from (run_dir / name).rglob("*/")


def load_finished(recipe: Recipe) -> Result | None:
    """Return the result of the run if the run is finished; otherwise None.

    A run is finished if it has completed at least train.max_train_steps steps, or train.stop_when has ended it, and its
    exported model is complete. If checkpoint.resume is not auto, return None: the user then wants to train again,
    although the run folder may contain a finished run.

    Raises:
        UserError: the run is finished, but its result lacks a score that evaluate.objective needs.
    """
    run_dir = recipe.run_dir
    if recipe.checkpoint.resume != "auto":
        return None
    result = read_result(run_dir)
    if result is None or (result.step < recipe.train.max_train_steps and not result.stopped):
        return None
    model = run_dir / result.model
    if not export_layout.is_exported(model, recipe.method.kind.value, recipe.method.merge):
        return None
    if damage := export_layout.find_damage(model):
        log.warning("the model in %s is damaged (%s) and is written again", model, damage)
        return None
    _report_damaged_samples(run_dir)
    return with_objective(result, recipe)


def read_result(run_dir: Path) -> Result | None:
    """Return the content of result.json in a run folder.

    Return None if the file is missing or damaged, or if the objective in it is not finite. The field `run_dir` of the
    result is `run_dir`, also if the folder was moved after the run.
    """
    try:
        content = atomic_files.read_object(run_dir / "result.json") or {}
        result = Result(**content | {"run_dir": str(run_dir)})
        known = type(result.step) is int and isinstance(result.model, str) and math.isfinite(result.objective)
    except TypeError:
        return None
    return result if known else None


def find_resume_point(run_dir: Path, resume: str) -> Path | None:
    """Return the path of the checkpoint from which training continues, or None if training starts at step 0.

    Unfinished files of a killed process are removed first. If `resume` is not auto, the files of an earlier run in this
    folder are then moved into `earlier-TIME/`.

    Args:
        resume: auto, never, or the path of a checkpoint.

    Raises:
        UserError: `resume` is the path of a checkpoint that is missing or damaged.
    """
    atomic_files.remove_leftovers(run_dir)
    atomic_files.remove_leftovers(run_dir / "checkpoints")
    atomic_files.remove_leftovers(run_dir / "samples")
    if resume == "auto":
        _report_damaged_samples(run_dir)
        return latest(run_dir / "checkpoints")
    checkpoint = None if resume == "never" else Path(resume).absolute()
    if checkpoint and (damage := find_damage(checkpoint)):
        raise UserError(f"checkpoint {checkpoint} cannot be resumed ({damage}): type checkpoint.resume=never, or the "
                        "path of another checkpoint")
    earlier = _move_earlier_run(run_dir)
    if earlier and checkpoint and checkpoint.is_relative_to(run_dir):
        checkpoint = earlier / checkpoint.relative_to(run_dir)
    return checkpoint


def _report_damaged_samples(run_dir: Path) -> None:
    """Log a warning for each step with damaged samples. Only the samples of the resumed step can be generated again."""
    for folder in sorted((run_dir / "samples").glob("step-*")):
        if damage := manifest.find_damage(folder):
            log.warning("the samples in %s are damaged (%s)", folder, damage)


def _move_earlier_run(run_dir: Path) -> Path | None:
    """Move the files of an earlier run into a new folder `earlier-TIME/`, and return the path of this folder.

    Return None if there are no files to move.
    """
    entries = [entry for entry in run_dir.iterdir()
               if entry.name not in KEPT_ON_RESTART and not entry.name.startswith("earlier-")]
    if not entries:
        return None
    stamp = time.strftime("earlier-%Y%m%d-%H%M%S")
    names = (stamp if number == 1 else f"{stamp}-{number}" for number in itertools.count(1))
    earlier = next(run_dir / name for name in names if not (run_dir / name).exists())
    earlier.mkdir()
    for entry in entries:
        entry.replace(earlier / entry.name)
    return earlier


def check_disk_space(run_dir: Path, needed: int) -> None:
    """Raise DoesNotFit if the disk of the run folder has fewer than `needed` bytes free."""
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise DoesNotFit(f"checkpoints and model need {needed / GIB:.1f} GiB and {run_dir} has {free / GIB:.1f} GiB "
                         "free: type run_root=DIR on a larger disk, or checkpoint.keep=1")


def remove_hydra_record(run_dir: Path) -> None:
    """Remove Hydra's record of the overrides (`.hydra`, `multirun.yaml`), because an override contains a secret."""
    shutil.rmtree(run_dir / ".hydra", ignore_errors=True)
    (run_dir.parent / "multirun.yaml").unlink(missing_ok=True)


def remove_if_unused(run_dir: Path, run_root: Path) -> None:
    """Remove a run folder if it has no files but those in KEPT_ON_RESTART, and no other process has locked it.

    Also remove empty folders between `run_root` and the run folder. They exist if the run's name, with a slash, was
    refused after Hydra had made the folder.
    """
    if run_dir.is_dir() and {entry.name for entry in run_dir.iterdir()} <= KEPT_ON_RESTART:
        with suppress(UserError), locked(run_dir, watch=False):
            shutil.rmtree(run_dir, ignore_errors=True)
    for parent in run_dir.absolute().parents:
        if run_root.absolute() not in parent.parents:
            break
        with suppress(OSError):  # not empty
            parent.rmdir()
