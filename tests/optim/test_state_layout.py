"""A loaded optimizer state has the memory layout that the optimizer's kernels expect."""

from functools import partial
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from dreambooth.config.enums import Rounding
from dreambooth.optim.parameter_updater import ParameterUpdater
from dreambooth.optim.state_layout import load_state
from dreambooth.optim.stochastic_rounding import Rounder


def test_the_state_of_an_updater_gets_the_strides_of_its_weight() -> None:
    """A fused kernel reads a weight and its moments in the order of memory; those from a file are contiguous."""
    def build() -> ParameterUpdater:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(5, 3, 3, 3).to(memory_format=torch.channels_last))
        return ParameterUpdater("weight", weight, partial(torch.optim.AdamW, lr=0.1, fused=True), None)

    def step(updater: ParameterUpdater, number: int) -> None:
        order = torch.arange(updater.parameter.numel(), dtype=torch.float32).view_as(updater.parameter)
        updater.parameter.grad = torch.empty_like(updater.parameter).copy_((order + number).sin())
        updater.step(lambda gradient: gradient, 0.1, number)

    uninterrupted, resumed = build(), build()
    step(uninterrupted, 0)
    resumed.parameter.data.copy_(uninterrupted.parameter.data)
    saved = {key: value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
             for key, value in uninterrupted.state().items()}
    resumed.load(saved, {key: value for key, value in uninterrupted.optimizers[0].param_groups[0].items()
                         if key != "params"})
    step(uninterrupted, 1), step(resumed, 1)
    assert resumed.parameter.equal(uninterrupted.parameter)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_state_of_a_paged_optimizer_is_loaded_into_buffers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' own load_state_dict would put it into the memory of the GPU."""
    def build() -> Any:
        weight = torch.ones(4, 4, 16, 16).to(memory_format=torch.channels_last)
        return bitsandbytes.optim.PagedAdamW8bit([nn.Parameter(weight)])

    old, new = build(), build()
    first = torch.arange(4096, dtype=torch.uint8).view(4, 4, 16, 16)
    moments = {"state1": first, "state2": first + 1,
               "absmax1": torch.ones(16), "absmax2": torch.ones(16), "step": 3}
    old.state[old.param_groups[0]["params"][0]] = moments
    buffers: list[Tensor] = []

    def get_state_buffer(parameter: Tensor, dtype: torch.dtype) -> Tensor:
        buffers.append(torch.zeros(parameter.shape, dtype=dtype))  # as bitsandbytes' pageable memory, contiguous
        buffers[-1].is_paged = True  # type: ignore[attr-defined]
        return buffers[-1]

    monkeypatch.setattr(new, "get_state_buffer", get_state_buffer)
    load_state(new, old.state_dict())
    [entries] = new.state.values()
    assert entries["state1"] is buffers[0] and entries["state2"] is buffers[1] and len(buffers) == 2
    assert all(entries[name].equal(value) for name, value in moments.items() if isinstance(value, Tensor))
    assert entries["step"] == 3


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_state_of_a_half_weight_is_paged_too() -> None:
    """Between steps, its optimizer has a parameter without elements."""
    updater = ParameterUpdater("weight", nn.Parameter(torch.ones(4, 1024, dtype=torch.bfloat16)),
                               bitsandbytes.optim.PagedAdamW8bit, Rounder(Rounding.stochastic, 0))
    state = {"state1": torch.arange(4096, dtype=torch.uint8).view(4, 1024), "absmax1": torch.ones(16), "step": 3}
    group = {key: value for key, value in updater.optimizers[0].param_groups[0].items() if key != "params"}
    updater.load(state, group)
    [entries] = updater.optimizers[0].state.values()
    assert entries["state1"].equal(state["state1"])
