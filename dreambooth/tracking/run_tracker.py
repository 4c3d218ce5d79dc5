"""The tracker of a run for as long as it lasts; how the run ends becomes its status."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from dreambooth.config.recipe import Recipe
from dreambooth.data.photos import fingerprint, list_photos
from dreambooth.errors import Interrupted
from dreambooth.tracking import svg_charts
from dreambooth.tracking.journal import EXPERIMENT
from dreambooth.tracking.tracker import Tracker, open_tracker


class Muted:
    """The tracker of every process but the first: says nothing."""

    def metrics(self, step: int, values: Mapping[str, float]) -> bool:
        return False

    def image(self, step: int, key: str, path: Path) -> bool:
        return False

    def artifact(self, path: Path, folder: str = "") -> bool:
        return False

    def params(self, values: Mapping[str, str]) -> bool:
        return False

    def tags(self, values: Mapping[str, str]) -> bool:
        return False

    def input(self, values: Mapping[str, str]) -> bool:
        return False

    def url(self) -> str | None:
        return None

    def close(self, status: str) -> None:
        return None


@contextmanager
def tracked(recipe: Recipe, main: bool, trains: bool = True) -> Iterator[Tracker]:
    """Open the run's tracker and close it with FINISHED, KILLED (somebody stopped the run) or FAILED.

    Args:
        trains: False: the run is over, and how and when it ended stays what it was.
    """
    tracker = _open(recipe, trains) if main else Muted()
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        with suppress(OSError):
            if main and (drawn := svg_charts.write(recipe.run_dir)):
                tracker.artifact(drawn)
        tracker.close(status)


def _open(recipe: Recipe, trains: bool) -> Tracker:
    spec = recipe.tracking
    tracker = open_tracker(
        spec.kind.value, recipe.run_dir, run_root=recipe.run_root, run_name=spec.run_name or recipe.run_dir.name,
        uri=spec.uri, experiment=spec.experiment, required=spec.required, trains=trains)
    if spec.sweep:
        tracker.tags({"sweep": spec.sweep, "kind": "trial"})
    tracker.tags({"mlflow.note.content": note(recipe)})
    if recipe.instance_dir.is_dir():
        tracker.input({"name": recipe.dataset.name, "digest": fingerprint(recipe.instance_dir),
                       "source": str(recipe.instance_dir), "photos": str(len(list_photos(recipe.instance_dir)))})
    return tracker


def note(recipe: Recipe) -> str:
    """What MLflow shows on top of a run, Markdown: what it is, where to look, what to type."""
    folder, sweep = recipe.run_dir, recipe.tracking.sweep
    lines = [f"**{recipe.instance_prompt}**, {recipe.model.name} at {recipe.model.resolution} px, "
             f"method {recipe.method.name}", ""]
    if sweep:
        lines.append(f"- one trial of the sweep {sweep}: [all of them side by side]({side_by_side(sweep)})")
    return "\n".join([
        *lines, "- look at the artifacts `contact_sheet.png` (photos, then samples by step) and `curves.svg`",
        f"- the model is in `{folder / 'model'}`; draw with it:",
        f'  `python -m dreambooth.generate run={folder} prompt="{recipe.instance_prompt}"`'])


def side_by_side(sweep: str) -> str:
    """Address, inside MLflow's pages, of the charts and pictures of a sweep's trials."""
    chosen = quote(f'tags.sweep = "{sweep}" and tags.kind = "trial"')
    return f"#/experiments/{EXPERIMENT}/runs?workflowType=machine_learning&compareRunsMode=CHART&searchFilter={chosen}"
