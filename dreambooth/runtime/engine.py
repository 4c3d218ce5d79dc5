"""How a step is computed: devices, mixed precision, data parallel. The step only sees this object.

`accelerated` builds it from accelerate for a run; a plain `Engine()` computes in one process as it is, which is
what tests and fake tensors use. The same step runs under both.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

from dreambooth.config.enums import Dtype
from dreambooth.runtime import cpu_tuning
from dreambooth.runtime.async_readback import Sent

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
    local_rank: int = 0  # among the processes of this host
    local_world: int = 1
    unwrap: Callable[[nn.Module], nn.Module] = lambda model: model
    wait: Callable[[], None] = lambda: None
    share: Callable[[Any], Any] = lambda thing: thing
    cache_casts: Callable[[bool], None] = lambda enabled: None  # half-precision copies of all weights, a forward pass
    _scale: float | None = None  # the loss scaler's after the last step; reading it waits for the device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def clip(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], limit: float | None) -> Tensor:
        """Unscale the gradients, clip their global norm to `limit`, return the norm before clipping (0-d)."""
        self.scaler.unscale_(optimizer)
        trained = [p for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if limit is not None:
            nn.utils.clip_grads_with_norm_(trained, limit, norm)
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step the optimizer. False: the loss scaler skipped it, since a gradient overflowed.

        Only with loss scaling (fp16) the host waits for the device here: schedule and EMA do not count a skipped step.
        """
        if not self.scaler.is_enabled():
            optimizer.step()
            return True
        before = self.scaler.get_scale() if self._scale is None else self._scale
        self.scaler.step(optimizer)
        self.scaler.update()
        self._scale = self.scaler.get_scale()
        return self._scale >= before

    def overflowed(self, found: Tensor) -> bool:
        """Whether `found`, (1,), says so; the host waits for the device, and only with loss scaling."""
        return self.scaler.is_enabled() and bool(found)

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

    def ask(self, flag: bool) -> Sent:
        """Above 0 if the flag is set on any process; every process asks the same number of times."""
        return Sent(self.mean(torch.full((1,), float(flag), device=self.device)))


def accelerated(device: str, dtype: Dtype, tf32: bool = False) -> tuple[Engine, "Accelerator"]:
    """An Engine for this process, alone or under torchrun.

    Args:
        tf32: of the whole process: fp32 products on tensor cores, with inputs of 10 bits of mantissa. PyTorch's own
            default has it on in convolutions and off in matrix products; here both are what was asked for.
    """
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs, broadcast_object_list

    if device == "cpu":
        cpu_tuning.keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
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
        local_rank=accelerator.local_process_index,
        local_world=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),  # as PyTorch's launcher sets it
        unwrap=accelerator.unwrap_model,
        wait=accelerator.wait_for_everyone,
        share=share,
        cache_casts=cache_casts,
    ), accelerator
