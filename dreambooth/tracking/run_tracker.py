"""Opens and closes the tracker of a training run, and records the run's description, dataset and final status."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote

from dreambooth.config.recipe import Recipe
from dreambooth.data.index.file_hashes import fingerprint
from dreambooth.data.photos import list_photos
from dreambooth.errors import Interrupted
from dreambooth.tracking import svg_charts
from dreambooth.tracking.journal import EXPERIMENT
from dreambooth.tracking.tracker import NoOpTracker, Tracker, open_tracker
from dreambooth.utils import markdown, quoting
from dreambooth.utils.plurals import counted

log = logging.getLogger(__name__)


@contextmanager
def track_run(recipe: Recipe, main: bool, update_status: bool = True, completed: int = 0) -> Iterator[Tracker]:
    """Context manager that opens the tracker of a run, and closes it with the status of the run.

    The status is FINISHED if the block ends normally, KILLED if the user interrupts it, and FAILED after another error.

    Args:
        main: True in the process with rank 0; the other processes record nothing.
        update_status: see `JournalTracker`.
        completed: number of training steps before this start. Log a warning if the journal lacks the loss of some of
            these steps.
    """
    tracker = _open(recipe, update_status) if main else NoOpTracker()
    if missing := tracker.count_missing("loss", completed):
        log.warning("metrics.jsonl lacks the loss of %d of the %d steps before this start: the file was damaged, or "
                    "these steps were trained in another folder", missing, completed)
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        with suppress(OSError):
            if main and (curves := svg_charts.write_loss_curves(recipe.run_dir)):
                tracker.log_artifact(curves)
        tracker.close(status)


def _open(recipe: Recipe, update_status: bool) -> Tracker:
    tracking = recipe.tracking
    tracker = open_tracker(
        tracking.kind.value, recipe.run_dir, run_root=recipe.run_root,
        run_name=tracking.run_name or recipe.run_dir.name, uri=tracking.uri, experiment=tracking.experiment,
        required=tracking.required, update_status=update_status,
        sweep=tracking.sweep)
    if tracking.sweep:
        tracker.set_tags({"sweep": tracking.sweep, "kind": "trial"})
    tracker.set_tags({"mlflow.note.content": describe_run(recipe)})
    if recipe.instance_dir.is_dir():
        tracker.log_dataset({
            "name": recipe.dataset.name, "digest": fingerprint(recipe.instance_dir, run_root=recipe.run_root),
            "source": str(recipe.instance_dir), "photos": str(len(list_photos(recipe.instance_dir)))})
    return tracker


def describe_run(recipe: Recipe) -> str:
    """Return the Markdown description that MLflow shows for a run: prompt, steps, artifacts, and a command to type."""
    folder, sweep = recipe.run_dir, recipe.tracking.sweep
    lines = [f"**{markdown.escape(recipe.instance_prompt)}**, {recipe.model.name} at {recipe.model.resolution} px, "
             f"method {recipe.method.name}, {counted(recipe.train.max_train_steps, 'step')}", ""]
    if sweep:
        lines.append(f"- one trial of the sweep {sweep}: [all trials side by side]({trials_link(sweep)})")
    return "\n".join([
        *lines, "- see the artifacts `contact_sheet.png` (photos, then samples by step) and `curves.svg`",
        f"- the model is in `{folder / 'model'}`; generate images with it:", "",
        markdown.code_block(quoting.command("generate", {"run": str(folder), "prompt": recipe.instance_prompt}))])


def trials_link(sweep: str) -> str:
    """Return the link, relative to the MLflow server, to the page with charts and images of all trials of a sweep."""
    search_filter = quote(f'tags.sweep = "{sweep}" and tags.kind = "trial"')
    return ("#/experiments/" + EXPERIMENT + "/runs?workflowType=machine_learning&compareRunsMode=CHART&searchFilter="
            + search_filter)
