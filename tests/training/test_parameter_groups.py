"""train.text_encoder_learning_rate: text encoders train at a rate of their own, also after resuming."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dreambooth.config.enums import OptimizerKind
from dreambooth.config.schema import Memory, Optimizer
from dreambooth.errors import ConfigError
from dreambooth.models import families
from dreambooth.models.loading import TrainedModel
from dreambooth.optim.memory_levers import build_training_optimizer
from dreambooth.optim.optimizers import build_lr_scheduler, optimizer_factory
from dreambooth.training.parameter_groups import parameter_groups
from tests.support.configs import resolve_demo
from tests.support.faults import train
from tests.support.runs import KILLED, assert_same, the_run


def model() -> TrainedModel:
    torch.manual_seed(0)
    return TrainedModel(families.of_architecture("sd15"), {"unet": nn.Linear(2, 2), "text_encoder": nn.Linear(2, 2)}, 8)


def optimizer(trained: TrainedModel, recipe: Any) -> torch.optim.Optimizer:
    return build_training_optimizer(trained, optimizer_factory(Optimizer(weight_decay=0.0), 0.1), Memory(),
                                    torch.float32, 0, parameter_groups(trained, recipe))


def test_text_encoders_move_at_their_own_rate_and_the_schedule_scales_both() -> None:
    recipe = resolve_demo(train__train_text_encoder=True, train__text_encoder_learning_rate=0.01)
    trained = model()
    before = {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}
    adam = optimizer(trained, recipe)
    assert [(group["lr"], len(group["params"])) for group in adam.param_groups] == [(0.1, 2), (0.01, 2)]
    schedule = build_lr_scheduler(adam, replace(recipe.train, lr_scheduler=recipe.train.lr_scheduler))
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    schedule.step()
    for name, parameter in trained.named_parameters():  # the first step of Adam is the learning rate
        step = 0.01 if name.startswith("text_encoder") else 0.1
        assert torch.allclose(before[name] - parameter, torch.full_like(parameter, step), rtol=1e-4), name
    assert [group["lr"] for group in adam.param_groups] == [0.1, 0.01]


def test_without_the_key_there_is_one_group_as_before() -> None:
    assert len(optimizer(model(), resolve_demo(train__train_text_encoder=True)).param_groups) == 1


@pytest.mark.parametrize(("changed", "message"), [
    ({"train__train_text_encoder": False}, "none is trained: type train.train_text_encoder=true"),
    ({"memory__optimizer_in_backward": True}, "type memory.optimizer_in_backward=false, or "
                                              "train.text_encoder_learning_rate=null"),
    ({"memory__offload_optimizer": True}, "type memory.offload_optimizer=false, or"),
    ({"optimizer__kind": OptimizerKind.prodigy, "train__learning_rate": 1.0}, "one learning rate for all weights"),
    ({"train__text_encoder_learning_rate": -1.0}, "text_encoder_learning_rate must be above 0")])
def test_what_has_one_rate_is_refused(changed: dict[str, Any], message: str) -> None:
    values = {"train__train_text_encoder": True, "train__text_encoder_learning_rate": 1e-5} | changed
    with pytest.raises((ConfigError, ValueError), match=message):
        recipe = resolve_demo(**values)
        recipe.train.__post_init__()


@pytest.mark.slow
def test_a_run_with_two_rates_resumes_bit_for_bit_and_logs_both(tmp_path: Path) -> None:
    words = ["method=lokr", "train.text_encoder_learning_rate=1e-4", "train.lr_scheduler=cosine",
             "train.max_train_steps=4", "checkpoint.every=1", "sample.every=null",
             "prior.with_prior_preservation=false", "evaluate.encoder=none", "tracking=none"]
    assert train(tmp_path / "straight", *words) == 0
    assert train(tmp_path / "killed", *words, fault="checkpoint_rename", seed=3) == KILLED
    assert train(tmp_path / "killed", *words) == 0
    straight = the_run(tmp_path / "straight")
    assert_same(the_run(tmp_path / "killed"), straight)
    assert '"text_encoder_learning_rate"' in (straight / "metrics.jsonl").read_text()
    trained = load_file(straight / "checkpoints/step-000004/trained.safetensors")
    assert all(".lokr_w" in name for name in trained), "the base is in the checkpoint"
