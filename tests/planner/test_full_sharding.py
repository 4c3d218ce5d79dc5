"""The planned memory of memory.fully_shard: parts in training steps, whole weights before and after them."""

import torch
from torch import nn

from dreambooth.optim.sharded_blocks import gathered_bytes
from dreambooth.planner.allocation_trace import StorageTrace
from dreambooth.planner.caching_allocator import CachingAllocator
from dreambooth.planner.trace_replay import replay, split_over_processes
from tests.training.processes.sharded_worker import BlockModel


def test_a_process_plans_its_part_in_steps_and_whole_weights_for_pictures() -> None:
    model = nn.Linear(64, 64, bias=False)  # 16 KiB
    with StorageTrace() as trace:
        trace.mark("load")
        trace.add_module(model, "weights")
        trace.mark("training")
        moments = [torch.empty(2, 64, 64)]
        trace.add(moments, "optimizer")
        trace.mark("backward")
        gradients = [torch.empty(64, 64)]
        trace.add(gradients, "gradients")
        trace.mark("idle")
        trace.mark("sample")
        picture = [torch.empty(1024)]
        trace.add(picture, "activations")
        trace.mark("save")
    split_over_processes(trace, model, 6 * 2**10, 4)
    usage = replay(trace.events, trace.category, trace.marks, CachingAllocator())
    kib = {phase: {name: size / 2**10 for name, size in peak.by_category.items()} for phase, peak in usage.items()}
    assert kib["load"] == {"weights": 16}
    assert kib["backward"] == {"weights": 4 + 6, "optimizer": 8, "gradients": 4}
    assert kib["sample"] == {"weights": 4 + 16, "optimizer": 8, "gradients": 4, "activations": 4}


def test_the_weights_of_blocks_are_gathered_one_after_the_other() -> None:
    model = BlockModel()
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    rest = sum(p.nbytes for p in model.parameters()) - 2 * block
    assert gathered_bytes(model) == 2 * rest + 5 * block
