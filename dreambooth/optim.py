"""The optimizer and the learning-rate schedule, by the names of the config."""

from collections.abc import Iterable

import torch
from torch import nn

from dreambooth.choices import OptimizerKind
from dreambooth.schema import Optimizer, Train


def build_optimizer(parameters: Iterable[nn.Parameter], spec: Optimizer, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with fp32 state, or bitsandbytes' with 8-bit state (Dettmers et al. 2022, arXiv:2110.02861)."""
    betas = (spec.beta1, spec.beta2)
    if spec.kind is OptimizerKind.adamw:
        return torch.optim.AdamW(
            list(parameters), lr=learning_rate, betas=betas, eps=spec.eps, weight_decay=spec.weight_decay)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(
        list(parameters), lr=learning_rate, betas=betas, eps=spec.eps, weight_decay=spec.weight_decay)
    return optimizer


def build_schedule(optimizer: torch.optim.Optimizer, train: Train) -> torch.optim.lr_scheduler.LRScheduler:
    """diffusers' schedule of that name over max_train_steps; it is stepped once an optimizer step that was taken."""
    from diffusers.optimization import get_scheduler

    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        train.lr_scheduler.value, optimizer,
        num_warmup_steps=train.lr_warmup_steps, num_training_steps=train.max_train_steps)
    return schedule
