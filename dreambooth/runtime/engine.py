"""The engine of a training step: device, mixed precision, and the processes that train together.

A training step uses only an `Engine` object. `create_engine` builds the Engine of a run with accelerate. A plain
`Engine()` computes in one process, on the CPU, without autocast; tests and the planner (with fake tensors) use it. The
code of the step is the same with both kinds of Engine.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

from dreambooth.config.enums import Dtype
from dreambooth.errors import Interrupted
from dreambooth.runtime import cpu_tuning, gradient_clipping
from dreambooth.runtime.async_readback import AsyncReadback
from dreambooth.utils.signals import StopRequest

# How long a process waits for the others before the run is aborted. PyTorch's default is 10 minutes with NCCL. The
# main process alone plans, scores, and writes checkpoints, which may take longer on a slow disk. PyTorch's launcher
# notices a dead process at once; only a process that hangs is noticed by this timeout.
COLLECTIVE_TIMEOUT = timedelta(hours=1)
T = TypeVar("T")
ItemT = TypeVar("ItemT")
AUTOCAST = {Dtype.fp32: "no", Dtype.fp16: "fp16", Dtype.bf16: "bf16"}  # accelerate's names of the precisions


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


@dataclass
class Engine:
    """The objects and functions that a training step calls for autocast, backward pass and collective operations.

    Attributes:
        autocast: returns the context manager in which a forward pass runs.
        backward: runs the backward pass of a 0-d loss, scaled if there is loss scaling.
        scaler: the loss scaler; disabled unless the precision is fp16.
        no_sync: returns the context manager in which data parallelism does not average the gradients of a model.
        all_reduce_mean: returns the mean of a tensor over all processes.
        device: the device of this process.
        rank: index of this process among all processes; 0 is the main process.
        world_size: number of processes.
        local_rank: index of this process among the processes of its host.
        local_world_size: number of processes on this host.
        unwrap: returns the model inside a data-parallel wrapper.
        barrier: waits until all processes have called it.
        broadcast: returns, in every process, the object that the main process passed.
        gather: joins the lists of all processes, in the order of their ranks; every process gets the joined list.
        set_autocast_cache: sets whether autocast keeps half-precision copies of weights during a forward pass.
    """

    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    backward: Callable[[Tensor], None] = _backward
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    no_sync: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext()
    all_reduce_mean: Callable[[Tensor], Tensor] = lambda values: values
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    unwrap: Callable[[nn.Module], nn.Module] = lambda model: model
    barrier: Callable[[], None] = lambda: None
    broadcast: Callable[[Any], Any] = lambda value: value
    gather: Callable[[list[Any]], list[Any]] = lambda values: values
    set_autocast_cache: Callable[[bool], None] = lambda enabled: None
    _loss_scale: float | None = None  # scale after the last step; stored, because reading it waits for the device

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def clip(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], limit: float | None) -> Tensor:
        """Unscale the gradients, clip their global norm to `limit`, and return the norm before clipping (0-d).

        Some optimizers clip in their next step, see gradient_clipping.py.
        """
        self.scaler.unscale_(optimizer)
        return self.clip_unscaled(optimizer, parameters, limit)

    def clip_unscaled(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], limit: float | None
                      ) -> Tensor:
        """Clip the global norm of unscaled gradients to `limit`, as `clip` does."""
        return gradient_clipping.clip(parameters, limit, optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step the optimizer. Return False if the loss scaler skipped the step because a gradient overflowed.

        With loss scaling (fp16), the host must know whether the step was skipped, because the learning-rate schedule
        and the EMA must not count a skipped step. The host therefore waits until the device has computed whether a
        gradient overflowed. Without loss scaling, the host does not wait.
        """
        if not self.scaler.is_enabled():
            optimizer.step()
            return True
        before = self.scaler.get_scale() if self._loss_scale is None else self._loss_scale
        self.scaler.step(optimizer)
        self.scaler.update()
        self._loss_scale = self.scaler.get_scale()
        return self._loss_scale >= before

    def inverse_loss_scale(self, device: torch.device) -> Tensor | None:
        """Return 1 / loss scale as a tensor (1,) on `device`; None without loss scaling.

        The host waits for the training device, on which the scale is stored.
        """
        if not self.scaler.is_enabled():
            return None
        return torch.tensor([1 / self.scaler.get_scale()], dtype=torch.float32, device=device)

    def overflowed(self, found_inf: Tensor) -> bool:
        """Return whether a gradient overflowed. Without loss scaling, return False; otherwise wait for the device.

        Args:
            found_inf: (1,), above 0 if a gradient was not finite.
        """
        return self.scaler.is_enabled() and bool(found_inf)

    def update_scaler(self, found_inf: Tensor) -> bool:
        """Update the loss scaler after a backward pass whose gradients other code has unscaled already.

        Return False if the step must be skipped.

        Args:
            found_inf: (1,), above 0 if a gradient was not finite.
        """
        if not self.scaler.is_enabled():
            return True
        dummy = nn.Parameter(torch.zeros_like(found_inf))  # the scaler accepts gradients of an optimizer only
        dummy.grad = torch.where(found_inf > 0, float("inf"), 0.0)
        optimizer = torch.optim.SGD([dummy], lr=0.0)
        self.scaler.unscale_(optimizer)
        return self.step(optimizer)

    def reduce_flag(self, flag: bool) -> AsyncReadback:
        """Start to combine the flags of all processes. Return a readback of one number, above 0 if any flag is True.

        A collective operation: every process must call it equally often.
        """
        return AsyncReadback(self.all_reduce_mean(torch.full((1,), float(flag), device=self.device)))

    def run_on_main(self, function: Callable[[], Any]) -> Any:
        """Call `function` in the main process only, and return its result in every process."""
        return self.broadcast(function() if self.is_main_process else None)

    def map_shared(self, function: Callable[[ItemT], T], items: Sequence[ItemT], stop: StopRequest) -> Iterator[T]:
        """Apply a function to every item. The processes share the items; each of them gets all results, in order.

        Item i is computed by process i modulo world_size. The results are exchanged in rounds of world_size items, so
        that no process waits longer than for one item. A collective operation: every process must call it with the
        same items.

        Raises:
            Interrupted: any process received a stop request. Items that are being computed are abandoned.
        """
        for first in range(0, len(items), self.world_size):
            own: list[T] = []
            stopped = False
            try:
                with stop.at_once():
                    own = [function(item) for item in items[first:first + self.world_size][self.rank:self.rank + 1]]
            except Interrupted:
                stopped = True
            rows: list[tuple[bool, list[T]]] = self.gather([(stopped, own)])
            if any(stopped for stopped, _ in rows):
                raise Interrupted(f"{stop.signal_name or 'another process'}: stopped")
            for _, results in rows:
                yield from results


def create_engine(device: str, dtype: Dtype, tf32: bool = False) -> tuple[Engine, "Accelerator"]:
    """Build the Engine and the Accelerator of this process, which runs alone or under torchrun.

    Args:
        device: cpu or cuda.
        dtype: the precision of autocast.
        tf32: whether fp32 matrix products and convolutions of this process run on tensor cores, with inputs rounded
            to 10 bits of mantissa. PyTorch's own default is on for convolutions and off for matrix products; here
            one value applies to both.
    """
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, broadcast_object_list, gather_object

    if device == "cpu":
        cpu_tuning.keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    autocast_options = AutocastKwargs()  # the accelerator reads it each time that autocast is entered
    accelerator = Accelerator(
        cpu=device == "cpu", mixed_precision=AUTOCAST[dtype],
        kwargs_handlers=[autocast_options, InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)])
    scaler = accelerator.scaler or torch.amp.GradScaler(accelerator.device.type, enabled=False)

    def backward(loss: Tensor) -> None:
        _backward(scaler.scale(loss))

    def broadcast(value: Any) -> Any:
        return broadcast_object_list([value])[0]

    def set_autocast_cache(enabled: bool) -> None:
        autocast_options.cache_enabled = enabled

    def all_reduce_mean(values: Tensor) -> Tensor:
        reduced: Tensor = accelerator.reduce(values, reduction="mean")
        return reduced

    return Engine(
        autocast=accelerator.autocast,
        backward=backward,
        scaler=scaler,
        no_sync=accelerator.no_sync,
        all_reduce_mean=all_reduce_mean,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        local_rank=accelerator.local_process_index,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),  # set by PyTorch's launcher
        unwrap=accelerator.unwrap_model,
        barrier=accelerator.wait_for_everyone,
        broadcast=broadcast,
        gather=gather_object,
        set_autocast_cache=set_autocast_cache,
    ), accelerator
