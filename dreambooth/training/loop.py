"""The training loop: a generator of what happened. Logging, sampling and saving are hooks of its caller."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from dreambooth.training.step import StepInfo, TrainState

B = TypeVar("B")


def fit(
    state: TrainState,
    batches: Callable[[int], Sequence[B]],
    step: Callable[[TrainState, Sequence[B]], StepInfo],
    max_train_steps: int,
    needed: Callable[[int], bool] = lambda step: True,
) -> Iterator[StepInfo]:
    """Train until `state.step` completed steps reach `max_train_steps`, one StepInfo a step, in order.

    A step's numbers are read one step late, so that the host gives the device its next step before it waits for the
    last one's. Then `info.step < state.step`, and the state may hold a step that nobody has checked: it must not be
    saved or shown.

    Args:
        needed: whether somebody needs the state after a step, asked when it was computed. Its StepInfo, as that of the
            last step, then comes at once, with `info.step == state.step` and every step up to it checked.

    Raises:
        Diverged: before the caller sees the broken step, so that nothing broken is ever saved.
    """
    late: StepInfo | None = None
    while state.step < max_train_steps:
        info = step(state, batches(state.step))
        info.send()
        if late is not None:
            yield late.checked()
        late = info
        if needed(info.step) or info.step == max_train_steps:
            yield late.checked()
            late = None
