"""The trials of a sweep, read from their run folders: what each was asked, how it ended, what it measured. No torch."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreambooth.config import evaluate
from dreambooth.config.enums import EncoderKind
from dreambooth.config.evaluate import INSTANCE_LOSS, Evaluate
from dreambooth.data.photos import NO_FINGERPRINT
from dreambooth.errors import UserError
from dreambooth.serialization import export_layout
from dreambooth.tracking.journal import read

ROOM = 0.1  # of class_similarity over the base's, where no bound is given; without a prior it gains 0.2 to 0.4
ROLE = "class_similarity"


@dataclass(frozen=True)
class Trial:
    """A run folder that carries the tag of a sweep."""

    folder: Path
    params: dict[str, str] = field(default_factory=dict)  # what it is told apart by, as MLflow has it
    settings: dict[str, str] = field(default_factory=dict)  # all of them, by override key
    result: dict[str, Any] | None = None  # result.json; None: not finished
    photos: str | None = None  # digest of what it was trained on; None: its journal does not say

    @property
    def finished(self) -> bool:
        """Whether there is a result and the model that it names."""
        return self.result is not None and export_layout.whole(self.folder / self.result["model"], *self.method)

    @property
    def method(self) -> tuple[str, bool]:
        """method.kind and method.merge, by which `exported` knows what its model is."""
        return self.settings.get("method.kind", "full"), self.settings.get("method.merge") == "True"

    @property
    def scores(self) -> dict[str, float]:
        """Measures of the exported weights by name, and instance_loss."""
        result = self.result or {}
        scores: dict[str, float] = {INSTANCE_LOSS: result.get("objective", math.nan), **result.get("scores", {})}
        return scores

    @property
    def measured(self) -> dict[str, str]:
        """name -> role of what it measures."""
        told = self.settings
        return evaluate.known(Evaluate(
            encoder=EncoderKind(told["evaluate.encoder"]), images_per_prompt=int(told["evaluate.images_per_prompt"]),
            lpips=None if told["evaluate.lpips"] == "null" else told["evaluate.lpips"]), told["dataset.class_prompt"])

    @property
    def asked(self) -> str:
        """The text of evaluate.objective that it was trained with."""
        return self.settings.get("evaluate.objective", INSTANCE_LOSS)

    def objective(self, text: str) -> float:
        """Lower is better; not a number if it was not measured.

        Raises:
            UserError: the text names nothing that this trial measures.
        """
        if text == INSTANCE_LOSS:
            return self.scores[INSTANCE_LOSS]
        try:
            return evaluate.objective(text, self.measured, self.scores)
        except ValueError as error:
            raise UserError(f"objective {error}") from error
        except KeyError:
            return math.nan

    def score(self, role: str) -> tuple[str, float, float] | None:
        """Name, value and the base's value of the first measure of a role; None: it was not measured."""
        base = (self.result or {}).get("base_scores", {})
        names = [name for name, of in self.measured.items() if of == role and name in self.scores]
        return (names[0], self.scores[names[0]], base.get(names[0], math.nan)) if names else None


def find(run_root: Path, sweep: str) -> list[Trial]:
    """The trials of a sweep in a folder of runs, oldest first."""
    found = [(journal.parent, _told(journal)) for journal in run_root.glob("*/metrics.jsonl")]
    mine = [(folder, told) for folder, told in found if sweep in told.sweeps]
    return [_opened(folder, told) for folder, told in sorted(mine, key=lambda item: (item[1].began, item[0]))]


def of_sweep(run_root: Path, sweep: str) -> list[Trial]:
    """As find.

    Raises:
        UserError: there is none.
    """
    if not (trials := find(run_root, sweep)):
        raise UserError(f"no run in {run_root} belongs to the sweep {sweep}: type sweep=ID, the value of "
                        "tracking.sweep and of the tag sweep in MLflow, and run_root=DIR where its runs are")
    return trials


def open_trial(folder: Path) -> Trial:
    """A run folder as a trial."""
    return _opened(folder, _told(folder / "metrics.jsonl"))


def _opened(folder: Path, told: "_Told") -> Trial:
    run = _json(folder / "run.json") or {}
    return Trial(folder, told.params, run.get("settings", {}), _json(folder / "result.json"), told.photos)


def over_bound(trial: Trial, bound: float | None) -> str | None:
    """Why the class of a trial is too much like the subject; None: it is not, or it was not measured and no bound is
    given."""
    own = trial.settings.get("evaluate.max_class_similarity", "null")
    asked = bound if bound is not None else None if own == "null" else float(own)
    score = trial.score(ROLE)
    if score is None:
        return None if asked is None else f"{trial.folder.name} did not measure {ROLE}"
    name, value, base = score
    limit = asked if asked is not None else base + ROOM
    return f"{trial.folder.name} has {name} {value:.3f}, over {limit:.3f}" if value > limit else None


@dataclass
class _Told:
    """What a journal says of its run."""

    began: int = 0  # milliseconds since 1970
    sweeps: set[str] = field(default_factory=set)  # those that it was part of
    params: dict[str, str] = field(default_factory=dict)
    photos: str | None = None


def _told(journal: Path) -> _Told:
    """Read one. A sweep's own run is no trial of it."""
    told = _Told()
    with suppress(OSError):
        for entry, _ in read(journal):
            told.began = told.began or entry["time"]
            tags, photos = entry.get("tags", {}), entry.get("input", {}).get("digest", NO_FINGERPRINT)
            if tags.get("kind") == "sweep":
                return _Told(told.began)
            told.sweeps |= {tags["sweep"]} if "sweep" in tags else set()
            told.params |= entry.get("params", {})
            told.photos = photos if photos != NO_FINGERPRINT else told.photos
    return told


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
