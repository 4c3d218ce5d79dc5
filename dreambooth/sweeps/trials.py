"""Reads the trials of a sweep from their run folders: settings, result and measures. Does not import torch."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dreambooth.config import evaluate
from dreambooth.config.enums import Direction, EncoderKind
from dreambooth.config.evaluate import (
    BORDER,
    INSTANCE_LOSS,
    PROMPT_FIDELITY,
    VALIDATION_LOSS,
    Evaluate,
    measure_name,
)
from dreambooth.data.index.file_hashes import NO_FINGERPRINT
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
# How far prompt_fidelity may be below its value before training if no bound is given. A model that has forgotten the
# scenes of prompts loses 0.5 to 1; with the default number of images, each image is 0.1.
PROMPT_FIDELITY_MARGIN = 0.25


@dataclass(frozen=True)
class Bounds:
    """Bounds of the scores of a promoted model, by the name of the setting. None: see `find_broken_bounds`."""

    max_class_similarity: float | None = None
    min_prompt_fidelity: float | None = None


_MARGINS = {  # setting -> role of the measure, and difference between the default bound and the base model's score
    "max_class_similarity": (CLASS_SIMILARITY, CLASS_SIMILARITY_MARGIN),
    "min_prompt_fidelity": (PROMPT_FIDELITY, -PROMPT_FIDELITY_MARGIN)}


@dataclass(frozen=True)
class Trial:
    """A run, read from its run folder. Usually it is one trial of a sweep.

    What is derived from the files is derived once: the commands ask each of a thousand trials many times.
    """

    folder: Path
    params: dict[str, str] = field(default_factory=dict)  # settings that MLflow shows as params
    settings: dict[str, str] = field(default_factory=dict)  # all settings, by configuration key
    result: dict[str, Any] | None = None  # content of result.json; None: the run is not finished
    photos: str | None = None  # digest of the training photos; None: the journal contains no digest

    @cached_property
    def finished(self) -> bool:
        """Whether the trial has a result and a completely exported model."""
        return self.result is not None and export_layout.is_exported(self.folder / self.result["model"], *self.method)

    @property
    def method(self) -> tuple[str, bool]:
        """The settings method.kind and method.merge. They determine whether an adapter or a whole model is exported."""
        return self.settings.get("method.kind", "full"), self.settings.get("method.merge") == "True"

    @cached_property
    def scores(self) -> dict[str, float]:
        """The scores of the exported model: its instance_loss, and the value of each measure, by name.

        A measure is a metric of image quality; see config/evaluate.py.
        """
        result = self.result or {}
        return read_scores({INSTANCE_LOSS: result.get("objective"), **(result.get("scores") or {})})

    @cached_property
    def measure_roles(self) -> dict[str, str]:
        """What each measure of the run measures (its role, such as class_similarity), by name of the measure.

        Measures that use different encoders can have the same role.
        """
        settings = self.settings
        if "evaluate.encoder" not in settings:  # run.json is damaged
            return {}
        roles = evaluate.measure_roles(Evaluate(
            encoder=EncoderKind(settings["evaluate.encoder"]), prompts=settings.get("evaluate.prompts", "scenes"),
            images_per_prompt=int(settings["evaluate.images_per_prompt"]),
            lpips=None if settings["evaluate.lpips"] == "null" else settings["evaluate.lpips"]),
            settings["dataset.class_prompt"], settings.get("model.source", ""), VALIDATION_LOSS in self.scores)
        by_border = measure_name(PROMPT_FIDELITY, BORDER)  # measured where the base model was
        return {by_border: PROMPT_FIDELITY} | roles if by_border in self.scores else roles

    @property
    def objective_name(self) -> str:
        """The setting evaluate.objective of this run."""
        return self.settings.get("evaluate.objective", INSTANCE_LOSS)

    @cached_property
    def objectives(self) -> dict[str, float]:
        """The value of each of several objectives, by name; {} if there is one, or one of them is not finite."""
        try:
            values = evaluate.compute_objectives(self.objective_name, self.measure_roles, self.scores)
        except (ValueError, KeyError):
            return {}
        return values if all(map(math.isfinite, values.values())) else {}

    def value(self, name: str) -> float:
        """Return the value of a measure, of a sum of measures or of instance_loss, with its own sign; nan if unknown.

        Raises:
            UserError: as in `objective`.
        """
        if name == INSTANCE_LOSS:
            return self.scores[INSTANCE_LOSS]
        sign = 1 if evaluate.better_direction(name) is Direction.min else -1
        return sign * self.objective(name)

    def objective(self, name: str) -> float:
        """Return the value of an objective for this trial. Lower values are better.

        Return nan if a measure in `name` has no score. Return instance_loss if it is not finite, because the run then
        diverged.

        Args:
            name: instance_loss, a measure, or a sum of measures, as in evaluate.objective. Of several objectives, the
                first one counts.

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


def find_broken_bounds(trial: Trial, bounds: Bounds) -> dict[str, str]:
    """Return the bounds that a trial violates: for each, the name of the setting and what is wrong with the trial.

    If class_similarity exceeds its bound, generated images of the class resemble the subject too much. If
    prompt_fidelity is below its bound, the model no longer generates the surroundings that prompts describe. A measure
    without a score violates no bound.

    Args:
        bounds: a bound that is None is that of the run, such as evaluate.max_class_similarity. If the run has none
            either, the bound is the score before training plus CLASS_SIMILARITY_MARGIN, or minus
            PROMPT_FIDELITY_MARGIN.
    """
    broken = {}
    for key, (role, margin) in _MARGINS.items():
        if (score := trial.score(role)) is None:
            continue
        (name, value, base), given = score, _given_bound(trial, key, bounds)
        limit = given if given is not None else base + margin
        if (value > limit) if margin > 0 else (value < limit - 1e-9):
            broken[key] = (f"{trial.folder.name} has {name} {value:.3f}, {'over' if margin > 0 else 'under'} "
                           f"{limit:.3f}")
    return broken


def reason_out_of_bounds(trial: Trial, bounds: Bounds) -> str | None:
    """Return why a trial must not be promoted because of its bounds, or None if it may be promoted.

    A trial must not be promoted if it violates a bound (`find_broken_bounds`). If the user has set a bound, in `bounds`
    or for the run, a trial must not be promoted either if the measure of this bound has no score.
    """
    unmeasured = [reason for key, (role, _) in _MARGINS.items()
                  if _given_bound(trial, key, bounds) is not None and (reason := _reason_unmeasured(trial, role))]
    return "; ".join([*unmeasured, *find_broken_bounds(trial, bounds).values()]) or None


def reason_not_checked(trial: Trial, bounds: Bounds) -> str | None:
    """Return why a score of a trial cannot be compared with its bound; None if all can.

    The reason is that class_similarity was not measured, or that its bound depends on class_similarity before training,
    which was not measured. prompt_fidelity must be measured only if the user has set its bound, because earlier
    versions of this package did not measure it.

    Args:
        bounds: as in `find_broken_bounds`.
    """
    if reason := _reason_unmeasured(trial, CLASS_SIMILARITY):
        return reason
    score = trial.score(CLASS_SIMILARITY)
    if score and _given_bound(trial, "max_class_similarity", bounds) is None and not math.isfinite(score[2]):
        return f"{trial.folder.name} did not measure {CLASS_SIMILARITY} before training"
    fidelity_bound = _given_bound(trial, "min_prompt_fidelity", bounds)
    return _reason_unmeasured(trial, PROMPT_FIDELITY) if fidelity_bound is not None else None


def _reason_unmeasured(trial: Trial, role: str) -> str | None:
    score = trial.score(role)
    return f"{trial.folder.name} did not measure {role}" if score is None or not math.isfinite(score[1]) else None


def _given_bound(trial: Trial, key: str, bounds: Bounds) -> float | None:
    """Return the bound that the user has set, in `bounds` or for the run; None if there is none."""
    bound: float | None = getattr(bounds, key)
    run_bound = trial.settings.get(f"evaluate.{key}", "null")
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
