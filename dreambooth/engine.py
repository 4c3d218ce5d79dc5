"""How a step is computed: devices, mixed precision, data parallel. The step only sees this object.

`accelerated` builds it from accelerate for a run; a plain `Engine()` computes in one process as it is, which is
what tests and fake tensors use. The same step runs under both.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

from dreambooth.choices import Dtype

AUTOCAST = {Dtype.fp32: "no", Dtype.fp16: "fp16", Dtype.bf16: "bf16"}  # accelerate's names


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


@dataclass
class Engine:
    """Autocast, backward and loss scaler as objects, and what several processes need."""

    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    backward: Callable[[Tensor], None] = _backward
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    no_sync: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext()
    mean: Callable[[Tensor], Tensor] = lambda values: values
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    unwrap: Callable[[nn.Module], nn.Module] = lambda model: model
    wait: Callable[[], None] = lambda: None
    share: Callable[[Any], Any] = lambda thing: thing
    cache_casts: Callable[[bool], None] = lambda enabled: None  # half-precision copies of all weights, a forward pass

    @property
    def main(self) -> bool:
        return self.rank == 0

    def clip(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], limit: float | None) -> Tensor:
        """Unscale the gradients, clip their global norm to `limit`, return the norm before clipping (0-d)."""
        self.scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step the optimizer. False: the loss scaler skipped it, since a gradient overflowed."""
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before

    def judge(self, found: Tensor) -> bool:
        """Tell the loss scaler whether gradients that it did not see overflowed. False: the step is to be skipped.

        Args:
            found: (1,), above 0 if a gradient was not finite.
        """
        if not self.scaler.is_enabled():
            return True
        witness = nn.Parameter(torch.zeros_like(found))
        witness.grad = torch.where(found > 0, float("inf"), 0.0)
        optimizer = torch.optim.SGD([witness], lr=0.0)
        self.scaler.unscale_(optimizer)
        return self.step(optimizer)

    def any(self, flag: bool) -> bool:
        """True if the flag is set on any process."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)


def accelerated(device: str, dtype: Dtype) -> tuple[Engine, "Accelerator"]:
    """An Engine for this process, alone or under torchrun."""
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs, broadcast_object_list

    casts = AutocastKwargs()  # read at each use
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=AUTOCAST[dtype], kwargs_handlers=[casts])
    scaler = accelerator.scaler or torch.amp.GradScaler(accelerator.device.type, enabled=False)

    def backward(loss: Tensor) -> None:
        _backward(scaler.scale(loss))

    def share(thing: Any) -> Any:
        return broadcast_object_list([thing])[0]

    def cache_casts(enabled: bool) -> None:
        casts.cache_enabled = enabled

    def mean(values: Tensor) -> Tensor:
        reduced: Tensor = accelerator.reduce(values, reduction="mean")
        return reduced

    return Engine(
        autocast=accelerator.autocast,
        backward=backward,
        scaler=scaler,
        no_sync=accelerator.no_sync,
        mean=mean,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        unwrap=accelerator.unwrap_model,
        wait=accelerator.wait_for_everyone,
        share=share,
        cache_casts=cache_casts,
    ), accelerator
