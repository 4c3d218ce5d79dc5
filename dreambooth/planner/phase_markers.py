"""Stand-ins for parts of a run that a rehearsal needs to see through: the same parts, which say when a phase begins."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.optim.ema import Ema
from dreambooth.planner.allocation_trace import HOST, StorageTrace
from dreambooth.runtime.engine import Engine


@dataclass
class Scaler:
    """What a GradScaler does to memory: a scaled loss. It unscales in place and never skips."""

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
class MarkedEngine(Engine):
    """An Engine that says when a phase begins."""

    mark: Callable[[str], None] = lambda phase: None

    def clip(self, *args: Any) -> Tensor:
        self.mark("step")
        return super().clip(*args)

    def overflowed(self, found: Tensor) -> bool:
        return False


class MarkedEma(Ema):
    mark: Callable[[str], None]

    def update(self, weights: nn.Module | Mapping[str, Tensor]) -> None:
        self.mark("ema")
        super().update(weights)


def gradient_to(trace: StorageTrace, master: nn.Parameter | None) -> Callable[[Tensor], None]:
    """A hook that says what a new gradient is. The one of a master weight is in host memory."""
    def label(parameter: Tensor) -> None:
        if parameter.grad is not None:
            trace.add([parameter.grad], "gradients")
        if master is not None and master.grad is not None:
            trace.add([master.grad], HOST)

    return label
