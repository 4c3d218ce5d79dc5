"""Builds the optimizer and the learning-rate schedule that the configuration selects."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dreambooth.config.enums import OptimizerKind
from dreambooth.config.schema import Optimizer, Train
from dreambooth.optim.muon import MuonWithAdamW

BLOCK_SIZE = 256  # elements that share one scale in 8-bit optimizer state
DEFAULT_BETA3 = 0.9999  # of CAME and of AdEMAMix
# Optimizers that must not update the pieces of a weight as separate weights, with the names of their classes.
WHOLE = {OptimizerKind.adafactor: "Adafactor", OptimizerKind.came: "CAME", OptimizerKind.ademamix8bit: "AdEMAMix8bit"}
# Creates the optimizer of a list of parameters. The planner passes a factory of optimizers that only allocate memory.
# In place of parameters, the list may contain parameter groups: dictionaries with "params" and options such as "lr".
OptimizerFactory = Callable[[list[Any]], torch.optim.Optimizer]


def optimizer_factory(spec: Optimizer, learning_rate: float) -> OptimizerFactory:
    """Return a function that builds the optimizer of `spec` for a list of parameters.

    The returned function is called once with all trained parameters, or once per trained parameter.
    """
    return partial(build_optimizer, spec=spec, learning_rate=learning_rate)


def build_optimizer(parameters: list[Any], spec: Optimizer, learning_rate: float) -> torch.optim.Optimizer:
    """Build the optimizer that `spec.kind` selects.

    - adamw: PyTorch's AdamW, with fp32 state. The fused implementation is used, because the foreach implementation
      allocates temporary tensors as large as the model.
    - adamw8bit, paged_adamw8bit: bitsandbytes' AdamW, with 8-bit state (Dettmers et al. 2022, arXiv:2110.02861).
    - ademamix8bit: bitsandbytes' AdEMAMix, with 8-bit state (Pagliardini et al. 2024, arXiv:2409.03137), without the
      warm-ups of alpha and beta3, so that a run may be extended.
    - prodigy: the package prodigyopt, by the authors of Prodigy (Mishchenko & Defazio 2023, arXiv:2306.06101), with
      the settings that diffusers' DreamBooth scripts use: bias correction, and an estimate that leaves out the learning
      rate (safeguard_warmup).
    - schedule_free: the package schedulefree, by the authors of schedule-free AdamW; see schedule_free.py. It updates
      one parameter at a time, because the foreach implementation allocates temporary tensors as large as the model.
    - lion, came: Lion (Chen et al. 2023, arXiv:2302.06675) and CAME (Luo et al. 2023, arXiv:2307.02047) of the package
      pytorch_optimizer, also one parameter at a time.
    - muon: see muon.py.
    - adafactor: transformers' Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), without relative steps and parameter
      scaling, so that the learning rate means the same as with the other optimizers. torch.optim.Adafactor is not used,
      because it always multiplies the learning rate by the root mean square of the weights.
    """
    arguments: dict[str, Any] = {"lr": learning_rate, "weight_decay": spec.weight_decay}
    if spec.kind is OptimizerKind.adafactor:
        from transformers.optimization import Adafactor

        return Adafactor(parameters, beta1=spec.beta1 or None, scale_parameter=False, relative_step=False, **arguments)
    arguments["betas"] = spec.beta1, spec.beta2
    if spec.kind in (OptimizerKind.lion, OptimizerKind.came):
        return _build_of_pytorch_optimizer(parameters, spec, arguments)
    arguments["eps"] = spec.eps
    if spec.kind is OptimizerKind.adamw:
        return torch.optim.AdamW(parameters, fused=True, **arguments)
    if spec.kind is OptimizerKind.muon:
        return MuonWithAdamW(parameters, **arguments)
    if spec.kind is OptimizerKind.prodigy:
        return _build_prodigy(parameters, spec, arguments)
    if spec.kind is OptimizerKind.schedule_free:
        from schedulefree import AdamWScheduleFree

        schedule_free = AdamWScheduleFree(parameters, foreach=False, **arguments)
        schedule_free.train()
        return schedule_free  # type: ignore[no-any-return]
    return _build_of_bitsandbytes(parameters, spec, arguments)


def _build_of_pytorch_optimizer(parameters: list[Any], spec: Optimizer,
                                arguments: dict[str, Any]) -> torch.optim.Optimizer:
    from pytorch_optimizer import CAME, Lion

    if spec.kind is OptimizerKind.lion:
        return Lion(parameters, foreach=False, **arguments)
    beta3 = DEFAULT_BETA3 if spec.beta3 is None else spec.beta3
    return CAME(parameters, foreach=False, **arguments | {"betas": (spec.beta1, spec.beta2, beta3)})


def _build_prodigy(parameters: list[Any], spec: Optimizer,
                   arguments: dict[str, Any]) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    optimizer: torch.optim.Optimizer = Prodigy(
        parameters, beta3=spec.beta3, d_coef=spec.d_coef, use_bias_correction=True, safeguard_warmup=True,
        growth_rate=sys.float_info.max,  # the default, infinity, is no number in JSON, the format of checkpoints
        **arguments | {"weight_decay": 0.0})
    optimizer.param_groups[0]["weight_decay"] = spec.weight_decay  # as an argument, Prodigy prints a line about it
    return optimizer


def _build_of_bitsandbytes(parameters: list[Any], spec: Optimizer,
                           arguments: dict[str, Any]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import adamw, ademamix

    kind = {OptimizerKind.adamw8bit: adamw.AdamW8bit, OptimizerKind.paged_adamw8bit: adamw.PagedAdamW8bit,
            OptimizerKind.ademamix8bit: ademamix.AdEMAMix8bit}[spec.kind]
    if spec.kind is OptimizerKind.ademamix8bit:
        arguments |= {"betas": (spec.beta1, spec.beta2, DEFAULT_BETA3 if spec.beta3 is None else spec.beta3)}
    optimizer: torch.optim.Optimizer = kind(parameters, **arguments)
    return optimizer


def can_step_in_pieces(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the results stay the same if the optimizer updates the pieces of a weight as separate weights.

    Each piece consists of whole quantization blocks of 8-bit state (BLOCK_SIZE elements). Returns False for Adafactor
    and CAME, which factorise whole matrices, and for AdEMAMix, whose state has two numbers per element in one tensor.
    """
    return getattr(optimizer, "kind", None) not in WHOLE and type(optimizer).__name__ not in WHOLE.values()


def estimated_step_size(optimizer: torch.optim.Optimizer) -> float | None:
    """Return d, Prodigy's estimate of the learning rate; None for other optimizers. The weights move by d * lr."""
    d: float | None = optimizer.param_groups[0].get("d")
    return d


def build_lr_scheduler(optimizer: torch.optim.Optimizer, train: Train) -> torch.optim.lr_scheduler.LRScheduler:
    """Build diffusers' learning-rate schedule `train.lr_scheduler` over max_train_steps.

    Skipped optimizer steps do not advance the schedule.
    """
    from diffusers.optimization import get_scheduler

    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        train.lr_scheduler.value, optimizer,
        num_warmup_steps=train.lr_warmup_steps, num_training_steps=train.max_train_steps)
    return schedule
