"""memory.offload_optimizer: keeps optimizer state, master weights and the EMA in host memory.

Master weights are the fp32 copies of the trained weights that the optimizer updates. The device computes with a copy of
them, in which matrices have half precision. Each gradient is moved to the host as soon as the backward pass has
computed it, and is accumulated there in fp32. The half-precision weights on the device are equal to the values to which
autocast would cast the master weights, so the results are the same as without memory.offload_optimizer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.optim.muon import copy_mark
from dreambooth.optim.optimizers import OptimizerFactory
from dreambooth.optim.streaming_optimizer import (
    StreamingOptimizer,
    hyperparameters,
    register_gradient_hook,
    upcast_half,
)
from dreambooth.runtime.engine import Engine

HOST = torch.device("cpu")


class OffloadedOptimizer(StreamingOptimizer):
    """An optimizer that updates fp32 copies of a model's trained parameters in host memory.

    Args:
        model: the model on the device; its trained matrices are cast to `half`, see `cast_to_half`.
        factory: creates the optimizer of the fp32 copies.
        half: the compute precision.
    """

    def __init__(self, model: nn.Module, factory: OptimizerFactory, half: torch.dtype) -> None:
        self.masters = {name: copy_mark(p, nn.Parameter(upcast_half(p.detach()).to(HOST, copy=True)))
                        for name, p in model.named_parameters() if p.requires_grad}
        cast_to_half(model, half)
        self.device_weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, weight in self.device_weights.items():
            register_gradient_hook(weight, partial(_move_gradient, self.masters[name]))
        self.inner = factory(list(self.masters.values()))
        super().__init__(list(self.masters.values()), hyperparameters(self.inner.param_groups[0]))
        self._share_state()

    def update(self, forward_backward: Callable[[], Tensor], engine: Engine, max_grad_norm: float | None,
               step: int) -> tuple[Tensor, Tensor, bool]:
        self._opt_called = True  # otherwise the learning-rate schedule warns that `step` was never called
        losses = forward_backward()
        found_inf = self._unscale(engine)
        norm = engine.clip_unscaled(self.inner, self.masters.values(), max_grad_norm)
        if not engine.overflowed(found_inf):
            self.inner.step()
        stepped = engine.update_scaler(found_inf.to(next(iter(self.device_weights.values())).device))
        self.inner.zero_grad(set_to_none=True)
        if stepped:
            self.sync_weights()
        return losses, norm, stepped

    @torch.no_grad()
    def _unscale(self, engine: Engine) -> Tensor:
        """Divide the gradients in host memory by the loss scale.

        `GradScaler.unscale_` is not used: it would divide without waiting for the copy of the loss scale to the host.

        Returns:
            found_inf (1,), above 0 if a gradient contains NaN or infinity.
        """
        found_inf, inverse_scale = torch.zeros(1), engine.inverse_loss_scale(HOST)
        if inverse_scale is not None:
            for master in self.masters.values():
                if master.grad is not None:
                    torch._amp_foreach_non_finite_check_and_unscale_([master.grad], found_inf, inverse_scale)
        return found_inf

    def weights(self) -> dict[str, Tensor]:
        return dict(self.masters)

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Copy the master weights to the model's weights on the device."""
        for name, weight in self.device_weights.items():
            weight.copy_(self.masters[name])

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self._share_state()

    def _share_state(self) -> None:
        """Share parameter groups and state with the inner optimizer.

        The learning-rate schedule changes the parameter groups of this optimizer, and the inner optimizer has to use
        the same learning rate.
        """
        self.param_groups, self.state = self.inner.param_groups, self.inner.state


def cast_to_half(model: nn.Module, half: torch.dtype, embeddings: bool = False) -> None:
    """Cast the trained weights of linear and convolution layers to `half`; leave normalisation layers unchanged.

    Autocast casts exactly these weights at every use. The parameters are replaced by new ones, so optimizers have to be
    created afterwards.

    Args:
        half: the compute precision; with fp32, no weight is cast.
        embeddings: also cast embedding tables. The output of an embedding layer is cast back to fp32, so that sums with
            this output stay fp32.
    """
    for module in model.modules():
        is_embedding = embeddings and isinstance(module, nn.Embedding)
        if (is_embedding or isinstance(module, (nn.Linear, nn.Conv2d))) and half.itemsize < 4:
            if is_embedding:
                module.register_forward_hook(lambda _, inputs, output: output.float())
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad:
                    setattr(module, name, nn.Parameter(parameter.detach().to(half)))


@torch.no_grad()
def _move_gradient(master: nn.Parameter, weight: Tensor) -> None:
    """Add a device weight's gradient to the gradient of its master weight, and free the gradient on the device."""
    assert weight.grad is not None
    gradient = upcast_half(weight.grad.to(HOST))
    weight.grad = None
    if master.grad is None:
        master.grad = gradient
    else:
        master.grad += gradient
