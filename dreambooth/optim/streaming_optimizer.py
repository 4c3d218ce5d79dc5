"""The interface of the optimizers behind the memory levers: they run the forward and backward pass themselves."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dreambooth.runtime.engine import Engine


class StreamingOptimizer(torch.optim.Optimizer):
    """An optimizer that consumes gradients while they are produced, so that they never all exist at once.

    To schedules and checkpoints it looks like the plain optimizer over the same parameters: it has one parameter group
    and the same `state_dict`. A run may therefore resume under other memory levers.
    """

    @abstractmethod
    def update(self, forward_backward: Callable[[], Tensor], engine: Engine, max_grad_norm: float | None,
               step: int) -> tuple[Tensor, Tensor, bool]:
        """Make one optimizer step.

        Args:
            forward_backward: runs the forward and backward pass of the whole batch and returns the losses.
            max_grad_norm: limit of the global gradient norm; None: no clipping.
            step: number of completed steps; it seeds the random numbers of stochastic rounding.

        Returns:
            The losses; the gradient norm before clipping (0-d); False if a gradient overflowed. In that case the step
            was skipped and nothing has changed.
        """

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, in the precision in which they are trained and on the device that holds them."""

    def sync_weights(self) -> None:
        """Copy `weights()` to where the model computes, if that is elsewhere: after a step and after a checkpoint."""


def upcast_half(tensor: Tensor) -> Tensor:
    """A half-precision tensor in fp32; any other tensor as it is."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def register_gradient_hook(parameter: Tensor, hook: Callable[[Tensor], None]) -> Any:
    """Call `hook(parameter)` after each backward pass has accumulated its gradient; returns a handle to remove it."""
    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
