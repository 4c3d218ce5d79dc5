"""An optimizer that updates each parameter separately, for memory.optimizer_in_backward and memory.weights=half.

With optimizer_in_backward, each gradient is used and released as soon as the backward pass has computed it, so that
only one gradient exists at a time. Clipping needs the norm of all gradients before the step, and fp16 training must
know whether a gradient overflowed. With clipping or in fp16, a first forward and backward pass therefore measures the
gradients, and a second forward and backward pass updates the parameters. The two passes take about twice the time of
one. If the device's kernels are deterministic, both passes compute the same gradients, and the updated weights are the
same as without optimizer_in_backward. If a gradient overflows in fp16, there is no second pass, and no weight changes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.optim.optimizers import OptimizerFactory
from dreambooth.optim.parameter_updater import ParameterUpdater
from dreambooth.optim.stochastic_rounding import Rounder
from dreambooth.optim.streaming_optimizer import (
    StreamingOptimizer,
    hyperparameters,
    register_gradient_hook,
    upcast_half,
)
from dreambooth.runtime.engine import Engine
from dreambooth.runtime.gradient_clipping import divisor, gradient_norm


@dataclass
class GradientStatistics:
    """The norm of each parameter's gradient, and whether a gradient overflowed."""

    inverse_scale: Tensor | None  # 1 / loss scale, (1,); None: no loss scaling
    found_inf: Tensor  # (1,): above 0 once a gradient was not finite
    norms: dict[int, Tensor] = field(default_factory=dict)  # number of the parameter -> norm of its gradient

    def unscale(self, gradient: Tensor) -> Tensor:
        """Return the gradient divided by the loss scale, in fp32; set `found_inf` if the gradient is not finite."""
        if self.inverse_scale is None:
            return upcast_half(gradient)
        gradient = upcast_half(gradient) if gradient.element_size() < 4 else gradient.clone()
        torch._amp_foreach_non_finite_check_and_unscale_([gradient], self.found_inf, self.inverse_scale)
        return gradient

    def record(self, number: int, updater: ParameterUpdater) -> None:
        """Record the norm of the gradient of parameter `number`, which `updater` updates."""
        norms = [gradient_norm(self.unscale(piece)) for piece in updater.gradients()]
        self.norms[number] = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def global_norm(self) -> Tensor:
        """Return the norm of all gradients together (0-d).

        As in gradient_clipping.total_norm, it is computed as the norm of the vector of all parameters' gradient norms.
        """
        norm: Tensor = torch.linalg.vector_norm(torch.stack([self.norms[number] for number in sorted(self.norms)]))
        return norm


class PerParameterOptimizer(StreamingOptimizer):
    """An optimizer that updates each parameter with an optimizer of its own.

    Args:
        trained: the trained parameters by name.
        factory: creates an optimizer for a list of parameters. It is called for each parameter separately.
        in_backward: update each parameter during the backward pass instead of after it.
        rounder: stores the updated values in half-precision parameters.
    """

    def __init__(self, trained: dict[str, nn.Parameter], factory: OptimizerFactory, in_backward: bool,
                 rounder: Rounder | None) -> None:
        self.updaters = [ParameterUpdater(name, parameter, factory, rounder) for name, parameter in trained.items()]
        self.in_backward = in_backward
        super().__init__(list(trained.values()), hyperparameters(self.updaters[0].optimizers[0].param_groups[0]))

    def update(self, forward_backward: Callable[[], Tensor], engine: Engine, max_grad_norm: float | None,
               step: int) -> tuple[Tensor, Tensor, bool]:
        self._opt_called = True  # otherwise the learning-rate schedule warns that `step` was never called
        statistics = self._new_statistics(engine)
        if self.in_backward and max_grad_norm is None and not engine.scaler.is_enabled():
            with self._on_each_gradient(partial(self._record_and_step, statistics, step)):
                losses = forward_backward()
            return losses, statistics.global_norm(), True
        if self.in_backward:
            with self._on_each_gradient(partial(self._record_and_release, statistics)):
                losses = forward_backward()
        else:
            losses = forward_backward()
            for number, updater in enumerate(self.updaters):
                if updater.parameter.grad is not None:
                    statistics.record(number, updater)
        norm = statistics.global_norm()
        if not engine.overflowed(statistics.found_inf):
            clipping = None if max_grad_norm is None else divisor(norm, max_grad_norm)
            self._step_all(forward_backward, statistics, clipping, step)
        # This call comes last, because it may raise the loss scale, and both passes need the same scale.
        stepped = engine.update_scaler(statistics.found_inf)
        self.zero_grad(set_to_none=True)
        return losses, norm, stepped

    def weights(self) -> dict[str, Tensor]:
        return {updater.name: updater.parameter for updater in self.updaters}

    def state_dict(self) -> dict[str, Any]:
        states = [updater.state() for updater in self.updaters]
        # A weight without gradients is never updated, so the state of its group stays as it was at the beginning.
        updated = next((number for number, state in enumerate(states) if state), 0)
        group = hyperparameters(self.param_groups[0]) | self.updaters[updated].group_state() | {
            "params": list(range(len(self.updaters)))}
        return {"state": {number: state for number, state in enumerate(states) if state}, "param_groups": [group]}

    def states(self) -> dict[Tensor, dict[str, Any]]:
        """Return the optimizer state of each full-precision parameter that was updated."""
        return {updater.parameter: updater.optimizers[0].state[updater.parameter] for updater in self.updaters
                if updater.parameter in updater.optimizers[0].state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        [group] = state_dict["param_groups"]
        if len(group["params"]) != len(self.updaters):
            raise ValueError("it has the optimizer state of a different number of parameters")
        self.param_groups[0].update(hyperparameters(group))
        for number, updater in enumerate(self.updaters):
            updater.load(state_dict["state"].get(number, {}), group)

    def _new_statistics(self, engine: Engine) -> GradientStatistics:
        device = self.updaters[0].parameter.device
        return GradientStatistics(engine.inverse_loss_scale(device), torch.zeros(1, device=device))

    @contextmanager
    def _on_each_gradient(self, act: Callable[[int, ParameterUpdater], None]) -> Iterator[None]:
        """Call `act` for each parameter as soon as a backward pass has computed the parameter's gradient."""
        handles = [register_gradient_hook(
            updater.parameter, lambda _, n=number, updater=updater: act(n, updater))  # type: ignore[misc]
            for number, updater in enumerate(self.updaters)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _record_and_step(self, statistics: GradientStatistics, step: int, number: int,
                         updater: ParameterUpdater) -> None:
        statistics.record(number, updater)
        updater.step(upcast_half, self.param_groups[0]["lr"], step)

    @torch.no_grad()
    def _record_and_release(self, statistics: GradientStatistics, number: int, updater: ParameterUpdater) -> None:
        statistics.record(number, updater)
        updater.parameter.grad = None

    def _step_all(self, forward_backward: Callable[[], Tensor], statistics: GradientStatistics,
                  clipping: Tensor | None, step: int) -> None:
        """Update every parameter.

        With `in_backward`, a second forward and backward pass computes the gradients again. Otherwise the stored
        gradients are used.

        Args:
            statistics: holds the loss scale, by which each gradient is divided.
            clipping: each gradient is divided by this number, 0-d; None: no clipping.
            step: number of steps that are completed before this one.
        """
        if self.in_backward:
            with self._on_each_gradient(partial(self._step_one, statistics, clipping, step)):
                forward_backward()
            return
        for number, updater in enumerate(self.updaters):
            if updater.parameter.grad is not None:
                self._step_one(statistics, clipping, step, number, updater)

    @torch.no_grad()
    def _step_one(self, statistics: GradientStatistics, clipping: Tensor | None, step: int, number: int,
                  updater: ParameterUpdater) -> None:
        def unscale_and_clip(piece: Tensor) -> Tensor:
            gradient = statistics.unscale(piece)
            return gradient if clipping is None else gradient.div_(clipping.to(gradient))

        updater.step(unscale_and_clip, self.param_groups[0]["lr"], step)
