"""Started by test_distributed.py under torchrun: trains three fp64 steps and writes the weights to argv[1]."""

import sys

import torch

from dreambooth.cli import exit_process
from dreambooth.config.enums import Dtype
from dreambooth.runtime.engine import COLLECTIVE_TIMEOUT, create_engine
from dreambooth.training.step import Objective, train_step
from dreambooth.utils.signals import StopRequest
from tests.support.toy_model import ToyModel, ToyTokens, make_batches, make_schedule, make_state

engine, accelerator = create_engine("cpu", Dtype.fp32)
models = {"": ToyModel(), "tokens.": ToyTokens()}
for model in models.values():
    state = make_state(model)
    state.model = accelerator.prepare_model(model)
    batches = make_batches(batch=2, accumulation=2, world_size=engine.world_size, rank=engine.rank)
    for step in range(3):
        train_step(state, batches(step), Objective(make_schedule(), 0.5), engine, 1.0).check()
assert (engine.reduce_flag(engine.rank == 1).read()[0] > 0) is (engine.world_size == 2)
assert engine.broadcast({"rank": engine.rank}) == {"rank": 0}
shared = list(engine.map_shared(lambda item: (item, engine.rank), [7, 8, 9], StopRequest()))
assert shared == [(7, 0), (8, 1 % engine.world_size), (9, 0)]
group = torch.distributed.distributed_c10d._get_default_group()
assert group._get_backend(torch.device("cpu")).options._timeout == COLLECTIVE_TIMEOUT
if engine.is_main_process:
    torch.save({prefix + name: weight for prefix, model in models.items()
                for name, weight in model.state_dict().items()}, sys.argv[1])  # a test's own file
torch.distributed.destroy_process_group()
exit_process()
