"""Studies of Optuna: where a study is stored, and how an interrupted one is continued as if nothing had happened.

A study has a random number generator per trial: its seed follows from the seed of the study and the number of the
trial. The state of a generator is therefore never lost when a process is killed.
"""

import hashlib
import logging
import re
import secrets
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.errors import UserError
from dreambooth.utils import file_lock
from dreambooth.utils.masking import mask_urls

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

_SPACE, _SEED, _SWEEP, _JOBS = "space", "seed", "sweep", "jobs"  # attributes of a study
_OVERRIDES, _RUN_DIR, _COSTS = "overrides", "run_dir", "costs"  # attributes of a trial
PRUNED = "pruned"  # attribute of a trial: the search has asked for the end of its job


def check_installed() -> None:
    """Prepare the library Optuna.

    Raises:
        UserError: it is not installed, or too old.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("hydra/sweeper=optuna needs Optuna: type pip install -c constraints.txt -e '.[sweep]'"
                        ) from error
    if int(optuna.__version__.partition(".")[0]) < 5:
        raise UserError(f"hydra/sweeper=optuna needs Optuna 5, and {optuna.__version__} is installed: type pip install "
                        "-c constraints.txt -e '.[sweep]'")
    optuna.logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def study_digest(*parts: object) -> str:
    """Return eight characters that stand for a search: the same command has the same digest."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


@contextmanager
def locked_study(folder: Path, name: str) -> Iterator[None]:
    """Context manager that keeps other processes from running the trials of a study.

    Raises:
        UserError: another process runs them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock.hold(folder / f".study-{name}.lock", timeout=0):
            yield
    except file_lock.Locked as error:
        raise UserError(f"another process runs the study {name}: wait for it, or type "
                        "hydra.sweeper.study_name=NAME for a study of its own") from error


def open_study(name: str, storage: str | None, folder: Path, directions: Sequence[Any], space: str,
               seed: int | None, sweep: str, pruner: "BasePruner", n_trials: int) -> "Study":
    """Open a study, or create it. A study of n_trials trials that have all failed is replaced by a new one.

    Args:
        storage: a URL of SQLAlchemy, or the path of a journal file; None: study-NAME.journal in `folder`.
        space: description of the search space, which must be that of the study.
        seed: of the samplers; None: the seed of the study if it exists, otherwise a random one.
        sweep: the sweep's ID, which the study keeps.

    Raises:
        UserError: the storage cannot be opened, or the study searches another space.
    """
    import optuna

    try:
        backend = _open_storage(storage, folder / f"study-{name}.journal")
        create = partial(optuna.create_study, study_name=name, storage=backend, directions=list(directions),
                         load_if_exists=True, pruner=pruner)
        study = create()
        trials = study.get_trials(deepcopy=False)
        if len(trials) >= n_trials and {trial.state for trial in trials} == {optuna.trial.TrialState.FAIL}:
            optuna.delete_study(study_name=name, storage=backend)
            study = create()
        attributes = study.user_attrs
    except UserError:
        raise
    except Exception as error:  # of the database's driver, or of a file
        problem = str(error).strip().partition("\n")[0]
        raise UserError(mask_urls(f"the study {name} cannot be opened in {storage or folder} ({problem}): type "
                                  "hydra.sweeper.storage=PATH of a journal file, or URL of a database")) from error
    if [direction.name.lower() for direction in study.directions] != list(directions) \
            or attributes.get(_SPACE, space) != space:
        raise UserError(f"the study {name} searches another space or in another direction: type "
                        "hydra.sweeper.study_name=NAME for a new study")
    jobs = f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')[:24].strip('-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    for key, value in ((_SPACE, space), (_SEED, secrets.randbits(31) if seed is None else seed), (_SWEEP, sweep),
                       (_JOBS, jobs)):
        if key not in attributes:
            study.set_user_attr(key, value)
    return study


def record_job(study: "Study", number: int, run_dir: str | None, costs: Mapping[str, tuple[float, float]]) -> None:
    """Keep where a trial ran, and what its jobs cost, so that a later command counts them in its budget.

    Args:
        run_dir: the run folder of a trial in this process; None: it ran in a job.
        costs: US dollars and hours of each job.
    """
    trial = study.get_trials(deepcopy=False)[number]
    for key, value in ((_RUN_DIR, run_dir), (_COSTS, trial.user_attrs.get(_COSTS, {}) | dict(costs))):
        if value and trial.user_attrs.get(key) != value:
            study._storage.set_trial_user_attr(trial._trial_id, key, value)


def earlier_runs(study: "Study") -> list[Path]:
    """Return the run folders of a study's trials that ran in the process of an earlier command."""
    trials = study.get_trials(deepcopy=False)
    return [Path(trial.user_attrs[_RUN_DIR]) for trial in trials if _RUN_DIR in trial.user_attrs]


def earlier_costs(study: "Study") -> dict[str, tuple[float, float]]:
    """Return US dollars and hours of each job of a study."""
    return {name: (float(usd), float(hours)) for trial in study.get_trials(deepcopy=False)
            for name, (usd, hours) in trial.user_attrs.get(_COSTS, {}).items()}


def sweep_of(study: "Study") -> str:
    """Return the ID of the sweep that created a study."""
    return str(study.user_attrs[_SWEEP])


def job_prefix(study: "Study") -> str:
    """Return the name of a study's jobs on SageMaker, before their numbers: up to 40 letters, digits and hyphens."""
    return str(study.user_attrs[_JOBS])


def trial_seed(study: "Study", number: int) -> int:
    """Return the random seed of trial `number`, below 2^32."""
    return int(hashlib.sha256(f"{study.user_attrs[_SEED]}/{number}".encode()).hexdigest()[:8], 16)


def next_batch(study: "Study", size: int, n_trials: int, make_sampler: Callable[[int, int], "BaseSampler"],
               suggest: Callable[["Trial"], tuple[str, ...]], waiting: Collection[int] = ()
               ) -> list[tuple["Trial", tuple[str, ...]]]:
    """Return the trials to run next, with their overrides; an empty list if the study has n_trials trials.

    A batch consists of the trials with the numbers from k * size to (k + 1) * size - 1. A batch that was interrupted is
    completed before the next one begins, and its finished trials are left out. An interrupted trial keeps its number
    and its overrides, so its run continues from its last checkpoint.

    Args:
        make_sampler: makes the sampler of a trial from its number and its random seed.
        suggest: chooses the settings of a trial, and returns them as overrides.
        waiting: numbers of interrupted trials that the next command continues.
    """
    import optuna

    trials = study.get_trials(deepcopy=False)
    pending = [trial for trial in trials if trial.state is optuna.trial.TrialState.RUNNING
               and trial.number not in waiting]
    first = pending[0].number if pending else len(trials)
    last = max(min((first // size + 1) * size, n_trials), len(trials) if pending else 0)
    batch: list[tuple[Trial, tuple[str, ...]]] = []
    for frozen in pending:
        study.sampler = make_sampler(frozen.number, trial_seed(study, frozen.number))
        trial = optuna.Trial(study, frozen._trial_id)
        overrides = frozen.user_attrs.get(_OVERRIDES)
        batch.append((trial, tuple(overrides) if overrides else _ask(trial, suggest)))
    for number in range(len(trials), last):
        study.sampler = make_sampler(number, trial_seed(study, number))
        batch.append(((trial := study.ask()), _ask(trial, suggest)))
    return batch


def _ask(trial: "Trial", suggest: Callable[["Trial"], tuple[str, ...]]) -> tuple[str, ...]:
    overrides = suggest(trial)
    trial.set_user_attr(_OVERRIDES, list(overrides))
    return overrides


def _open_storage(storage: str | None, default: Path) -> "BaseStorage":
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if storage is not None and "://" in storage:
        if storage.startswith("postgresql://") and find_spec("psycopg") is None:  # the default driver of SQLAlchemy 2.1
            storage = storage.replace("postgresql://", "postgresql+psycopg2://", 1)
        scheme, _, file = storage.partition(":///")
        return RDBStorage(f"{scheme}:///{Path(file).resolve()}" if scheme.startswith("sqlite") and file else storage)
    path = default if storage is None else Path(storage).resolve()  # jobs may change the working directory
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_partial_line(path)
    return JournalStorage(JournalFileBackend(str(path)))


def _drop_partial_line(path: Path) -> None:
    """Remove an incomplete last line, which a killed process has left. Optuna could not read a line after it."""
    if not path.exists():
        return
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(path))  # another study may write to the same file
    lock.acquire()
    try:
        with path.open("rb+") as file:
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


def describe(study: "Study") -> dict[str, Any]:
    """Return the results of a study for optimization_results.yaml: its best trial, or with several objectives all that
    no other trial dominates."""
    from optuna.trial import TrialState

    if not any(trial.state is TrialState.COMPLETE for trial in study.get_trials(deepcopy=False)):
        return {"name": "optuna"}
    if len(study.directions) == 1:
        return {"name": "optuna", "best_params": study.best_trial.params, "best_value": study.best_trial.value}
    return {"name": "optuna", "solutions": [{"params": trial.params, "values": list(trial.values)}
                                            for trial in study.best_trials]}
