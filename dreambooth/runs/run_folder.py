"""The folder of a run: who may use it, whether it is finished, what was there before.

    config of the run         run.json            metrics and images     metrics.jsonl, samples/, contact_sheet.png
    training state            checkpoints/        the result             model/, result.json
    evaluation                evaluation/, evaluation.json, best/
"""

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from dreambooth.serialization import export_layout
from dreambooth.config import evaluate
from dreambooth.utils import atomic_files
from dreambooth.runs.checkpoint_files import latest
from dreambooth.errors import DoesNotFit, UserError
from dreambooth.utils.hardware import GIB
from dreambooth.config.recipe import Recipe

KEPT = {".hydra", ".lock", "train.log", "remote.json"}  # what stays when an earlier run is set aside


@dataclass(frozen=True)
class Result:
    """What a finished run made; also `result.json`."""

    step: int  # completed steps
    objective: float  # of a sweep, lower is better: the instance loss, or what evaluate.objective names
    seconds: float  # of training, in this process
    run_dir: str
    model: str  # folder of the exported model, inside run_dir
    exported_step: int | None = None  # completed steps of its weights; fewer than `step` if evaluate.select chose them
    scores: dict[str, float] = field(default_factory=dict)  # of its weights: measures by name, and instance_loss
    base_scores: dict[str, float] = field(default_factory=dict)  # measures before training

    def write(self) -> None:
        """Write result.json, whole or not at all."""
        atomic_files.write_json(Path(self.run_dir) / "result.json", asdict(self))


def judged(result: Result, recipe: Recipe) -> Result:
    """The same result with the objective that is asked for.

    Raises:
        UserError: the run did not measure it.
    """
    asked, scores = recipe.evaluate.objective, {evaluate.INSTANCE_LOSS: result.objective} | result.scores
    try:
        return replace(result, objective=evaluate.objective(asked, recipe.measured, scores))
    except KeyError as error:
        raise UserError(f"this run did not measure {error.args[0]}, which evaluate.objective={asked} needs: type "
                        f"evaluate.objective={evaluate.INSTANCE_LOSS}, or checkpoint.resume=never to train it anew"
                        ) from error


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder.

    Raises:
        UserError: another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another process is training in {run_dir}: wait for it, "
                        "or change a setting (such as train.seed) for a run of its own") from error
    try:
        yield
    finally:
        lock.release()


def finished(recipe: Recipe) -> Result | None:
    """The result, if the run has all the steps that are asked for and is not to start over."""
    run_dir = recipe.run_dir
    if recipe.checkpoint.resume != "auto":
        return None
    try:
        result = Result(**json.loads((run_dir / "result.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    made = export_layout.whole(run_dir / result.model, recipe.method.kind.value, recipe.method.merge)
    return judged(result, recipe) if result.step >= recipe.train.max_train_steps and made else None


def resume_point(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to start from. Anything but `auto` first sets an earlier run of this folder aside."""
    atomic_files.sweep(run_dir)
    atomic_files.sweep(run_dir / "checkpoints")
    atomic_files.sweep(run_dir / "samples")
    if resume == "auto":
        return latest(run_dir / "checkpoints")
    chosen = None if resume == "never" else Path(resume).absolute()
    aside = _set_aside(run_dir)
    if aside and chosen and chosen.is_relative_to(run_dir):
        chosen = aside / chosen.relative_to(run_dir)
    return chosen


def _set_aside(run_dir: Path) -> Path | None:
    """Move an earlier run's files into `earlier-TIME/`: nothing is ever deleted for a new start."""
    old = [entry for entry in run_dir.iterdir() if entry.name not in KEPT and not entry.name.startswith("earlier-")]
    if not old:
        return None
    stamp = time.strftime("earlier-%Y%m%d-%H%M%S")
    names = (stamp if again == 1 else f"{stamp}-{again}" for again in itertools.count(1))
    aside = next(run_dir / name for name in names if not (run_dir / name).exists())
    aside.mkdir()
    for entry in old:
        entry.replace(aside / entry.name)
    return aside


def check_disk(run_dir: Path, needed: int) -> None:
    """Raise DoesNotFit when the disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise DoesNotFit(f"checkpoints and model need {needed / GIB:.1f} GiB and {run_dir} has {free / GIB:.1f} GiB "
                         "free: type run_root=DIR on a larger disk, or checkpoint.keep=1")


def forget_overrides(run_dir: Path) -> None:
    """Remove Hydra's record of what was typed, for it holds a secret."""
    shutil.rmtree(run_dir / ".hydra", ignore_errors=True)
    (run_dir.parent / "multirun.yaml").unlink(missing_ok=True)


def discard_if_unused(run_dir: Path) -> None:
    """Remove a run folder in which nothing happened, unless another process is at its beginning there."""
    if run_dir.is_dir() and {entry.name for entry in run_dir.iterdir()} <= KEPT:
        with suppress(UserError), locked(run_dir):
            shutil.rmtree(run_dir, ignore_errors=True)
