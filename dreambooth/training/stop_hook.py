"""Stopping on request (SIGTERM or Ctrl-C): save a checkpoint, then end the run. The last hook of a step."""

from dataclasses import dataclass

from dreambooth.errors import Interrupted
from dreambooth.runtime.async_readback import AsyncReadback
from dreambooth.runtime.engine import Engine
from dreambooth.training.hooks import CheckpointHook
from dreambooth.training.step import StepInfo
from dreambooth.utils.signals import StopRequest, how_to_resume


@dataclass
class StopHook:
    """Saves and stops if a stop was requested, in all processes after the same step."""

    stop: StopRequest
    engine: Engine
    checkpoint_hook: CheckpointHook
    _request: AsyncReadback | None = None  # whether a process saw a stop request, as of the last step
    _stop_after: int | None = None  # the step

    def due(self, step: int) -> bool:
        """Whether to stop after this step.

        Several processes exchange their flags in every step and read the result in the next one. So all of them learn
        of a request in the same step, and none waits for the exchange.
        """
        requested = self.stop.signal_name is not None
        if self.engine.world_size > 1:
            previous, self._request = self._request, self.engine.reduce_flag(requested)
            requested = previous is not None and previous.read()[0] > 0
        self._stop_after = step if requested else None
        return requested

    def __call__(self, info: StepInfo) -> None:
        """Save a checkpoint and raise Interrupted, if it is time to stop."""
        if info.step != self._stop_after and not self._requested_since(info.step):
            return
        if self.engine.is_main_process:
            self.checkpoint_hook.save()
        self.engine.barrier()  # a launcher ends the other processes when one has left, so nobody leaves before the save
        resume = how_to_resume(self.checkpoint_hook.recipe.checkpoint.resume)
        raise Interrupted(f"{self.stop.signal_name or 'another process'}: stopped and saved after step {info.step}; "
                          f"{resume} to go on")

    def _requested_since(self, step: int) -> bool:
        """Whether a stop was requested while other hooks ran, and the state still is the one after `step`."""
        requested = self.stop.signal_name is not None
        if self.engine.world_size > 1:  # learned in the next step, unless this is the last one
            last = self.checkpoint_hook.recipe.train.max_train_steps
            return step == last and self.engine.reduce_flag(requested).read()[0] > 0
        return requested and step == self.checkpoint_hook.setup.state.step
