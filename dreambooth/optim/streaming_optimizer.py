"""What the optimizers of the levers have in common: they run forward and backward themselves."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dreambooth.runtime.engine import Engine


class Levered(torch.optim.Optimizer):
    """An optimizer that takes gradients as they are produced, so that they never all exist at once.

    To schedules and checkpoints it looks like the plain optimizer over the same parameters: one group, the same
    `state_dict`, so that a run may resume under other levers.
    """

    @abstractmethod
    def update(self, run: Callable[[], Tensor], engine: Engine, limit: float | None,
               step: int) -> tuple[Tensor, Tensor, bool]:
        """Make a step out of `run`, which does forward and backward and returns losses.

        Args:
            limit: of the gradient's global norm; None: no clipping.
            step: completed steps, a key of random numbers.

        Returns:
            the losses; the gradient's norm before clipping, 0-d; False if an overflow skipped the step, which then
            changed nothing.
        """

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name in the precision in which they are trained, wherever they live."""

    def loaded(self) -> None:
        """Called after `weights()` were filled from a checkpoint."""


def wide(tensor: Tensor) -> Tensor:
    """The tensor itself, or in fp32 if it is in half precision."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def settings(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def on_gradient(parameter: Tensor, act: Callable[[Tensor], None]) -> Any:
    """Call `act(parameter)` each time a backward pass has added to its gradient; returns a handle to remove it."""
    return parameter.register_post_accumulate_grad_hook(act)  # type: ignore[no-untyped-call]
