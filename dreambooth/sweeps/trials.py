"""Reads the trials of a sweep from their run folders: settings, result and measures. Does not import torch."""

import logging
import math
from collections.abc import Mapping
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
from dreambooth.utils import atomic_files, permissions
from dreambooth.utils.plurals import counted

log = logging.getLogger(__name__)
CLASS_SIMILARITY = "class_similarity"
# How far class_similarity may exceed its value before training if no bound is given. Training without prior
# preservation raises class_similarity by 0.2 to 0.4.
CLASS_SIMILARITY_MARGIN = 0.1


@dataclass(frozen=True)
class Trial:
    """A run, read from its run folder. Usually it is one trial of a sweep."""

    folder: Path
    params: dict[str, str] = field(default_factory=dict)  # settings that MLflow shows as params
    settings: dict[str, str] = field(default_factory=dict)  # all settings, by configuration key
    result: dict[str, Any] | None = None  # content of result.json; None: the run is not finished
    photos: str | None = None  # digest of the training photos; None: the journal contains no digest

    @property
    def finished(self) -> bool:
        """Whether the trial has a result and a completely exported model."""
        return self.result is not None and export_layout.is_exported(self.folder / self.result["model"], *self.method)

    @property
    def method(self) -> tuple[str, bool]:
        """The settings method.kind and method.merge. They determine whether an adapter or a whole model is exported."""
        return self.settings.get("method.kind", "full"), self.settings.get("method.merge") == "True"

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the exported model: its instance_loss, and the value of each measure, by name.

        A measure is a metric of image quality; see config/evaluate.py.
        """
        result = self.result or {}
        return read_scores({INSTANCE_LOSS: result.get("objective"), **(result.get("scores") or {})})

    @property
    def measure_roles(self) -> dict[str, str]:
        """What each measure of the run measures (its role, such as class_similarity), by name of the measure.

        Measures that use different encoders can have the same role.
        """
        settings = self.settings
        if "evaluate.encoder" not in settings:  # run.json is damaged
            return {}
        return evaluate.measure_roles(Evaluate(
            encoder=EncoderKind(settings["evaluate.encoder"]),
            images_per_prompt=int(settings["evaluate.images_per_prompt"]),
            lpips=None if settings["evaluate.lpips"] == "null" else settings["evaluate.lpips"]),
            settings["dataset.class_prompt"])

    @property
    def objective_name(self) -> str:
        """The setting evaluate.objective of this run."""
        return self.settings.get("evaluate.objective", INSTANCE_LOSS)

    def objective(self, name: str) -> float:
        """Return the value of an objective for this trial. Lower values are better.

        Return nan if a measure in `name` has no score. Return instance_loss if it is not finite, because the run then
        diverged.

        Args:
            name: instance_loss, a measure, or a sum of measures, as in evaluate.objective.

        Raises:
            UserError: `name` contains a measure that does not exist, or that the settings of this trial do not select.
        """
        if name == INSTANCE_LOSS or not math.isfinite(self.scores[INSTANCE_LOSS]):
            return self.scores[INSTANCE_LOSS]
        try:
            return evaluate.compute_objective(name, self.measure_roles, self.scores)
        except ValueError as error:
            raise UserError(f"objective {error}") from error
        except KeyError:
            return math.nan

    def score(self, role: str) -> tuple[str, float, float] | None:
        """Return (name, value, value before training) of a measure with this role; None if none was computed.

        If the measure was not computed before training, the last item of the tuple is nan. If several computed measures
        have the role, the first in the order of `measure_roles` is returned.

        Args:
            role: a role of `measure_roles`, such as class_similarity.
        """
        base = read_scores((self.result or {}).get("base_scores") or {})
        names = [name for name, own_role in self.measure_roles.items() if own_role == role and name in self.scores]
        return (names[0], self.scores[names[0]], base.get(names[0], math.nan)) if names else None


def read_scores(scores: Mapping[str, float | None]) -> dict[str, float]:
    """Return scores of result.json, by name. In the file, null stands for nan."""
    return {name: math.nan if value is None else float(value) for name, value in scores.items()}


def load_trials(run_root: Path, sweep: str) -> list[Trial]:
    """Return the trials of a sweep, oldest first.

    Args:
        run_root: folder that contains the run folders.
        sweep: the sweep's ID.

    Raises:
        UserError: no run in `run_root` belongs to the sweep.
    """
    if not (trials := find_trials(run_root, sweep)):
        raise UserError(f"no run in {run_root} belongs to the sweep {sweep}: type sweep=ID, the value of "
                        "tracking.sweep and of the tag sweep in MLflow, and run_root=DIR where its runs are")
    return trials


def find_trials(run_root: Path, sweep: str) -> list[Trial]:
    """Return the trials of a sweep, oldest first, like load_trials; an empty list if no run belongs to the sweep.

    Log a warning if there are run folders that this user may not read, as one of them may be a trial of the sweep.
    """
    found: list[tuple[int, Path, Trial]] = []
    refused: list[OSError] = []
    for folder in run_root.glob("*/"):
        try:
            if sweep in (summary := _summarize(folder / "metrics.jsonl")).sweeps:
                found.append((summary.start, folder, _to_trial(folder, summary)))
        except PermissionError as error:
            refused.append(error)
    if refused and (refusal := permissions.find_refusal(refused[0])):
        log.warning("%s cannot be read by this user and will be left out (%s): type %s",
                    counted(len(refused), "run"), refusal.describe(), refusal.command())
    return [trial for _, _, trial in sorted(found, key=lambda item: item[:2])]


def load_trial(folder: Path) -> Trial:
    """Read one run folder as a trial, even if the run does not belong to a sweep."""
    return _to_trial(folder, _summarize(folder / "metrics.jsonl"))


def reason_over_bound(trial: Trial, bound: float | None) -> str | None:
    """Return why a trial must not be promoted because of its class_similarity, or None if it may be promoted.

    A trial must not be promoted if its class_similarity exceeds the bound: generated images of the class then resemble
    the subject too much. If the user has set the bound, with `bound` or with evaluate.max_class_similarity, a trial
    must not be promoted either if its class_similarity was not measured.

    Args:
        bound: greatest allowed class_similarity. None: evaluate.max_class_similarity of the run. If this setting is not
            set either, the bound is class_similarity before training plus CLASS_SIMILARITY_MARGIN.
    """
    given, score = _given_bound(trial, bound), trial.score(CLASS_SIMILARITY)
    not_checked = reason_not_checked(trial, bound)
    if not_checked or score is None:
        return not_checked if given is not None else None
    name, value, base = score
    limit = given if given is not None else base + CLASS_SIMILARITY_MARGIN
    return f"{trial.folder.name} has {name} {value:.3f}, over {limit:.3f}" if value > limit else None


def reason_not_checked(trial: Trial, bound: float | None) -> str | None:
    """Return why the class_similarity of a trial cannot be compared with its bound; None if it can.

    The reason is that class_similarity was not measured, or that the bound depends on class_similarity before training,
    which was not measured.

    Args:
        bound: as in `reason_over_bound`.
    """
    score = trial.score(CLASS_SIMILARITY)
    if score is None or not math.isfinite(score[1]):
        return f"{trial.folder.name} did not measure {CLASS_SIMILARITY}"
    if _given_bound(trial, bound) is None and not math.isfinite(score[2]):
        return f"{trial.folder.name} did not measure {CLASS_SIMILARITY} before training"
    return None


def _given_bound(trial: Trial, bound: float | None) -> float | None:
    run_bound = trial.settings.get("evaluate.max_class_similarity", "null")
    return bound if bound is not None else None if run_bound == "null" else float(run_bound)


@dataclass
class _JournalSummary:
    """Summary of a run's journal (metrics.jsonl)."""

    start: int = 0  # time of the first entry, in milliseconds since 1970
    sweeps: set[str] = field(default_factory=set)  # the sweeps that the run was part of
    params: dict[str, str] = field(default_factory=dict)
    photos: str | None = None


def _summarize(journal: Path) -> _JournalSummary:
    """Read and summarize a journal.

    One MLflow run describes a sweep as a whole, and is not a trial. If the journal belongs to such a run, the field
    `sweeps` of the result is empty.
    """
    summary = _JournalSummary()
    try:
        for entry, _ in read(journal):
            summary.start = summary.start or entry["time"]
            tags, photos = entry.get("tags", {}), entry.get("input", {}).get("digest", NO_FINGERPRINT)
            if tags.get("kind") == "sweep":
                return _JournalSummary(summary.start)
            summary.sweeps |= {tags["sweep"]} if "sweep" in tags else set()
            summary.params |= entry.get("params", {})
            summary.photos = photos if photos != NO_FINGERPRINT else summary.photos
    except PermissionError:
        raise
    except OSError:
        pass
    return summary


def _to_trial(folder: Path, summary: _JournalSummary) -> Trial:
    result = atomic_files.read_object(folder / "result.json")
    if result is not None and not ("step" in result and isinstance(result.get("model"), str)):
        result = None  # damaged
    return Trial(folder, summary.params, export_layout.read_settings(folder), result, summary.photos)
