"""Implementation of the sweeper: asks Optuna for trials, runs them with Hydra's launcher, and tells Optuna the results.

A trial is told as soon as it has ended, so that a process which is killed loses no result. The same command continues
the study: trials that have ended are not run again.
"""

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write

from dreambooth.config.compose import uri_has_password
from dreambooth.config.evaluate import better_direction, split_objectives
from dreambooth.errors import ConfigError, DreamBoothError, Interrupted, UserError
from dreambooth.runs import pruning
from dreambooth.sweeps import hydra_callbacks, launched_jobs, studies
from dreambooth.utils.masking import mask_file
from dreambooth.utils.plurals import counted
from dreambooth.utils.quoting import hydra_string

log = logging.getLogger(__name__)
GRID = "optuna.samplers.GridSampler"
WAITING = "WAITING"  # state of a trial that was stopped before its end: a later command continues it


@dataclass
class Recorder(Callback):
    """Hydra callback that tells the study the result of each job which runs in this process, as soon as it has ended.

    Attributes:
        trials: the trials of the current batch, by the number of their jobs.
        states: name of the final state of each trial that was told, by the number of its job.
    """

    study: Any
    measure: str | None
    trials: dict[int, Any] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)
    reporter: "TrialReporter | None" = None

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        from optuna.pruners import NopPruner

        trial = self.trials.get(config.hydra.job.num)
        prunes = trial is not None and not isinstance(self.study.pruner, NopPruner)
        self.reporter = TrialReporter(trial, self.measure) if prunes else None
        pruning.set_reporter(self.reporter)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        pruning.set_reporter(None)
        number = config.hydra.job.num
        if number in self.trials:
            run_dir = OmegaConf.select(job_return.hydra_cfg or OmegaConf.create(), "hydra.runtime.output_dir")
            studies.record_job(self.study, number, str(run_dir), {})
        self.tell(number, job_return, self.reporter is not None and self.reporter.pruned)

    def prune(self, number: int, step: int, value: float) -> bool:
        """Record a value of a running job, and return whether it has to be stopped (Search of launched_jobs.py)."""
        trial = self.trials[number]
        pruned = TrialReporter(trial, self.measure).report(step, value)
        if pruned:
            trial.set_user_attr(studies.PRUNED, True)  # first: the command may be killed before the job has ended
        return pruned

    def is_pruned(self, number: int) -> bool:
        return number in self.trials and bool(self.trials[number].user_attrs.get(studies.PRUNED))

    def tell(self, number: int, job_return: JobReturn, pruned: bool = False) -> None:
        """Tell the study how the job `number` has ended, unless that was done."""
        from optuna.trial import TrialState

        if number in self.states or number not in self.trials:
            return
        if number in launched_jobs.study_jobs.stopped:
            self.states[number] = WAITING
            return
        try:
            pruned = pruned or number in launched_jobs.study_jobs.pruned
            values = None if pruned else _read_values(job_return, len(self.study.directions))
        except ValueError as error:
            folder = OmegaConf.select(job_return.hydra_cfg or OmegaConf.create(), "hydra.runtime.output_dir")
            reason = hydra_callbacks.failure_reasons.get(Path(str(folder)), error)
            log.warning("trial %d has failed: %s", number, reason)
            state = TrialState.FAIL
            self.study.tell(self.trials[number], state=state)
        else:
            state = TrialState.PRUNED if pruned else TrialState.COMPLETE
            self.study.tell(self.trials[number], values, state)
        self.states[number] = state.name


@dataclass
class TrialReporter:
    """Reports the values of a run to Optuna. The value of a maximised study has the other sign."""

    trial: Any
    measure: str | None
    pruned: bool = False

    def report(self, step: int, value: float) -> bool:
        from optuna.study import StudyDirection

        if step not in self.trial.study.get_trials(deepcopy=False)[self.trial.number].intermediate_values:
            self.trial.report(-value if self.trial.study.direction is StudyDirection.MAXIMIZE else value, step)
        self.pruned = self.trial.should_prune()
        return self.pruned


def sweep(settings: dict[str, Any], arguments: Sequence[str], *, hydra_context: HydraContext,
          task_function: TaskFunction, config: DictConfig) -> list[Sequence[JobReturn]]:
    """Run the trials of a study that are not finished yet. Return the results of the launcher, one list per launch.

    Args:
        settings: of the sweeper, see OptunaSweeperConf.
        arguments: the overrides of the command, as the user typed them.

    Raises:
        UserError: a setting is wrong; see the functions of dreambooth.sweeps.studies, too.
        DreamBoothError: too many trials of a batch have failed.
    """
    studies.check_installed()
    from hydra_plugins.dreambooth_optuna import _space

    directions = _check_settings(settings, config)
    if "tracking" in config and uri_has_password(config):
        raise ConfigError("tracking.uri contains a password, which the study would store: type the address without it, "
                          "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    folder = Path(str(config.hydra.sweep.dir)).resolve()  # jobs may change the working directory
    space = _space.read_space(settings["params"] or {}, arguments)
    conditions = _space.read_conditions(settings["params"] or {}, arguments)
    seed = OmegaConf.select(settings["sampler"], "seed")
    make_sampler, points = _sampler_maker(settings["sampler"], space, conditions)
    try:
        make_sampler(0, 0)
        if settings["custom_search_space"]:
            get_method(settings["custom_search_space"])
    except (ValueError, TypeError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"hydra.sweeper.sampler or hydra.sweeper.custom_search_space is wrong ({reason}): type "
                        "hydra/sweeper/sampler=tpe, or correct the setting") from error
    sweep_id = OmegaConf.select(config, "tracking.sweep", throw_on_resolution_failure=False)
    searched = repr({key: repr(value) for key, value in _space.searched(space).items()})
    if conditions:
        searched += repr({key: [(other, sorted(values)) for other, values in of_key]
                          for key, of_key in conditions.items()})
    defining = [word for word in arguments if not word.startswith(("tracking.sweep=", "budget."))]
    digest = studies.study_digest(searched, directions, defining,
                                  OmegaConf.to_container(settings["sampler"]))
    name = settings["study_name"] or f"{sweep_id or 'sweep'}-{digest}"
    n_trials = min(settings["n_trials"], len(points)) if points is not None else settings["n_trials"]
    with studies.locked_study(folder, name):
        study = studies.open_study(name, settings["storage"], folder, directions, searched, seed,
                                   sweep_id or hydra_callbacks.default_sweep_id(), instantiate(settings["pruner"]),
                                   n_trials)
        OmegaConf.save(config, record := folder / "multirun.yaml")
        mask_file(record)
        _keep_names(study, config, sweep_id)
        if _prunes(settings) and _launcher_name(config).startswith("sagemaker"):
            measure = hydra_string(settings["prune_measure"] or pruning.OBJECTIVE)
            with read_write(config):  # Hydra composes each job from these overrides
                config.hydra.overrides.hydra.append(f"++hydra.launcher.environment.{pruning.VARIABLE}={measure}")
        log.info("study %s: %d of %d trials have ended", name, _count_ended(study), n_trials)
        recorder = Recorder(study, settings["prune_measure"])
        launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function)
        hydra_context.callbacks.callbacks.append(recorder)
        suggest = functools.partial(_suggest, space, conditions, settings["custom_search_space"], config)
        returns: list[Sequence[JobReturn]] = []
        study_jobs = launched_jobs.study_jobs
        study_jobs.earlier_runs, study_jobs.costs = studies.earlier_runs(study), studies.earlier_costs(study)
        study_jobs.stopped.clear()
        study_jobs.pruned.clear()
        study_jobs.search = recorder if _prunes(settings) else None
        while batch := studies.next_batch(study, settings["n_jobs"], n_trials, make_sampler, suggest,
                                          study_jobs.stopped):
            recorder.trials, recorder.states = {trial.number: trial for trial, _ in batch}, {}
            for first, overrides in _consecutive(batch):
                known = dict(study_jobs.costs)
                try:
                    returns.append(launcher.launch(_with_budget(overrides, arguments), initial_job_idx=first))
                finally:  # also after SystemExit: the budget is used up
                    new = {name: cost for name, cost in study_jobs.costs.items() if known.get(name) != cost}
                    studies.record_job(study, first, None, new)
                for number, job_return in enumerate(returns[-1], start=first):
                    recorder.tell(number, job_return)
            _write_results(study, folder)
            _check_failures(recorder.states, settings["max_failure_rate"], returns)
        if study_jobs.stopped:
            again = " with hydra.launcher.resubmit=true" if "sagemaker" in _launcher_name(config) else ""
            raise Interrupted(f"{counted(len(study_jobs.stopped), 'trial')} of the study {name} stopped before the end "
                              f"({next(iter(study_jobs.stopped.values()))}): repeat the command{again} to continue")
        if not returns:
            complete = points is not None and n_trials == len(points)
            larger = "" if complete else "a larger hydra.sweeper.n_trials to continue it, or "
            print(f"the study {name} has {n_trials} trials already: type {larger}hydra.sweeper.study_name=NAME for "
                  "a new one", flush=True)
            _write_results(study, folder)
    return returns


def _check_settings(settings: dict[str, Any], config: DictConfig) -> list[str]:
    """Check the settings of the sweeper. Return the directions of the objectives, minimize or maximize.

    The direction of each of several objectives of a run is that in which the measure becomes better.

    Raises:
        ConfigError: settings are wrong; the message has one line per problem.
    """
    given = settings["direction"]
    directions = [str(item) for item in (given if isinstance(given, list | ListConfig) else [given])]
    problem = ""
    if "evaluate" in config:
        directions, problem = _directions_of_run(str(_objective_text(config)), directions)
    rules = {
        f"hydra.sweeper.direction must be minimize or maximize, or a list of both, not {given}":
            bool(directions) and set(directions) <= {"minimize", "maximize"},
        f"hydra.sweeper.n_trials must be 1 or more, not {settings['n_trials']}": settings["n_trials"] >= 1,
        f"hydra.sweeper.n_jobs must be 1 or more, not {settings['n_jobs']}": settings["n_jobs"] >= 1,
        f"hydra.sweeper.max_failure_rate must be from 0 to 1, not {settings['max_failure_rate']}":
            0 <= settings["max_failure_rate"] <= 1,
        problem: not problem,
        "a study of several objectives cannot be pruned: type hydra/sweeper/pruner=none":
            len(directions) == 1 or not _prunes(settings),
        "hydra/sweeper/sampler=cmaes searches one objective: type hydra/sweeper/sampler=nsgaii, or tpe":
            len(directions) == 1 or not str(settings["sampler"]["_target_"]).endswith(".CmaEsSampler")}
    if problems := [problem for problem, holds in rules.items() if not holds]:
        raise ConfigError(*problems)
    return directions


def _prunes(settings: dict[str, Any]) -> bool:
    return str(OmegaConf.select(settings["pruner"], "_target_")) != "optuna.pruners.NopPruner"


def _launcher_name(config: DictConfig) -> str:
    return str(OmegaConf.select(config, "hydra.runtime.choices", default={}).get("hydra/launcher"))


def _objective_text(config: DictConfig) -> str:
    """Return the setting evaluate.objective. Several objectives are separated by commas."""
    objective = OmegaConf.select(config, "evaluate.objective")
    return ",".join(map(str, objective)) if isinstance(objective, ListConfig) else str(objective)


def _directions_of_run(text: str, given: list[str]) -> tuple[list[str], str]:
    """Return the directions of the objectives of a run, and what is wrong with the given ones; "" if nothing is.

    Args:
        text: the setting evaluate.objective.
        given: the setting hydra.sweeper.direction; minimize stands for the directions of several objectives, too.
    """
    names = split_objectives(text)
    if len(names) == 1:
        return given, "" if len(given) == 1 else (
            f"evaluate.objective={text} is one objective, and hydra.sweeper.direction has {len(given)} directions: "
            "type evaluate.objective=[subject_similarity,class_drift], or hydra.sweeper.direction=minimize")
    try:
        better = [f"{better_direction(name).value}imize" for name in names]
    except ValueError as error:
        return given, f"evaluate.objective {error}"
    if given in (better, ["minimize"]):
        return better, ""
    return better, (f"hydra.sweeper.direction must be [{','.join(better)}], in which {', '.join(names)} become better, "
                    f"not [{','.join(given)}]: leave it out")


def _sampler_maker(conf: DictConfig, space: dict[str, Any], conditions: dict[str, Any]
                   ) -> tuple[Callable[[int, int], Any], list[dict[str, Any]] | None]:
    """Return a function that makes the sampler of a trial, from its number and its seed. For a grid, also all points.
    """
    import optuna

    from hydra_plugins.dreambooth_optuna import _space

    arguments = {str(key): value for key, value in OmegaConf.to_container(conf, resolve=True).items()  # type: ignore
                 if value is not None}
    target = str(arguments.pop("_target_"))
    if target == GRID:
        points = _space.grid(space, conditions)
        return lambda number, seed: optuna.samplers.PartialFixedSampler(
            points[number % len(points)], optuna.samplers.RandomSampler(0)), points
    if target.endswith(".CmaEsSampler") and all(isinstance(value, optuna.distributions.CategoricalDistribution)
                                                for value in _space.searched(space).values()):
        raise UserError("hydra/sweeper/sampler=cmaes searches intervals, and this space has none: type an override "
                        "such as 'train.learning_rate=tag(log,interval(1e-5,1e-3))', or hydra/sweeper/sampler=tpe")
    make = get_class(target)
    arguments.pop("seed", None)
    seeded = "seed" in inspect.signature(make).parameters and not target.endswith("QMCSampler")
    return lambda number, seed: make(**arguments, **({"seed": seed} if seeded else {})), None


def _with_budget(batch: Sequence[Sequence[str]], arguments: Sequence[str]) -> list[list[str]]:
    """Return the overrides of trials with the budget of this command: a continued study may have a higher one."""
    budget = [word for word in arguments if word.startswith("budget.")]
    return [[*(word for word in overrides if not word.startswith("budget.")), *budget] for overrides in batch]


def _suggest(space: dict[str, Any], conditions: dict[str, Any], custom: str | None, config: DictConfig, trial: Any
             ) -> tuple[str, ...]:
    from hydra_plugins.dreambooth_optuna import _space

    overrides = _space.suggest(trial, space, conditions)
    if custom:
        get_method(custom)(config, trial)
        overrides += tuple(f"{key}={_space.to_text(value)}" for key, value in trial.params.items() if key not in space)
    return overrides


def _keep_names(study: Any, config: DictConfig, sweep_id: str | None) -> None:
    """Use the names of a study's first command: the sweep's ID, and the name of its jobs on SageMaker."""
    if sweep_id is None:
        hydra_callbacks.set_default_sweep_id(studies.sweep_of(study))
    if _launcher_name(config).startswith("sagemaker") and config.hydra.launcher.sweep is None:
        with read_write(config):
            config.hydra.launcher.sweep = studies.job_prefix(study)  # the same jobs are followed again


def _consecutive(batch: Sequence[tuple[Any, tuple[str, ...]]]) -> Iterator[tuple[int, list[tuple[str, ...]]]]:
    """Split a batch into groups of consecutive trials. Yield the first number and the overrides of each group."""
    first = 0
    group: list[tuple[str, ...]] = []
    for trial, overrides in batch:
        if group and trial.number != first + len(group):
            yield first, group
            group = []
        first = first if group else trial.number
        group.append(overrides)
    if group:
        yield first, group


def _read_values(job_return: JobReturn, count: int) -> list[float]:
    """Return the objectives of a job.

    Raises:
        ValueError: the job has failed, or its return value is not `count` finite numbers.
    """
    value = job_return._return_value
    if job_return.status is JobStatus.FAILED:
        raise ValueError(str(value))
    values = [value] if count == 1 else list(value) if isinstance(value, list | tuple) else []
    try:
        numbers = [float(item) for item in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"it returned {value} instead of {'a number' if count == 1 else f'{count} numbers'}")
    return numbers


def _count_ended(study: Any) -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def _write_results(study: Any, folder: Path) -> None:
    OmegaConf.save(OmegaConf.create(studies.describe(study)), folder / "optimization_results.yaml")


def _check_failures(states: dict[int, str], max_rate: float, returns: Sequence[Sequence[JobReturn]]) -> None:
    """End the sweep if too many trials of a batch have failed."""
    failed = [number for number, state in states.items() if state == "FAIL"]
    if len(failed) <= max_rate * len(states):
        return
    for job_return in returns[-1]:
        _ = job_return.return_value  # raises the exception of a failed job
    raise DreamBoothError(f"{len(failed)} of {len(states)} trials of a batch have failed, more than "
                          f"hydra.sweeper.max_failure_rate={max_rate:g}: correct the settings, or type a higher rate")
