"""Stops a run on request (SIGTERM or Ctrl-C): saves a checkpoint, then ends the run."""

from collections.abc import Callable
from dataclasses import dataclass

from dreambooth.errors import Interrupted
from dreambooth.runtime.async_readback import AsyncReadback
from dreambooth.runtime.engine import Engine
from dreambooth.training.hooks import CheckpointHook
from dreambooth.training.step import StepInfo
from dreambooth.utils.signals import StopRequest, how_to_resume


@dataclass
class StopHook:
    """Saves a checkpoint and ends the run if a stop was requested. All processes stop after the same step.

    This hook must be the last one in the list of hooks.
    """

    stop: StopRequest
    engine: Engine
    checkpoint_hook: CheckpointHook
    shared: Callable[[int], bool] = lambda step: False  # whether hooks of all processes ran after this step
    _request: AsyncReadback | None = None  # whether any process had received a stop request in the last step
    _stop_after: int | None = None  # step after which to stop

    def due(self, step: int) -> bool:
        """Return whether to stop after this step.

        Several processes exchange their stop requests in every step and read the result in the next step. Thus all of
        them learn of a request in the same step, and none waits for the exchange.
        """
        requested = self.stop.signal_name is not None
        if self.engine.world_size > 1:
            previous, self._request = self._request, self.engine.reduce_flag(requested)
            requested = previous is not None and previous.read()[0] > 0
        self._stop_after = step if requested else None
        return requested

    def __call__(self, info: StepInfo) -> None:
        """Save a checkpoint and raise Interrupted, if a stop was requested."""
        if info.step != self._stop_after and not self._requested_since(info.step):
            return
        if self.checkpoint_hook.takes_part:
            self.checkpoint_hook.save()
        self.engine.barrier()  # a launcher kills the other processes when one exits, so all wait for the checkpoint
        resume = how_to_resume(self.checkpoint_hook.recipe.checkpoint.resume)
        raise Interrupted(f"{self.stop.signal_name or 'another process'}: stopped and saved after step {info.step}; "
                          f"{resume} to continue")

    def _requested_since(self, step: int) -> bool:
        """Return whether a stop was requested after `due(step)` was called, and the state after `step` can be saved.

        Such a request arrives while the other hooks run. The state can no longer be saved if the next step has changed
        it.
        """
        requested = self.stop.signal_name is not None
        if self.engine.world_size > 1:  # the next step exchanges the requests, unless work of this step was abandoned
            last = self.checkpoint_hook.recipe.train.max_train_steps
            return (step == last or self.shared(step)) and self.engine.reduce_flag(requested).read()[0] > 0
        return requested and step == self.checkpoint_hook.setup.state.step
