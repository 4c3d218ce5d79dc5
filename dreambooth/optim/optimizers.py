"""Builds the optimizer and the learning-rate schedule that the configuration selects."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dreambooth.config.enums import OptimizerKind
from dreambooth.config.schema import Optimizer, Train

BLOCK_SIZE = 256  # elements that share one scale in 8-bit optimizer state
# Creates the optimizer of a list of parameters. The planner passes a factory of optimizers that only allocate memory.
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def optimizer_factory(spec: Optimizer, learning_rate: float) -> OptimizerFactory:
    """Return a function that builds the optimizer of `spec` for a list of parameters.

    The returned function is called once with all trained parameters, or once per trained parameter.
    """
    return partial(build_optimizer, spec=spec, learning_rate=learning_rate)


def build_optimizer(parameters: list[nn.Parameter], spec: Optimizer, learning_rate: float) -> torch.optim.Optimizer:
    """Build the optimizer that `spec.kind` selects.

    - adamw: PyTorch's AdamW, with fp32 state. The fused implementation is used, because the foreach implementation
      allocates temporary tensors as large as the model.
    - adamw8bit, paged_adamw8bit: bitsandbytes' AdamW, with 8-bit state (Dettmers et al. 2022, arXiv:2110.02861).
    - adafactor: transformers' Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), without relative steps and parameter
      scaling, so that the learning rate means the same as with the other optimizers. torch.optim.Adafactor is not used,
      because it always multiplies the learning rate by the root mean square of the weights.
    """
    arguments: dict[str, Any] = {"lr": learning_rate, "weight_decay": spec.weight_decay}
    if spec.kind is OptimizerKind.adafactor:
        from transformers.optimization import Adafactor

        return Adafactor(parameters, beta1=spec.beta1 or None, scale_parameter=False, relative_step=False, **arguments)
    arguments |= {"betas": (spec.beta1, spec.beta2), "eps": spec.eps}
    if spec.kind is OptimizerKind.adamw:
        return torch.optim.AdamW(parameters, fused=True, **arguments)
    from bitsandbytes.optim import adamw

    kind = adamw.AdamW8bit if spec.kind is OptimizerKind.adamw8bit else adamw.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, **arguments)
    return optimizer


def can_step_in_pieces(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the results stay the same if the optimizer updates the pieces of a weight as separate weights.

    Each piece consists of whole quantization blocks of 8-bit state (BLOCK_SIZE elements). Returns False for Adafactor.
    """
    return getattr(optimizer, "kind", None) is not OptimizerKind.adafactor and type(optimizer).__name__ != "Adafactor"


def build_lr_scheduler(optimizer: torch.optim.Optimizer, train: Train) -> torch.optim.lr_scheduler.LRScheduler:
    """Build diffusers' learning-rate schedule `train.lr_scheduler` over max_train_steps.

    Skipped optimizer steps do not advance the schedule.
    """
    from diffusers.optimization import get_scheduler

    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        train.lr_scheduler.value, optimizer,
        num_warmup_steps=train.lr_warmup_steps, num_training_steps=train.max_train_steps)
    return schedule
