"""Started by test_fully_shard.py under PyTorch's launcher: trains fp64 steps with memory.fully_shard.

Arguments: the folder of checkpoints, the checkpoint to resume from or "-", and the last step.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from dreambooth.cli import exit_process
from dreambooth.config.enums import Dtype
from dreambooth.models.noise_schedule import DiffusionSchedule
from dreambooth.optim.ema import Ema
from dreambooth.optim.fully_shard import FullyShardedModel
from dreambooth.runtime.engine import Engine, create_engine
from dreambooth.training import checkpoint
from dreambooth.training.step import Objective, TrainState, train_step
from tests.support.toy_model import make_batches

SCHEDULE = DiffusionSchedule(torch.linspace(0.99, 0.01, 1000, dtype=torch.float64), "epsilon")
PHOTOS = 10  # per step: with four processes, two have three photos


class Block(nn.Module):
    """A convolution with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(5, 5, 3, padding=1, dtype=torch.float64)

    def forward(self, latents: Tensor) -> Tensor:
        return latents + torch.tanh(self.layer(latents))


class BlockModel(nn.Module):
    """Two blocks that are gathered one after the other, and layers outside of them. No side is a multiple of 2."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 5, 3, padding=1, dtype=torch.float64)
        self.blocks = nn.Sequential(Block(), Block())
        self.last = nn.Conv2d(5, 1, 1, dtype=torch.float64)
        self.text_encoder = nn.Embedding(10, 1, dtype=torch.float64)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(latents))) + self.text_encoder(text).view(-1, 1, 1, 1)


def build(engine: Engine, shard: bool) -> tuple[TrainState, nn.Module]:
    """A training state at step 0, and its ordinary module."""
    torch.manual_seed(0)
    model = BlockModel()
    sharded = FullyShardedModel(model, engine) if shard else None
    trained = model if sharded is None else sharded.module
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ema = Ema(model if sharded is None else sharded.weights(), 0.9999)
    return TrainState(trained, optimizer, schedule, ema, sharded=sharded), model


def train(state: TrainState, engine: Engine, last: int) -> None:
    """Train until `last` steps are completed, with gradients that are clipped in every step."""
    batches = make_batches(batch=2, world_size=engine.world_size, rank=engine.rank, global_batch_size=PHOTOS)
    while state.step < last:
        info = train_step(state, batches(state.step), Objective(SCHEDULE, 0.5), engine, 0.1)
        info.check()
        assert info.numbers["grad_norm"] > 0.1


def main(folder: Path, start: str, last: int) -> None:
    """Train, and write a checkpoint."""
    engine, _ = create_engine("cpu", Dtype.fp32)
    state, model = build(engine, shard=True)
    assert state.sharded is not None
    assert sum(w.numel() for w in state.weights(model).values()) < sum(p.numel() for p in model.parameters())
    if start != "-":
        checkpoint.restore_newest(Path(start), state, model, engine, "never")
    train(state, engine, last - 1)
    checkpoint.save(folder, state, model, engine.scaler, 2)  # must not change the state
    train(state, engine, last)
    saved = checkpoint.save(folder, state, model, engine.scaler, 2)
    whole = state.sharded.gathered(state.weights(model))
    state.sharded.store_result(state.averages(model) or {})
    engine.barrier()
    weights = checkpoint.load_file(saved / "trained.safetensors")
    averages = checkpoint.load_file(saved / "ema.safetensors")
    assert all(tensor.equal(whole[name]) for name, tensor in weights.items())
    if engine.is_main_process:  # alone
        assert all(tensor.equal(averages[name]) for name, tensor in state.sharded.gathered({}).items())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    exit_process()
