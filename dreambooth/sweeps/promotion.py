"""Promotion: registers the best model of a sweep in MLflow's model registry under the alias `champion`.

A model becomes the champion of its registered name if

1. its objective is a finite number, is lower than the objective of the current champion, and is the lowest among
   those trials of the sweep that satisfy rules 3 and 4;
2. the current champion was trained on the same photos, because objectives on other photos cannot be compared;
3. its `class_similarity` (PRES in the DreamBooth paper, here measured with any encoder) is within a bound, because
   images of the class must not resemble photos of the subject. The bound is the option max_class_similarity. If this
   option is not set, the bound is evaluate.max_class_similarity of the run. If this is not set either, the bound is
   class_similarity before training plus CLASS_SIMILARITY_MARGIN. A model whose class_similarity was not measured
   becomes the champion only with the option allow_unmeasured;
4. its `prompt_fidelity` is within a bound, because images must show the surroundings that their prompts describe. The
   bound is the option min_prompt_fidelity, evaluate.min_prompt_fidelity of the run, or prompt_fidelity before training
   minus PROMPT_FIDELITY_MARGIN. Earlier versions of this package did not measure prompt_fidelity; a model without it
   satisfies the default bound.

If the runs have several objectives, the option `rule` bounds all but one of them, such as class_drift<=0.1, and rule 1
compares the remaining one (front_rules.py). The rule itself is a tag of the version: models that were chosen by other
rules are not compared.

With the option `replace`, the best model of the sweep becomes the champion without a comparison with the current
champion. The registry moves the alias to the new version and keeps the version of the previous champion. A run with
evaluate.promote=true registers its own model when it ends: as champion if the rules allow it, otherwise as `candidate`.
A model that violates rule 3 or rule 4 is not registered.

A promotion has three steps: it reads the champion, compares, and sets the alias. MLflow has no operation that does all
three at once, so simultaneous promotions can interfere. Each promotion therefore marks its version with a tag during
the three steps. Afterwards it waits until no other version is marked, and reads the champion again. If a worse model
has become the champion meanwhile, the promotion repeats the three steps.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreambooth.config import validation
from dreambooth.config.evaluate import PROMPT_FIDELITY
from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.runs.report import promotion_message
from dreambooth.runs.run_folder import locked
from dreambooth.serialization import export_layout
from dreambooth.sweeps import front_rules
from dreambooth.sweeps.trials import (
    CLASS_SIMILARITY,
    Bounds,
    Trial,
    find_broken_bounds,
    load_trial,
    load_trials,
    reason_not_checked,
    reason_out_of_bounds,
)
from dreambooth.tracking.mlflow_database import database_uri, is_local
from dreambooth.tracking.mlflow_model import find_reference, linked_model
from dreambooth.tracking.model_registry import CANDIDATE, CHAMPION, Registry, Version
from dreambooth.tracking.tracker import open_tracker
from dreambooth.utils import atomic_files, quoting
from dreambooth.utils.masking import mask_urls

CHOOSING_TAG = "promotion"  # tag of a version: "choosing since UNIX_TIME", or "decided"
CHOOSING_SECONDS = 30.0  # longest wait for the mark of another promotion, which a killed process leaves for ever
POLL_INTERVAL = 0.5  # seconds between two looks at the marks
MAX_ROUNDS = 10  # comparisons with a champion that changes each time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromotionOptions:
    """Options of a promotion: the MLflow server, the name of the registered model, and the rules of the comparison."""

    uri: str | None = None  # MLflow server; None: the server to which the run was logged, else default_uri
    experiment: str = "dreambooth"
    name: str | None = None  # name of the registered model; None: the name of the run
    objective: str | None = None  # objective of the comparison; None: evaluate.objective of the run
    max_class_similarity: float | None = None  # None: the run's own bound, see find_broken_bounds
    replace: bool = False  # whether to replace the current champion without a comparison
    default_uri: str | None = None  # used if no server has the run; None: SQLite file beside the run folders
    uri_key: str = "uri"  # key with which the user can name another server, for messages
    key_prefix: str = ""  # prefix of the keys with which the user can change the rules, for messages
    allow_unmeasured: bool = False  # whether a model may be champion if its class_similarity was not measured
    min_prompt_fidelity: float | None = None  # None: the run's own bound, see find_broken_bounds
    include_base: bool = False  # whether the base model of an adapter is registered with it
    rule: str | None = None  # conditions that a promoted model must satisfy, see front_rules.py; None: none

    @property
    def bounds(self) -> Bounds:
        """The bounds that the user has set."""
        return Bounds(self.max_class_similarity, self.min_prompt_fidelity)


def promote(sweep: str, run_root: Path, options: PromotionOptions) -> dict[str, Any]:
    """Register the model of a sweep's best finished trial as champion.

    Returns:
        A description of the registered version. It is also written to `promoted.json` in `run_root`.

    Raises:
        UserError: no run in `run_root` belongs to the sweep, no trial satisfies the rules of this module (see its
            docstring), or MLflow does not answer.
    """
    trials = load_trials(run_root, sweep)
    finished = [trial for trial in trials if trial.finished]
    atomic_files.check_writable(run_root, "make the folder writable, for promoted.json")
    if not finished:
        raise UserError(f"none of the {len(trials)} runs of the sweep {sweep} is finished: repeat its command")
    best, objective = choose_best(finished, sweep, options)
    options = replace(options, objective=objective)
    export_layout.check_intact(best.folder / (best.result or {})["model"])
    record = _register(best, options, sweep, as_candidate=False)
    atomic_files.write_json(run_root / "promoted.json", record)
    return record


def choose_best(finished: Sequence[Trial], sweep: str, options: PromotionOptions) -> tuple[Trial, str]:
    """Return the trial with the lowest objective among those that satisfy rules 1, 3 and 4 of this module.

    Return the name of this objective, too: of several, the one that the rule leaves.

    Args:
        finished: trials that have a result.
        sweep: the sweep's ID, for messages.

    Raises:
        UserError: no trial satisfies the rules, or the trials have several objectives, and `options` has neither one of
            them nor a rule that leaves one.
    """
    objective = front_rules.resolve_objective(_common_objective(finished, options.objective), options.rule,
                                              options.key_prefix)
    conditions = front_rules.parse_rule(options.rule)
    ranked = sorted((trial for trial in finished if math.isfinite(trial.objective(objective))),
                    key=lambda trial: trial.objective(objective))
    broken = [find_broken_bounds(trial, options.bounds) for trial in ranked]
    not_checked = [None if options.allow_unmeasured else reason_not_checked(trial, options.bounds) for trial in ranked]
    reasons = [first or "; ".join(second.values()) or front_rules.reason_broken(trial, conditions)
               for trial, first, second in zip(ranked, not_checked, broken, strict=True)]
    best = next((trial for trial, reason in zip(ranked, reasons, strict=True) if not reason), None)
    if best is None:
        keys = [f"{options.key_prefix}{key}=NUMBER" for key in dict.fromkeys(key for keys in broken for key in keys)]
        keys += ["allow_unmeasured=true"] * any(not_checked) + ["rule=RULE"] * bool(conditions)
        raise UserError(f"nothing to promote in the sweep {sweep}: " + (
            f"{'; '.join(filter(None, reasons))}: type {' or '.join(keys)} to allow it" if ranked else
            f"no finished run measured {objective}: type {options.key_prefix}objective=instance_loss"))
    return best, objective


def register_run(run_dir: Path, options: PromotionOptions) -> dict[str, Any]:
    """Register the model of a finished run: as champion if the rules allow it, else as candidate.

    Returns:
        A description of the registered version.

    Raises:
        UserError: a score of the run is out of its bounds (`reason_out_of_bounds`), the run did not measure the
            objective, or MLflow does not answer.
    """
    trial = load_trial(run_dir)
    objective = options.objective or trial.objective_name
    if not math.isfinite(trial.objective(objective)):
        raise UserError(f"the model is not registered: {trial.folder.name} did not measure {objective}")
    if reason := reason_out_of_bounds(trial, options.bounds):
        raise UserError(f"the model is not registered: {reason}")
    return _register(trial, options, None, as_candidate=True)


def register_finished_run(recipe: Recipe) -> None:
    """Register the model of a run that has just ended, and print the result.

    If MLflow rejects the model and tracking.required is not set, log a warning, because the run itself has succeeded.

    Raises:
        UserError: MLflow rejects the model, and tracking.required is set.
    """
    tracking, evaluate = recipe.tracking, recipe.evaluate
    bounds = Bounds(evaluate.max_class_similarity, evaluate.min_prompt_fidelity)
    if reason := reason_out_of_bounds(load_trial(recipe.run_dir), bounds):
        print(f"the model is not registered: {reason}")
        return
    try:
        print(promotion_message(register_run(recipe.run_dir, PromotionOptions(
            tracking.uri, tracking.experiment, objective=evaluate.objective, uri_key="tracking.uri",
            max_class_similarity=evaluate.max_class_similarity, min_prompt_fidelity=evaluate.min_prompt_fidelity))))
    except UserError as error:
        if tracking.required:
            raise
        log.warning("%s; repeat the command to try again", error)


def _common_objective(trials: Sequence[Trial], given: str | None) -> str:
    """Return the name of the objective by which all trials are compared.

    Args:
        given: the objective that the user has chosen; None: evaluate.objective of the trials.

    Raises:
        UserError: `given` is None, and evaluate.objective differs between the trials.
    """
    names = {given} if given else {trial.objective_name for trial in trials}
    if len(names) > 1:
        raise UserError(f"the runs have several objectives ({', '.join(sorted(map(str, names)))}): type objective=ONE")
    return str(names.pop())


def _register(trial: Trial, options: PromotionOptions, sweep: str | None, as_candidate: bool) -> dict[str, Any]:
    """Register the model of a trial, with the alias champion or candidate. Return a description of the new version.

    Args:
        as_candidate: determines what happens if the model may not replace the champion. True: register the model as
            candidate; False: raise UserError.
    """
    name = options.name or trial.settings.get("name", trial.folder.name)
    for problem in validation.name_problem("name", name):
        raise UserError(problem)
    uri, run_id = _send_to_mlflow(trial, options)
    registry = Registry(uri, options.uri_key)
    objective = options.objective or trial.objective_name
    value, result = trial.objective(objective), trial.result or {}
    scores = {role: trial.score(role) for role in (CLASS_SIMILARITY, PROMPT_FIDELITY)}
    tags = _version_tags(trial, objective) | ({"rule": options.rule} if options.rule else {})

    def is_this_model(champion: Version) -> bool:
        return champion.run_id == run_id and champion.tags.get("step") == str(result["step"])

    def reason_to_keep(champion: Version | None, replace_any: bool) -> str | None:
        if champion and is_this_model(champion):
            return None
        if as_candidate and not options.allow_unmeasured and (
                reason := reason_not_checked(trial, options.bounds)):
            return reason
        return None if champion is None or replace_any else _reason_to_keep(champion, trial, objective, tags)

    champion = registry.get_by_alias(name, CHAMPION)
    reason = reason_to_keep(champion, options.replace)
    if reason and not as_candidate:
        raise UserError(f"nothing to promote in the sweep {sweep}: {reason}")
    model = trial.folder / result["model"]
    version = registry.register(name, run_id, model, tags, lambda: linked_model(
        trial.folder, model, options.include_base))
    if not reason:
        champion, reason = _make_champion(registry, version, reason_to_keep, options.replace)
    if reason and not as_candidate:
        raise UserError(f"nothing to promote in the sweep {sweep}: {reason}")
    alias = CANDIDATE if reason else CHAMPION
    if reason:
        registry.set_alias(version, CANDIDATE)
    else:
        _drop_candidate_alias(registry, version)
    is_champion = champion is not None and is_this_model(champion)
    return {
        "sweep": sweep, "run": trial.folder.name, "run_dir": str(trial.folder), "model": str(
            trial.folder / result["model"]), "alias": alias, "name": name, "version": version.number,
        "model_uri": f"models:/{name}@{alias}", "server": mask_urls(uri, uri), "objective": value,
        "objective_name": objective, **({"rule": options.rule} if options.rule else {}),
        **{role: score and {"name": score[0], "value": score[1], "base": score[2]} for role, score in scores.items()},
        "replaced": champion.number if champion and not (is_champion or reason) else None, "mlflow_run_id": run_id,
        "referenced_base": find_reference(trial.folder, options.include_base),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _make_champion(registry: Registry, version: Version, reason_to_keep: Callable[[Version | None, bool], str | None],
                   replace_any: bool) -> tuple[Version | None, str | None]:
    """Give a version the alias `champion`, unless `reason_to_keep` returns a reason against it.

    In each round, this function marks `version` as choosing, reads the champion, sets the alias, and ends the mark. It
    then waits until no other version is marked. The next round reads the champion again, because another promotion may
    have moved the alias to a worse model meanwhile.

    Args:
        reason_to_keep: returns why `version` must not replace a champion, or None if it may. The first argument is the
            champion (None: there is none). The second is whether to skip the comparison of the two models.
        replace_any: whether the first round skips the comparison. Later rounds always compare.

    Returns:
        The champion that the first round read, and the reason why the version is not the champion now (None: it is).
    """
    before: Version | None = None
    for number in range(MAX_ROUNDS):
        registry.set_tag(version, CHOOSING_TAG, f"choosing since {time.time():.0f}")
        try:
            champion = registry.get_by_alias(version.name, CHAMPION)
            is_champion = champion is not None and champion.number == version.number
            before = champion if number == 0 else before
            reason = reason_to_keep(champion, replace_any and number == 0)
            if not (reason or is_champion):
                registry.set_alias(version, CHAMPION)
        finally:
            registry.set_tag(version, CHOOSING_TAG, "decided")
        if reason or (is_champion and number > 0):
            return before, reason
        _wait_for_others(registry, version)
    return before, None


def _wait_for_others(registry: Registry, version: Version) -> None:
    """Wait until no other version of the model is marked as choosing, but at most CHOOSING_SECONDS.

    A version is marked while another promotion reads the champion and sets the alias; see `_make_champion`.
    """
    end = time.monotonic() + CHOOSING_SECONDS
    while time.monotonic() < end and any(
            _is_choosing(other) for other in registry.list_versions(version.name) if other.number != version.number):
        time.sleep(POLL_INTERVAL)


def _is_choosing(version: Version) -> bool:
    choosing, _, since = version.tags.get(CHOOSING_TAG, "").partition(" since ")
    return choosing == "choosing" and since.isdecimal() and abs(time.time() - int(since)) < CHOOSING_SECONDS


def _send_to_mlflow(trial: Trial, options: PromotionOptions) -> tuple[str, str]:
    """Send to MLflow the entries of a run's journal that it does not have yet.

    Returns:
        The address of the MLflow server, and the run's ID in MLflow.
    """
    root, state_file = trial.folder.parent, trial.folder / "mlflow.json"
    known_uri = str((atomic_files.read_object(state_file) or {}).get("uri", ""))
    # A recorded server address is still valid. A recorded SQLite file may have been moved with the run folders.
    is_server = known_uri != "" and not is_local(known_uri)
    uri = options.uri or (known_uri if is_server else options.default_uri) or None
    with locked(trial.folder):
        open_tracker("mlflow", trial.folder, run_root=root, run_name=trial.folder.name, uri=uri,
                     experiment=options.experiment, required=True, update_status=False,
                     alternative=f"type {options.uri_key}=ADDRESS of one that answers",
                     experiment_key=f"{options.uri_key.removesuffix('uri')}experiment").close("FINISHED")
    run_id = str((atomic_files.read_object(state_file) or {})["run_id"])
    return uri or database_uri(root.resolve() / "mlflow.db"), run_id


def _version_tags(trial: Trial, objective: str) -> dict[str, str]:
    """Return the tags for the registered version of a trial's model. Tags without a value are left out."""
    scores, result = [trial.score(CLASS_SIMILARITY), trial.score(PROMPT_FIDELITY)], trial.result or {}
    tags = {
        "objective": f"{trial.objective(objective):.6g}", "objective_name": objective, "run": trial.folder.name,
        "step": str(result["step"]), "holds": "adapter" if export_layout.adapter_only(*trial.method) else "model",
        "base": trial.settings.get("model.source", ""), "exported_step": str(result.get("exported_step") or ""),
        "photos": trial.photos or "", "instance_prompt": trial.settings.get("dataset.instance_prompt", ""),
        **{score[0]: f"{score[1]:.6g}" for score in scores if score}}
    return {key: value for key, value in tags.items() if value}


def _reason_to_keep(champion: Version, trial: Trial, objective: str, tags: dict[str, str]) -> str | None:
    """Return why the trial must not replace the champion, and what the user can type. None: it may replace it.

    Args:
        tags: the tags of the registered version of the trial's model.
    """
    who = f"the champion of {champion.name}, version {champion.number},"
    remedy = "name=NAME for a model of its own, or replace=true"
    champion_objective, champion_value = champion.tags.get("objective_name"), math.nan
    with suppress(ValueError):
        champion_value = float(champion.tags.get("objective", ""))
    if champion_objective is None or not math.isfinite(champion_value):
        return f"{who} was not registered by dreambooth, so its objective is not known: type {remedy}"
    if _has_other_photos(champion.tags, tags):
        return f"{who} was trained on other photos: type {remedy}"
    if champion_objective != objective:
        return (f"{who} was chosen by {champion_objective}, not by {objective}: type "
                f"{quoting.override('objective', champion_objective)}, {remedy}")
    if (rule := champion.tags.get("rule")) != tags.get("rule"):
        same = quoting.override("rule", rule) if rule else f"{quoting.override('objective', objective)} without rule"
        return f"{who} was chosen {f'by the rule {rule}' if rule else 'without a rule'}: type {same}, {remedy}"
    value = float(tags["objective"])
    if value < champion_value:
        return None
    return f"{trial.folder.name} has {objective} {value:.4f} and {who} {champion_value:.4f}: type {remedy}"


def _has_other_photos(champion_tags: dict[str, str], tags: dict[str, str]) -> bool:
    """Return whether two model versions were trained on different photos.

    Compare the digests of the photos. If one of the versions has no digest, compare the instance prompts. If one of
    them has no instance prompt either, return False.
    """
    for key in ("photos", "instance_prompt"):
        if key in champion_tags and key in tags:
            return champion_tags[key] != tags[key]
    return False


def _drop_candidate_alias(registry: Registry, version: Version) -> None:
    """Remove the alias `candidate` from a new champion. Do nothing if the user lacks the MANAGE permission."""
    candidate = registry.get_by_alias(version.name, CANDIDATE)
    if candidate and candidate.number == version.number:
        with suppress(UserError):
            registry.delete_alias(version.name, CANDIDATE)
