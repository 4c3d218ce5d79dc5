"""The interface of optimizers that save memory by running the forward and backward pass themselves."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dreambooth.runtime.engine import Engine

# Entries of parameter groups that are state. k counts steps (Prodigy, schedule-free), and so does `step` (optimizers of
# pytorch_optimizer). d... belong to Prodigy, the others to schedule-free.
GROUP_STATE = frozenset({"k", "step", "d", "d_max", "d_hat", "d_numerator", "d_denom", "weight_sum", "lr_max",
                         "scheduled_lr", "train_mode"})


class StreamingOptimizer(torch.optim.Optimizer):
    """An optimizer that can use each gradient as soon as it is computed, so that not all gradients are stored together.

    It has one parameter group and the same `state_dict` as an ordinary optimizer of the same parameters. Learning-rate
    schedules and checkpoints therefore work with both kinds of optimizers, and a run may resume with different memory
    settings.
    """

    @abstractmethod
    def update(self, forward_backward: Callable[[], Tensor], engine: Engine, max_grad_norm: float | None,
               step: int) -> tuple[Tensor, Tensor, bool]:
        """Perform one optimizer step.

        Args:
            forward_backward: runs the forward and backward pass of the whole batch and returns the losses.
            max_grad_norm: limit of the global gradient norm; None: no clipping.
            step: number of steps that are completed before this one; it seeds the random numbers of stochastic
                rounding.

        Returns:
            The losses; the gradient norm before clipping (0-d); and whether the weights were updated. If a gradient
            overflowed, the step is skipped: neither weights nor optimizer state change, and the last result is False.
        """

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Return the tensors that the optimizer updates, by parameter name. They are not converted or moved."""

    def sync_weights(self) -> None:
        """Copy `weights()` to the model's parameters, if the optimizer updates separate copies of them.

        This method is called after each step, and after a checkpoint was loaded.
        """


def upcast_half(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor in fp32, and any other tensor unchanged."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a parameter group: all its entries except the parameters and `group_state`."""
    return {key: value for key, value in group.items() if key != "params" and key not in GROUP_STATE}


def group_state(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a parameter group that the steps of an optimizer change, such as Prodigy's estimate d."""
    return {key: value for key, value in group.items() if key in GROUP_STATE}


def register_gradient_hook(parameter: Tensor, hook: Callable[[Tensor], None]) -> Any:
    """Call `hook` with the parameter each time its gradient has been accumulated; return the handle of the hook."""
    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
