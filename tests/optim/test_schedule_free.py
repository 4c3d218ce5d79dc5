"""Schedule-free AdamW: samples, measures and exports use the averages that the package schedulefree computes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from dreambooth.config.enums import OptimizerKind
from dreambooth.config.schema import Memory
from dreambooth.training.hooks import swap_in_ema
from dreambooth.training.step import TrainState
from tests.support.faults import train as train_run
from tests.support.levers import all_tensors, build_state, factory_for, train
from tests.support.runs import the_run

LEVERS = {"none": Memory(), "in backward": Memory(optimizer_in_backward=True),
          "offload": Memory(offload_optimizer=True)}


def build(lever: str, steps: int) -> TrainState:
    state = build_state(LEVERS[lever], factory_for(OptimizerKind.schedule_free))
    state.ema = None
    train(state, steps)
    return state


@pytest.mark.parametrize("lever", LEVERS)
def test_the_averages_are_put_in_for_samples_measures_and_exports(lever: str) -> None:
    state, other = build(lever, 3), build("none", 3)
    optimizer: Any = other.optimizer
    optimizer.eval()  # the package's own averages, in place
    setup: Any = SimpleNamespace(state=state, trained=state.model)
    live = {name: weight.detach().clone() for name, weight in state.model.named_parameters()}
    with swap_in_ema(setup, exact=True):
        averages = {name: weight.detach().clone() for name, weight in state.model.named_parameters()}
    expected = dict(other.model.named_parameters())
    assert [name for name in expected if not averages[name].equal(expected[name])] == []
    assert any(not averages[name].equal(live[name]) for name in live)
    assert all(weight.equal(live[name]) for name, weight in state.model.named_parameters()), "training has moved"


def test_averages_in_between_leave_the_training_as_it_is() -> None:
    one, other = build("none", 2), build("none", 2)
    with swap_in_ema(SimpleNamespace(state=one, trained=one.model)):  # type: ignore[arg-type]
        pass
    train(one, 4), train(other, 4)
    for state in (one, other):
        state.ema = SimpleNamespace(average={})  # type: ignore[assignment]
    first, second = all_tensors(one), all_tensors(other)
    assert [name for name in first if not first[name].equal(second[name])] == []


def test_before_the_first_step_the_averages_are_the_weights() -> None:
    state = build("none", 0)
    averages = state.averages(state.model)
    assert averages is not None
    assert all(averages[name].equal(weight) for name, weight in state.weights(state.model).items())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["prodigy", "schedule_free"])
def test_a_run_resumes_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    """The checkpoint holds the training state, and the exported model of schedule-free AdamW holds the averages."""
    words = [f"optimizer={optimizer}", "sample.every=null", "prior.with_prior_preservation=false", "checkpoint.every=2"]
    assert train_run(tmp_path / "once", *words, "train.max_train_steps=4") == 0
    for steps in (2, 4):
        assert train_run(tmp_path / "twice", *words, f"train.max_train_steps={steps}") == 0
    once, twice = the_run(tmp_path / "once"), the_run(tmp_path / "twice")
    files = ["checkpoints/step-000004/trained.safetensors", "checkpoints/step-000004/optimizer.safetensors",
             "model/unet/diffusion_pytorch_model.safetensors"]
    for name in files:
        assert (once / name).read_bytes() == (twice / name).read_bytes(), name
    if optimizer == "schedule_free":
        trained, state, exported = (load_file(once / name) for name in files)
        y, x = trained["unet.conv_in.weight"], exported["conv_in.weight"]
        averages = [y.lerp(z, 1 - 1 / 0.9) for name, z in state.items() if name.endswith(".z") and z.shape == y.shape]
        assert any(x.equal(average) for average in averages)
        assert not x.equal(y)
