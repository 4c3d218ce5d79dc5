"""The training loop: a generator of what happened. Logging, sampling and saving are hooks of its caller."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from dreambooth.step import StepInfo, TrainState

B = TypeVar("B")


def fit(
    state: TrainState,
    batches: Callable[[int], Sequence[B]],
    step: Callable[[TrainState, Sequence[B]], StepInfo],
    max_train_steps: int,
) -> Iterator[StepInfo]:
    """Train until `state.step` completed steps reach `max_train_steps`, one StepInfo a step.

    Raises:
        Diverged: before the caller sees the broken step, so that nothing broken is ever saved.
    """
    while state.step < max_train_steps:
        info = step(state, batches(state.step))
        info.check()
        yield info
