"""Classes that replace the engine, the EMA and the gradient scaler of a run in a rehearsal.

The replacements of the engine and of the EMA mark the phases of a training step in a StorageTrace.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.optim.ema import Ema
from dreambooth.planner.allocation_trace import HOST, StorageTrace
from dreambooth.runtime.engine import Engine


@dataclass
class FakeGradScaler:
    """A replacement of GradScaler that never skips a step.

    It allocates the same memory as GradScaler: that of one scaled loss. GradScaler unscales gradients in place, which
    needs no memory, so `unscale_` does nothing here.
    """

    enabled: bool
    factor: Tensor

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.factor if self.enabled else loss

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None: ...

    def get_scale(self) -> float:
        return 1.0

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def update(self) -> None: ...

    def is_enabled(self) -> bool:
        return self.enabled


@dataclass
class PhaseMarkingEngine(Engine):
    """An Engine that marks the start of the phase `step`.

    This class does not mark the phases `forward` and `backward`. They are marked by the functions `autocast` and
    `backward` that rehearsal.py passes to the constructor.
    """

    mark: Callable[[str], None] = lambda phase: None

    def clip_unscaled(self, *args: Any) -> Tensor:
        self.mark("step")
        return super().clip_unscaled(*args)

    def overflowed(self, found_inf: Tensor) -> bool:
        return False


class PhaseMarkingEma(Ema):
    """An Ema that marks the beginning of the phase `ema`."""

    mark: Callable[[str], None]

    def update(self, weights: nn.Module | Mapping[str, Tensor]) -> None:
        self.mark("ema")
        super().update(weights)


def make_gradient_hook(trace: StorageTrace, master: nn.Parameter | None) -> Callable[[Tensor], None]:
    """Return a post-accumulate-grad hook that assigns a category to a parameter's gradient in the trace.

    Args:
        master: the fp32 copy of the parameter in host memory, which has its own gradient; None without
            memory.offload_optimizer.
    """
    def label(parameter: Tensor) -> None:
        if parameter.grad is not None:
            trace.add([parameter.grad], "gradients")
        if master is not None and master.grad is not None:
            trace.add([master.grad], HOST)

    return label
