"""Promotion: which model of a sweep the team uses from now on, by a rule.

A model becomes `champion` of its name in MLflow's registry when

1. its objective is a number, lower than every other trial's, and lower than that of the champion there is;
2. that champion was trained on the same photos: of others no objective says which model is better;
3. pictures of the class look like photos of the subject at most as much as the bound allows (`class_similarity`, the
   paper's PRES by whichever encoder looked): max_class_similarity, or ROOM over what the base had before training.

With `replace` it takes the place of whatever champion there is, and only the third holds. A former champion keeps its
version and loses the alias. A run with evaluate.promote=true offers its model when it ends: it becomes champion by the
same rule, or `candidate`.
"""

import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.runs.report import promoted
from dreambooth.runs.run_folder import locked
from dreambooth.serialization import export_layout
from dreambooth.sweeps.trials import ROLE, Trial, of_sweep, open_trial, over_bound
from dreambooth.tracking.model_registry import CANDIDATE, CHAMPION, Registry, Version
from dreambooth.tracking.tracker import open_tracker
from dreambooth.utils import atomic_files
from dreambooth.utils.provenance import clean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    """Where models are registered and what they are judged by; None: as the runs have it."""

    uri: str | None = None
    experiment: str = "dreambooth"
    name: str | None = None
    objective: str | None = None
    max_class_similarity: float | None = None
    replace: bool = False  # whatever champion there is, without a comparison
    default_uri: str | None = None  # for runs that no server has; None: sqlite in the folder of the runs


def promote(sweep: str, run_root: Path, terms: Terms) -> dict[str, Any]:
    """Make the best finished trial of a sweep the champion, and write `promoted.json` into the folder of the runs.

    Raises:
        UserError: no trial satisfies the rule, there is no such sweep, or MLflow does not answer.
    """
    trials = of_sweep(run_root, sweep)
    finished = [trial for trial in trials if trial.finished]
    if not finished:
        raise UserError(f"none of the {len(trials)} runs of the sweep {sweep} is finished: repeat its command")
    text = _common(finished, terms.objective)
    terms = replace(terms, objective=text)
    ordered = sorted((trial for trial in finished if math.isfinite(trial.objective(text))),
                     key=lambda trial: trial.objective(text))
    refused = [reason for trial in ordered if (reason := over_bound(trial, terms.max_class_similarity))]
    best = next((trial for trial in ordered if not over_bound(trial, terms.max_class_similarity)), None)
    if best is None:
        raise UserError(f"nothing to promote in the sweep {sweep}: " + (
            "; ".join(refused) + ": type max_class_similarity=NUMBER to allow it" if refused else
            f"no finished run measured {text}: type objective=instance_loss"))
    told = _register(best, terms, sweep, alone=False)
    atomic_files.write_json(run_root / "promoted.json", told)
    return told


def offer(run_dir: Path, terms: Terms) -> dict[str, Any]:
    """A finished run's own model: registered as champion if it satisfies the rule, else as candidate.

    Raises:
        UserError: it is over the bound, did not measure its objective, or MLflow does not answer.
    """
    trial = open_trial(run_dir)
    terms = replace(terms, objective=terms.objective or trial.asked)
    if not math.isfinite(trial.objective(str(terms.objective))):
        raise UserError(f"the model is not registered: {trial.folder.name} did not measure {terms.objective}")
    if reason := over_bound(trial, terms.max_class_similarity):
        raise UserError(f"the model is not registered: {reason}")
    return _register(trial, terms, None, alone=True)


def offered(recipe: Recipe) -> None:
    """Offer a run that has just finished and say what came of it; a warning if nothing could, since the run is done."""
    spec, own = recipe.tracking, recipe.evaluate
    if reason := over_bound(open_trial(recipe.run_dir), own.max_class_similarity):
        print(f"the model is not registered: {reason}")
        return
    try:
        print(promoted(offer(recipe.run_dir, Terms(
            spec.uri, spec.experiment, objective=own.objective, max_class_similarity=own.max_class_similarity))))
    except UserError as error:
        if spec.required:
            raise
        log.warning("%s; repeat the command to try again", error)


def _common(trials: Sequence[Trial], asked: str | None) -> str:
    """The one objective that trials compare by."""
    texts = {asked} if asked else {trial.asked for trial in trials}
    if len(texts) > 1:
        raise UserError(f"the runs have several objectives ({', '.join(sorted(map(str, texts)))}): type objective=ONE")
    return str(texts.pop())


def _register(trial: Trial, terms: Terms, sweep: str | None, alone: bool) -> dict[str, Any]:
    uri, run_id = _sent(trial, terms)
    registry, text = Registry(uri), terms.objective or trial.asked
    value, score, result = trial.objective(text), trial.score(ROLE), trial.result or {}
    name = terms.name or trial.settings.get("name", trial.folder.name)
    tags = {"objective": f"{value:.6g}", "objective_name": text, "run": trial.folder.name, "step": str(result["step"]),
            "holds": "adapter" if export_layout.adapter_only(*trial.method) else "model",
            "base": trial.settings.get("model.source", ""), "exported_step": str(result.get("exported_step") or ""),
            "photos": trial.photos or "", "instance_prompt": trial.settings.get("dataset.instance_prompt", ""),
            **({score[0]: f"{score[1]:.6g}"} if score else {})}
    tags = {key: told for key, told in tags.items() if told}
    before = registry.holder(name, CHAMPION)
    mine = before is not None and before.run_id == run_id and before.tags.get("step") == str(result["step"])
    reason = None if before is None or mine or terms.replace else _kept(before, trial, text, tags)
    if reason and not alone:
        raise UserError(f"nothing to promote in the sweep {sweep}: {reason}")
    version = registry.register(name, run_id, trial.folder / result["model"], tags)
    alias = CANDIDATE if reason else CHAMPION
    registry.name_holder(version, alias)
    _tidy(registry, version, alias)
    return {
        "sweep": sweep, "run": trial.folder.name, "run_dir": str(trial.folder), "model": str(
            trial.folder / result["model"]), "alias": alias, "name": name, "version": version.number,
        "model_uri": f"models:/{name}@{alias}", "server": clean(uri, uri), "objective": value, "objective_name": text,
        ROLE: score and {"name": score[0], "value": score[1], "base": score[2]},
        "replaced": before.number if before and not (mine or reason) else None, "mlflow_run_id": run_id,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _tidy(registry: Registry, version: Version, alias: str) -> None:
    """A champion is no candidate any more, if whoever promotes may say so: taking an alias away wants MANAGE."""
    waiting = registry.holder(version.name, CANDIDATE)
    if alias == CHAMPION and waiting and waiting.number == version.number:
        with suppress(UserError):
            registry.drop(version.name, CANDIDATE)


def _kept(champion: Version, trial: Trial, text: str, tags: dict[str, str]) -> str | None:
    """Why a trial does not replace a champion, and what to type; None: it does."""
    who = f"the champion of {champion.name}, version {champion.number},"
    own = "name=NAME for a model of its own, or replace=true"
    judged_by, theirs = champion.tags.get("objective_name"), math.nan
    with suppress(ValueError):
        theirs = float(champion.tags.get("objective", ""))
    if judged_by is None or not math.isfinite(theirs):
        return f"{who} was not registered by dreambooth, so that nothing says how good it is: type {own}"
    if _of_other_photos(champion.tags, tags):
        return f"{who} is of other photos: type {own}"
    if judged_by != text:
        return f"{who} was chosen by {judged_by}, not by {text}: type objective={judged_by}, {own}"
    mine = float(tags["objective"])
    return None if mine < theirs else f"{trial.folder.name} has {text} {mine:.4f} and {who} {theirs:.4f}: type {own}"


def _of_other_photos(theirs: dict[str, str], tags: dict[str, str]) -> bool:
    """By the digest of the photos, or else by the instance prompt."""
    for key in ("photos", "instance_prompt"):
        if key in theirs and key in tags:
            return theirs[key] != tags[key]
    return False


def _sent(trial: Trial, terms: Terms) -> tuple[str, str]:
    """Send what MLflow does not have yet of the run. Returns the server's address and the run's id there."""
    root, known = trial.folder.parent, str(_known(trial.folder).get("uri", ""))
    # A database may have moved with its folder; a server has not.
    address = terms.uri or (known if known.startswith("http") else terms.default_uri) or None
    with locked(trial.folder):
        open_tracker("mlflow", trial.folder, run_root=root, run_name=trial.folder.name, uri=address,
                     experiment=terms.experiment, required=True, trains=False).close("FINISHED")
    return address or f"sqlite:///{root.resolve()}/mlflow.db", str(_known(trial.folder)["run_id"])


def _known(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads((folder / "mlflow.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
