"""Variants of the engine, the EMA and the gradient scaler that tell a StorageTrace when a phase of the step begins."""

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
    """Uses the memory that a GradScaler uses: one scaled loss. It unscales in place and never skips a step."""

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
    """An Engine that marks the beginning of the phase `step`; the rehearsal passes the other marks."""

    mark: Callable[[str], None] = lambda phase: None

    def clip(self, *args: Any) -> Tensor:
        self.mark("step")
        return super().clip(*args)

    def overflowed(self, found_inf: Tensor) -> bool:
        return False


class PhaseMarkingEma(Ema):
    """An Ema that marks the beginning of the phase `ema`."""

    mark: Callable[[str], None]

    def update(self, weights: nn.Module | Mapping[str, Tensor]) -> None:
        self.mark("ema")
        super().update(weights)


def make_gradient_hook(trace: StorageTrace, master: nn.Parameter | None) -> Callable[[Tensor], None]:
    """A hook, called after a gradient is accumulated, that assigns the gradient its category in the trace.

    Args:
        master: the fp32 copy of the weight in host memory, with a gradient of its own; None without offloading.
    """
    def label(parameter: Tensor) -> None:
        if parameter.grad is not None:
            trace.add([parameter.grad], "gradients")
        if master is not None and master.grad is not None:
            trace.add([master.grad], HOST)

    return label
