"""The optimizer and the learning-rate schedule, by the names of the config."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dreambooth.config.enums import OptimizerKind
from dreambooth.config.schema import Optimizer, Train

BLOCK = 256  # elements that share a scale in 8-bit state
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]  # the planner hands in a memory model instead


def maker(spec: Optimizer, learning_rate: float) -> Make:
    """The factory of `spec`'s optimizer; called once with all trained weights, or once for each of them."""
    return partial(build_optimizer, spec=spec, learning_rate=learning_rate)


def build_optimizer(parameters: list[nn.Parameter], spec: Optimizer, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer over `parameters`.

    - adamw: PyTorch's, fp32 state, fused: no temporaries as large as the model, as its foreach form has.
    - adamw8bit, paged_adamw8bit: bitsandbytes', 8-bit state (Dettmers et al. 2022, arXiv:2110.02861).
    - adafactor: transformers' (Shazeer & Stern 2018, arXiv:1804.04235) without relative steps and parameter scaling,
      so that the learning rate means what it means elsewhere; torch.optim.Adafactor always multiplies it by the
      weights' root mean square.
    """
    given: dict[str, Any] = {"lr": learning_rate, "weight_decay": spec.weight_decay}
    if spec.kind is OptimizerKind.adafactor:
        from transformers.optimization import Adafactor

        return Adafactor(parameters, beta1=spec.beta1 or None, scale_parameter=False, relative_step=False, **given)
    given |= {"betas": (spec.beta1, spec.beta2), "eps": spec.eps}
    if spec.kind is OptimizerKind.adamw:
        return torch.optim.AdamW(parameters, fused=True, **given)
    from bitsandbytes.optim import adamw

    kind = adamw.AdamW8bit if spec.kind is OptimizerKind.adamw8bit else adamw.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, **given)
    return optimizer


def separable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether pieces of a weight, of whole blocks, may be stepped as weights of their own: in all but Adafactor."""
    return getattr(optimizer, "kind", None) is not OptimizerKind.adafactor and type(optimizer).__name__ != "Adafactor"


def build_schedule(optimizer: torch.optim.Optimizer, train: Train) -> torch.optim.lr_scheduler.LRScheduler:
    """diffusers' schedule of that name over max_train_steps; it is stepped once an optimizer step that was taken."""
    from diffusers.optimization import get_scheduler

    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        train.lr_scheduler.value, optimizer,
        num_warmup_steps=train.lr_warmup_steps, num_training_steps=train.max_train_steps)
    return schedule
