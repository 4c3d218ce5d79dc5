"""The training loop: a generator that yields the result of each step. Its caller logs, samples and saves."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from dreambooth.training.step import StepInfo, TrainState

BatchT = TypeVar("BatchT")


def fit(
    state: TrainState,
    batches: Callable[[int], Sequence[BatchT]],
    step: Callable[[TrainState, Sequence[BatchT]], StepInfo],
    max_train_steps: int,
    needs_state: Callable[[int], bool] = lambda step: True,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[StepInfo]:
    """Train until `max_train_steps` steps are completed, and yield the StepInfo of each step, in order.

    Normally a step is checked and yielded only after the next step was started, so that the device always has work
    while the host waits for the metrics of a step. In this case `info.step < state.step`: the state includes a step
    that is not checked yet, and the caller must neither save this state nor generate images with it.

    If the caller needs the state after a step, this step is checked and yielded before the next step is started. The
    last step is also checked and yielded at once. In both cases `info.step == state.step`, and every step so far is
    checked.

    Args:
        state: the training state; each step advances it in place.
        batches: returns the micro-batches of the next step; its argument is the number of completed steps.
        step: performs one training step.
        max_train_steps: number of steps after which training ends, including the steps before a resume.
        needs_state: returns whether the caller needs the state after a given step. It is called once per step, right
            after the step was started.
        stopped: returns whether training ends before `max_train_steps`. The answer changes only while the caller
            processes a step whose state it needs.

    Raises:
        Diverged: the loss or the gradient of a step is not finite. The step is then not yielded, so that the state
            after it is never saved.
    """
    pending: StepInfo | None = None  # started, but not checked yet
    while state.step < max_train_steps and not stopped():
        info = step(state, batches(state.step))
        info.start_readback()
        if pending is not None:
            pending.check()
            yield pending
        pending = info
        if needs_state(info.step) or info.step == max_train_steps:
            pending.check()
            yield pending
            pending = None
