"""Run under torchrun by test_distributed.py: three fp64 steps on this process's share, the weights to argv[1]."""

import sys

import torch

from dreambooth.cli import leave
from dreambooth.config.enums import Dtype
from dreambooth.runtime.engine import accelerated
from dreambooth.training.step import Objective, train_step
from tests.support.toy_model import Toy, batches, schedule, state

engine, accelerator = accelerated("cpu", Dtype.fp32)
model = Toy()
found = state(model)
found.model = accelerator.prepare_model(model)
share = batches(batch=2, accumulation=2, world=engine.world, rank=engine.rank)
for step in range(3):
    train_step(found, share(step), Objective(schedule(), 0.5), engine, 1.0).check()
assert (engine.ask(engine.rank == 1).read()[0] > 0) is (engine.world == 2)
assert engine.share({"rank": engine.rank}) == {"rank": 0}
if engine.main:
    torch.save(model.state_dict(), sys.argv[1])  # a test's own file
torch.distributed.destroy_process_group()
leave()
