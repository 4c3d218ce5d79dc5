"""The samples of a step, shared by processes and micro-batches that need not have the same size."""

import pytest
import torch

from dreambooth.config.recipe import resolve
from dreambooth.data.step_shares import StepShares
from dreambooth.models.noise_schedule import DiffusionSchedule
from dreambooth.runtime.engine import Engine
from dreambooth.training.step import Objective, train_step
from tests.support.configs import demo_config
from tests.support.toy_model import ToyModel, make_batches, make_state

SCHEDULE = DiffusionSchedule(torch.linspace(0.99, 0.01, 1000, dtype=torch.float64), "epsilon")


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("largest", [1, 2, 9])
def test_processes_share_a_global_batch_without_gaps(tmp_path, processes, largest):
    shares = [StepShares(largest, 1, rank, processes, 7) for rank in range(processes)]
    batches = [batch for share in shares for batch in share.micro_batches]
    assert [index for batch in batches for index in batch] == list(range(7))
    recipe = resolve(demo_config(train__global_batch_size=7, train__train_batch_size=largest), tmp_path)
    assert recipe.with_processes(processes).micro_batches == (
        max(map(len, batches)), max(len(share.micro_batches) for share in shares))


@pytest.mark.parametrize("split", [False, True])
def test_uneven_micro_batches_give_the_gradient_and_losses_of_one_batch(split):
    """In fp64: 7 x 64 terms are summed in another order, so that the results differ by less than 1e-12."""
    expected, losses = mean_gradients(1, 7, split)
    found, other_losses = mean_gradients(3, 2, split)  # 2, 2 and 3 photos, the last in batches of 1 and 2
    assert torch.allclose(expected, found, atol=1e-12, rtol=0)
    assert torch.allclose(losses, other_losses, atol=1e-12, rtol=0)


def mean_gradients(processes: int, batch: int, split: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient and the losses of a step of seven photos, as data parallelism averages them over its processes."""
    gradients, losses = [], []

    class Recorder(Engine):
        def clip(self, optimizer, parameters, limit):
            gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
            return super().clip(optimizer, parameters, limit)

    for rank in range(processes):
        batches = make_batches(batch=batch, world_size=processes, rank=rank, global_batch_size=7)
        engine = Recorder(world_size=processes)
        info = train_step(make_state(ToyModel()), batches(0), Objective(SCHEDULE, 0.5, split_prior=split), engine, None)
        assert info.images == 14
        losses.append(info.losses)
    return torch.stack(gradients).mean(0), torch.stack(losses).mean(0)
