"""Helpers that train a toy model with memory levers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreambooth.config.enums import OptimizerKind
from dreambooth.config.schema import Memory, Optimizer
from dreambooth.data.batches import Batch
from dreambooth.optim import memory_levers
from dreambooth.optim.ema import Ema
from dreambooth.optim.optimizers import OptimizerFactory, optimizer_factory
from dreambooth.optim.streaming_optimizer import StreamingOptimizer
from dreambooth.runtime.engine import Engine
from dreambooth.training import checkpoint
from dreambooth.training.step import Objective, StepInfo, TrainState, train_step
from tests.support.toy_model import make_batches, make_schedule

BF16 = torch.bfloat16
KINDS = [kind for kind in OptimizerKind if kind is not OptimizerKind.paged_adamw8bit]  # needs CUDA


def plain_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


class Mixed(nn.Module):
    """One layer of each kind that autocast treats differently; large enough for 8-bit state (4096 elements)."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = nn.Embedding(10, 64)
        self.linear = nn.Linear(64, 72)
        self.blocks = nn.ModuleList([self.linear])  # so that Muon updates its matrix
        self.norm = nn.GroupNorm(8, 72)
        self.unet = nn.Conv2d(72, 1, 3, padding=1)
        self.into = nn.Conv2d(1, 72, 1)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        words = self.linear(self.text_encoder(text.view(-1)))
        hidden = self.norm(self.into(latents) + words.view(*words.shape, 1, 1))
        return self.unet(torch.nn.functional.silu(hidden))


def factory_for(kind: OptimizerKind) -> OptimizerFactory:
    if kind.value.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    if kind is OptimizerKind.prodigy:  # with this coefficient, its estimate grows within a few steps
        return optimizer_factory(Optimizer(kind=kind, d_coef=1e3), 1.0)
    return optimizer_factory(Optimizer(kind=kind, beta1=0.0 if kind is OptimizerKind.adafactor else 0.9), 1e-2)


def build_state(memory: Memory, factory: OptimizerFactory = plain_adamw, half: torch.dtype = torch.float32,
                every: int = 1, kind: type[nn.Module] = Mixed) -> TrainState:
    torch.manual_seed(0)
    model = kind()
    optimizer = memory_levers.build_training_optimizer(model, factory, memory, half, seed=5)
    weights = optimizer.weights() if isinstance(optimizer, StreamingOptimizer) else model
    lr_schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return TrainState(model, optimizer, lr_schedule, Ema(weights, 0.9, every=every))


def autocast(dtype: torch.dtype = BF16, cache: bool = True) -> Engine:
    return Engine(autocast=lambda: torch.autocast("cpu", dtype, cache_enabled=cache))


def train(state: TrainState, until: int = 4, engine: Engine | None = None, limit: float | None = None,
          split: bool = False, dtype: torch.dtype = torch.float32) -> list[StepInfo]:
    """Train until `until` steps are completed; `limit` is the maximum gradient norm."""
    infos = []
    while state.step < until:
        objective = Objective(make_schedule(), 0.5, split_prior=split)
        infos.append(train_step(state, toy_batches(state.step, dtype), objective, engine or Engine(), limit))
    return infos


def assert_equal(one: TrainState, other: TrainState) -> None:
    """Both states hold the same numbers, bit for bit."""
    first, second = all_tensors(one), all_tensors(other)
    assert first.keys() == second.keys()
    assert [key for key in first if not first[key].equal(second[key])] == []


def save_checkpoint(state: TrainState, folder: Path) -> Path:
    return checkpoint.save(folder, state, state.model, Engine().scaler, 2)


def toy_batches(step: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
    return [Batch(b.latents.to(dtype), b.noise.to(dtype), b.timesteps, b.text, b.num_instances)
            for b in make_batches()(step)]


def all_tensors(state: TrainState) -> dict[str, Tensor]:
    """Trained weights, EMA and optimizer state by name."""
    assert state.ema is not None
    flat, _ = checkpoint._flatten(state.optimizer.state_dict())
    return {**{f"weight {k}": v for k, v in state.weights(state.model).items()},
            **{f"ema {k}": v for k, v in state.ema.average.items()}, **{f"state {k}": v for k, v in flat.items()}}
