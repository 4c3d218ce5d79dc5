"""One optimizer a parameter: stepped in the backward pass, or over weights in half precision.

In the backward pass a gradient is used and released as soon as it is there, so that one exists at a time. Where the
whole gradient must be known first (its norm for clipping, overflow in fp16) a first pass only measures it and the
second one steps: about twice the forward and backward time, the same numbers. Both passes compute the same gradient
as far as the device's kernels are deterministic; a skipped fp16 step has no second pass and changes nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.optim.optimizers import Make
from dreambooth.optim.parameter_slot import Slot
from dreambooth.optim.stochastic_rounding import Rounder
from dreambooth.optim.streaming_optimizer import Levered, on_gradient, settings, wide
from dreambooth.runtime.engine import Engine


@dataclass
class Measured:
    """What is known of a gradient: norms by parameter and whether one overflowed."""

    inverse: Tensor | None  # 1 / loss scale, (1,)
    found: Tensor  # (1,): above 0 once a gradient was not finite
    norms: dict[int, Tensor] = field(default_factory=dict)

    def unscaled(self, gradient: Tensor) -> Tensor:
        """The gradient without the loss scale; what is not finite is noted."""
        if self.inverse is None:
            return wide(gradient)
        gradient = wide(gradient) if gradient.element_size() < 4 else gradient.clone()
        torch._amp_foreach_non_finite_check_and_unscale_([gradient], self.found, self.inverse)
        return gradient

    def note(self, number: int, slot: Slot) -> None:
        """The norm of a gradient, or of its pieces' norms."""
        norms = [torch._foreach_norm([self.unscaled(piece)])[0] for piece in slot.gradients()]
        self.norms[number] = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def norm(self) -> Tensor:
        """The global norm, as clip_grad_norm_ computes it: the norm of norms in the order of the parameters."""
        norm: Tensor = torch.linalg.vector_norm(torch.stack([self.norms[number] for number in sorted(self.norms)]))
        return norm


class PerParameter(Levered):
    """An optimizer for each of `trained`."""

    def __init__(self, trained: dict[str, nn.Parameter], make: Make, in_backward: bool,
                 rounder: Rounder | None) -> None:
        self.slots = [Slot(name, parameter, make, rounder) for name, parameter in trained.items()]
        self.in_backward = in_backward
        super().__init__(list(trained.values()), settings(self.slots[0].optimizers[0].param_groups[0]))

    def update(self, run: Callable[[], Tensor], engine: Engine, limit: float | None,
               step: int) -> tuple[Tensor, Tensor, bool]:
        self._opt_called = True  # else the schedule warns that nobody called `step`
        measured = self._measured(engine)
        if self.in_backward and limit is None and not engine.scaler.is_enabled():
            with self._on_gradient(partial(self._note_and_step, measured, step)):
                losses = run()
            return losses, measured.norm(), True
        if self.in_backward:
            with self._on_gradient(partial(self._note, measured)):
                losses = run()
        else:
            losses = run()
            for number, slot in enumerate(self.slots):
                if slot.parameter.grad is not None:
                    measured.note(number, slot)
        norm = measured.norm()
        if not engine.overflowed(measured.found):
            factor = None if limit is None else torch.clamp(limit / (norm + 1e-6), max=1.0)  # of clip_grad_norm_
            self._take(run, measured, factor, step)
        taken = engine.judge(measured.found)  # last: the loss scale may grow, and the second pass has the first one's
        self.zero_grad(set_to_none=True)
        return losses, norm, taken

    def weights(self) -> dict[str, Tensor]:
        return {slot.name: slot.parameter for slot in self.slots}

    def state_dict(self) -> dict[str, Any]:
        states = (slot.state() for slot in self.slots)
        return {"state": {number: state for number, state in enumerate(states) if state},
                "param_groups": [settings(self.param_groups[0]) | {"params": list(range(len(self.slots)))}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        [group] = state_dict["param_groups"]
        if len(group["params"]) != len(self.slots):
            raise ValueError("the optimizer has another number of parameters")
        self.param_groups[0].update(settings(group))
        for number, slot in enumerate(self.slots):
            slot.load(state_dict["state"].get(number, {}), group)

    def _measured(self, engine: Engine) -> Measured:
        device = self.slots[0].parameter.device
        scale = engine.scaler.get_scale() if engine.scaler.is_enabled() else None
        inverse = None if scale is None else torch.tensor([1 / scale], dtype=torch.float32, device=device)
        return Measured(inverse, torch.zeros(1, device=device))

    def _take(self, run: Callable[[], Tensor], measured: Measured, factor: Tensor | None, step: int) -> None:
        if self.in_backward:
            with self._on_gradient(partial(self._step, measured, factor, step)):
                run()
            return
        for number, slot in enumerate(self.slots):
            if slot.parameter.grad is not None:
                self._step(measured, factor, step, number, slot)

    @contextmanager
    def _on_gradient(self, act: Callable[[int, Slot], None]) -> Iterator[None]:
        handles = [on_gradient(slot.parameter, lambda _, n=n, slot=slot: act(n, slot))  # type: ignore[misc]
                   for n, slot in enumerate(self.slots)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _note(self, measured: Measured, number: int, slot: Slot) -> None:
        measured.note(number, slot)
        slot.parameter.grad = None

    @torch.no_grad()
    def _step(self, measured: Measured, factor: Tensor | None, step: int, number: int, slot: Slot) -> None:
        def ready(piece: Tensor) -> Tensor:
            gradient = measured.unscaled(piece)
            return gradient if factor is None else gradient.mul_(factor.to(gradient))

        slot.step(ready, self.param_groups[0]["lr"], step)

    @torch.no_grad()
    def _note_and_step(self, measured: Measured, step: int, number: int, slot: Slot) -> None:
        measured.note(number, slot)
        slot.step(wide, self.param_groups[0]["lr"], step)
