"""Learning-rate schedules by name, Muon's weights, Prodigy's estimate.

Also a training step of the real architecture on fake tensors.
"""

import copy
import math

import pytest
import torch
from torch import nn

from dreambooth.config.enums import AttentionKind, LrSchedule, OptimizerKind
from dreambooth.config.schema import Flow, Memory, Train
from dreambooth.data.batches import Batch
from dreambooth.models import families
from dreambooth.models.loading import TrainedModel
from dreambooth.optim.optimizers import build_lr_scheduler
from dreambooth.runtime.engine import Engine
from dreambooth.training.step import Objective, TrainState, train_step
from dreambooth.utils.assets import resolve_asset
from tests.support.levers import build_state, factory_for, toy_batches, train
from tests.support.toy_model import make_schedule

FAMILY = families.of_architecture("sd15")
STEPS, WARMUP = 40, 10


def expected(kind: str, step: int) -> float:
    """The learning rate of step `step` (from 0) as a fraction, by the formulas in the documentation of diffusers."""
    warmup = min(1.0, step / WARMUP)
    progress = max(0.0, (step - WARMUP) / (STEPS - WARMUP))
    return {
        "constant": 1.0,
        "constant_with_warmup": warmup,
        "linear": warmup if step < WARMUP else 1 - progress,
        "cosine": warmup if step < WARMUP else 0.5 * (1 + math.cos(math.pi * progress)),
        "cosine_with_restarts": warmup if step < WARMUP else 0.5 * (1 + math.cos(math.pi * (progress % 1))),
        "polynomial": warmup if step < WARMUP else 1e-7 + (1 - 1e-7) * (1 - progress),
    }[kind]


@pytest.mark.parametrize("kind", [each.value for each in LrSchedule])
def test_schedules_follow_their_formula_to_the_end_of_the_run(kind: str) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    spec = Train(lr_scheduler=LrSchedule(kind), lr_warmup_steps=WARMUP, max_train_steps=STEPS)
    schedule = build_lr_scheduler(optimizer, spec)
    for step in range(STEPS):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected(kind, step), abs=1e-6), step
        optimizer.step()
        schedule.step()


def test_the_noise_schedule_is_taken_after_the_zero_terminal_snr_rescale() -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
              "prediction_type": "v_prediction"}
    plain, rescaled = (FAMILY.noise_schedule(config | {"rescale_betas_zero_snr": zero}, Flow(), 64)
                       for zero in (False, True))
    assert float(plain.alphas_cumprod[-1]) > 1e-3
    assert float(rescaled.alphas_cumprod[-1]) < 1e-6
    assert rescaled.prediction_type == "v_prediction"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("text_trains", [False, True])
def test_the_real_unet_and_text_encoder_train_on_fake_tensors(checkpointing: bool, text_trains: bool) -> None:
    from diffusers import UNet2DConditionModel
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from transformers import CLIPTextConfig, CLIPTextModel

    base = resolve_asset("package:tiny-sd")
    text_config = CLIPTextConfig.from_pretrained(base, subfolder="text_encoder")
    schedule = FAMILY.noise_schedule({}, Flow(), 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base, subfolder="unet"))
        FAMILY.set_attention(unet, AttentionKind.sdpa)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        encoders = {"text_encoder": CLIPTextModel(text_config).train()} if text_trains else {}
        model = TrainedModel(FAMILY, {"unet": unet.train()} | encoders, vae_scale=8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
        state = TrainState(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
        latents = torch.empty(4, unet.config.in_channels, 8, 8)
        length = text_config.max_position_embeddings
        text = torch.zeros(4, length, dtype=torch.long) if text_trains else torch.empty(
            4, length, unet.config.cross_attention_dim)
        batch = Batch(latents, latents.clone(), torch.zeros(4, dtype=torch.long), text, 2)
        info = train_step(state, [batch, batch], Objective(schedule, 0.5, 5.0), Engine(), 1.0)
    assert isinstance(info.losses, FakeTensor)
    assert all(isinstance(p.grad, FakeTensor) or p.grad is None for p in model.parameters())
    assert len(optimizer.state) == len(list(model.parameters())), "a part was left out of the step"


def test_muon_updates_the_matrices_of_blocks_and_adamw_everything_else() -> None:
    """Each weight has the state, and after a step the value, that the optimizer of torch gives it."""
    state = build_state(Memory(), factory_for(OptimizerKind.muon))
    other = copy.deepcopy(state.model)
    train(state, 1)
    matrices = {"linear.weight"}
    kept = {name: set(state.optimizer.state[weight]) for name, weight in state.model.named_parameters()}
    assert {name for name, entries in kept.items() if entries == {"momentum_buffer"}} == matrices
    assert all(entries == {"step", "exp_avg", "exp_avg_sq"} for name, entries in kept.items() if name not in matrices)
    optimizers = [torch.optim.Muon([other.linear.weight], lr=1e-2, weight_decay=1e-2,
                                   adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW([weight for name, weight in other.named_parameters() if name not in matrices],
                                    lr=1e-2, fused=True)]
    Engine().backward(Objective(make_schedule(), 0.5)(other, toy_batches(0)[0]).total)
    for optimizer in optimizers:
        optimizer.step()
    assert all(weight.equal(dict(other.named_parameters())[name]) for name, weight in state.model.named_parameters())


def test_the_learning_rate_that_prodigy_estimates_is_a_metric() -> None:
    state = build_state(Memory(), factory_for(OptimizerKind.prodigy))
    train(state, 3)
    estimate = state.optimizer.param_groups[0]["d"]
    assert estimate > 1e-6, "the estimate never grew, so the test shows nothing"
    [info] = train(state, 4)
    assert info.numbers["learning_rate"] == 1 / 4
    assert info.numbers["effective_learning_rate"] == estimate / 4
