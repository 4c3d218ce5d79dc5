"""Stopping because somebody asked for it: the hook that is called after all others."""

from dataclasses import dataclass

from dreambooth.errors import Interrupted
from dreambooth.runtime.async_readback import AsyncReadback
from dreambooth.runtime.engine import Engine
from dreambooth.training.hooks import Save
from dreambooth.training.step import StepInfo
from dreambooth.utils.signals import StopRequest, how_to_resume


@dataclass
class Halt:
    """Saves and stops when somebody asked for it, on all processes after the same step."""

    stop: StopRequest
    engine: Engine
    save: Save
    _asked: AsyncReadback | None = None
    _step: int | None = None  # that everybody stops after

    def due(self, step: int) -> bool:
        """Several processes learn of a request one step late: so they all learn it then, and nobody waits for it."""
        stop = self.stop.signal_name is not None
        if self.engine.world_size > 1:
            before, self._asked = self._asked, self.engine.reduce_flag(stop)
            stop = before is not None and before.read()[0] > 0
        self._step = step if stop else None
        return stop

    def __call__(self, info: StepInfo) -> None:
        if info.step != self._step and not self._meanwhile(info.step):
            return
        if self.engine.is_main_process:
            self.save.now()
        self.engine.barrier()  # nobody leaves before it is saved: a launcher ends the others when one has gone
        raise Interrupted(f"{self.stop.signal_name or 'another process'}: stopped and saved after step {info.step}; "
                          f"{how_to_resume(self.save.recipe.checkpoint.resume)} to go on")

    def _meanwhile(self, step: int) -> bool:
        """Whether it was asked for while another hook worked, and the state is still that after `step`."""
        stop = self.stop.signal_name is not None
        if self.engine.world_size > 1:  # there is a next step to learn it in, unless this is the last
            return step == self.save.recipe.train.max_train_steps and self.engine.reduce_flag(stop).read()[0] > 0
        return stop and step == self.save.setup.state.step
