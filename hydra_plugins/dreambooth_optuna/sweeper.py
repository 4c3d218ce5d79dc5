"""The sweeper's class and settings, for Hydra. The implementation is in _core.py, imported for sweeps only."""

# No `from __future__ import annotations` here: see hydra_plugins/dreambooth_sagemaker/launcher.py.
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import MISSING, DictConfig


@dataclass
class SamplerConf:
    """How points are chosen: a class of optuna.samplers, and arguments of it. Arguments that are null are left out."""

    _target_: str = MISSING
    seed: int | None = None  # random seed; null: a random one, which the study keeps


@dataclass
class TpeConf(SamplerConf):
    """Tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for hyper-parameter optimization")."""

    _target_: str = "optuna.samplers.TPESampler"
    consider_prior: bool | None = None  # this key and the next two have no effect in Optuna 5
    consider_magic_clip: bool | None = None
    consider_endpoints: bool | None = None
    prior_weight: float | None = None  # weight of the prior; null: 1
    n_startup_trials: int = 10  # trials at random before the estimator is used
    n_ei_candidates: int = 24  # candidates, of which the one with the highest expected improvement is run
    multivariate: bool | None = None  # whether settings are modelled jointly; null: Optuna's default
    warn_independent_sampling: bool | None = None


@dataclass
class CmaEsConf(SamplerConf):
    """Covariance matrix adaptation (Hansen 2016, "The CMA evolution strategy: a tutorial"), for intervals."""

    _target_: str = "optuna.samplers.CmaEsSampler"
    x0: dict[str, Any] | None = None  # where the search begins, by key; null: the middle of each interval
    sigma0: float | None = None  # first standard deviation; null: a sixth of the smallest interval
    n_startup_trials: int = 1  # trials at random before
    warn_independent_sampling: bool = False
    consider_pruned_trials: bool = False
    use_separable_cma: bool = False


@dataclass
class RandomConf(SamplerConf):
    """Random points."""

    _target_: str = "optuna.samplers.RandomSampler"


@dataclass
class GridConf(SamplerConf):
    """All points, in the order of Hydra's basic sweeper."""

    _target_: str = "optuna.samplers.GridSampler"


@dataclass
class NsgaIIConf(SamplerConf):
    """NSGA-II, a genetic algorithm for several objectives (Deb et al. 2002)."""

    _target_: str = "optuna.samplers.NSGAIISampler"
    population_size: int = 50
    mutation_prob: float | None = None
    crossover_prob: float = 0.9
    swapping_prob: float = 0.5


@dataclass
class PrunerConf:
    """When a trial ends early: a class of optuna.pruners, and arguments of it."""

    _target_: str = MISSING


@dataclass
class NoPrunerConf(PrunerConf):
    """No trial ends early."""

    _target_: str = "optuna.pruners.NopPruner"


@dataclass
class MedianPrunerConf(PrunerConf):
    """A trial ends if its best value so far is worse than the median of earlier trials at the same step."""

    _target_: str = "optuna.pruners.MedianPruner"
    n_startup_trials: int = 5  # finished trials before the first one may be pruned
    n_warmup_steps: int = 0  # steps before a trial may be pruned
    interval_steps: int = 1  # steps between two decisions
    n_min_trials: int = 1  # trials with a value at this step that the median needs


@dataclass
class PercentilePrunerConf(PrunerConf):
    """A trial ends if its best value so far is not among the best percent of earlier trials at the same step."""

    _target_: str = "optuna.pruners.PercentilePruner"
    percentile: float = 25.0  # percent of the trials that go on; 50 is the median pruner
    n_startup_trials: int = 5  # finished trials before the first one may be pruned
    n_warmup_steps: int = 0  # steps before a trial may be pruned
    interval_steps: int = 1  # steps between two decisions
    n_min_trials: int = 1  # trials with a value at this step that the percentile needs


@dataclass
class HyperbandPrunerConf(PrunerConf):
    """Hyperband (Li et al. 2018, JMLR 18): brackets of successive halving, each with another first number of steps."""

    _target_: str = "optuna.pruners.HyperbandPruner"
    min_resource: int = 1  # steps before the first decision in the most aggressive bracket
    max_resource: Any = "auto"  # steps of a whole run; auto: those of the first finished trial
    reduction_factor: int = 3  # one trial of this many goes on at each decision


@dataclass
class OptunaSweeperConf:
    """Settings of the sweeper; docs/sweeps.md explains each key."""

    _target_: str = "hydra_plugins.dreambooth_optuna.sweeper.OptunaSweeper"
    _recursive_: bool = False  # the sampler is made by _core.py, which can say that Optuna is not installed
    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}, {"pruner": "none"}])
    sampler: SamplerConf = MISSING
    pruner: PrunerConf = MISSING
    prune_measure: str | None = None
    direction: Any = "minimize"
    storage: str | None = None
    study_name: str | None = None
    n_trials: int = 20
    n_jobs: int = 2
    max_failure_rate: float = 1.0
    custom_search_space: str | None = None
    params: dict[str, str] | None = None


class OptunaSweeper(Sweeper):
    """Asks Optuna for the settings of each trial, and runs the trials with Hydra's launcher."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.setup_arguments: dict[str, Any] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.setup_arguments = {"hydra_context": hydra_context, "task_function": task_function, "config": config}

    def sweep(self, arguments: list[str]) -> Any:
        from hydra_plugins.dreambooth_optuna import _core

        return _core.sweep(self.settings, arguments, **self.setup_arguments)


_GROUPS: dict[str, dict[str, type]] = {
    "hydra/sweeper": {"optuna": OptunaSweeperConf},
    "hydra/sweeper/sampler": {"tpe": TpeConf, "motpe": TpeConf, "cmaes": CmaEsConf, "random": RandomConf,
                              "grid": GridConf, "nsgaii": NsgaIIConf},
    "hydra/sweeper/pruner": {"none": NoPrunerConf, "median": MedianPrunerConf, "percentile": PercentilePrunerConf,
                             "hyperband": HyperbandPrunerConf},
}
for _group, _nodes in _GROUPS.items():
    for _name, _node in _nodes.items():
        ConfigStore.instance().store(group=_group, name=_name, node=_node, provider="dreambooth")
