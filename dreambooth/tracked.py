"""The tracker of a run for as long as it lasts; how the run ends becomes its status."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dreambooth.errors import Interrupted
from dreambooth.recipe import Recipe
from dreambooth.tracking import Tracker, open_tracker


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

    def url(self) -> str | None:
        return None

    def close(self, status: str) -> None:
        return None


@contextmanager
def tracked(recipe: Recipe, main: bool) -> Iterator[Tracker]:
    """Open the run's tracker and close it with FINISHED, KILLED (somebody stopped the run) or FAILED."""
    tracker = _open(recipe) if main else Muted()
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        tracker.close(status)


def _open(recipe: Recipe) -> Tracker:
    spec = recipe.tracking
    tracker = open_tracker(
        spec.kind.value, recipe.run_dir, run_root=recipe.run_root, run_name=recipe.run_dir.name, uri=spec.uri,
        experiment=spec.experiment, required=spec.required)
    if spec.sweep:
        tracker.tags({"sweep": spec.sweep})
    return tracker
