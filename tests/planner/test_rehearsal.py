"""The rehearsal: recorded traces on tensors without data and on real ones, and the memory of each phase."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from dreambooth.config.enums import Dtype, EmaDevice, EncoderKind, OptimizerKind, Rounding, Weights
from dreambooth.config.evaluate import Evaluate
from dreambooth.data import aspect_buckets
from dreambooth.evaluation.efficientnet import efficientnet_lite0
from dreambooth.evaluation.encoders import EfficientNet
from dreambooth.models import gradient_checkpointing, loading
from dreambooth.planner import rehearsal
from dreambooth.planner.allocation_trace import MARK, StorageTrace
from dreambooth.planner.fake_cuda import fake_tensors
from dreambooth.planner.gpu_specs import find_card
from dreambooth.planner.prediction import Prediction
from dreambooth.planner.rehearsal import encoder_tensor_bytes, predict, rehearse
from dreambooth.planner.skeleton_models import build_skeleton
from dreambooth.planner.time_and_cost import estimate, flops_per_second
from tests.support.configs import demo_recipe, small_recipe

TWO_PASSES = {"memory__gradient_checkpointing": True, "memory__optimizer_in_backward": True}  # with clipping
SPLIT = TWO_PASSES | {"memory__split_prior": True}

# -- recording ----------------------------------------------------------------------------------------------------

def test_a_trace_records_each_storage_once() -> None:
    trace = StorageTrace()
    with trace:
        trace.mark("a")
        x = torch.empty(256)
        y = x.view(16, 16)
        del x
        z = y + 1
        del y, z
    assert [size for serial, size in trace.events if serial != MARK] == [1024, 1024, -1024, -1024]


def test_a_product_that_is_added_in_place_is_counted() -> None:
    trace = StorageTrace()
    with trace:
        torch.zeros(6, 5).addmm_(torch.ones(6, 3), torch.ones(3, 5))
    assert trace.total_flops == 2 * 6 * 3 * 5


@pytest.mark.parametrize("changed", [{}, TWO_PASSES])
def test_fake_and_real_tensors_give_the_same_trace_byte_for_byte(changed: dict[str, object]) -> None:
    fake, real = predict(small_recipe(**changed)).trace, rehearse(small_recipe(**changed)).trace
    assert fake.events == real.events
    assert fake.category == real.category
    assert fake.flops == real.flops


@pytest.mark.slow
def test_dataless_tensors_give_the_trace_of_pytorchs_fake_tensors() -> None:
    recipe = small_recipe(**TWO_PASSES, memory__autocast_cache=False, memory__weights=Weights.half,
                   memory__rounding=Rounding.stochastic, precision__dtype=Dtype.bf16)
    dataless = predict(recipe).trace
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = rehearse(recipe).trace
    assert dataless.events == fake.events
    assert dataless.category == fake.category
    assert dataless.flops == fake.flops


def test_the_value_of_a_dataless_tensor_cannot_be_read() -> None:
    with fake_tensors(), pytest.raises(DataDependentOutputException):
        torch.ones(3).sum().item()


# -- a training step ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, size", [(Dtype.fp32, 4), (Dtype.bf16, 4)])
def test_gradients_and_optimizer_state_have_the_size_of_the_weights(dtype: Dtype, size: int) -> None:
    prediction = predict(small_recipe(precision__dtype=dtype, train__use_ema=True))
    peaks = {kind: max(usage.by_category.get(kind, 0) for usage in prediction.by_phase.values())
             for kind in ("gradients", "optimizer", "ema")}
    assert peaks["gradients"] == prediction.trained_parameters * size
    assert peaks["ema"] == prediction.trained_parameters * 4
    step_counts = peaks["optimizer"] - prediction.trained_parameters * 8
    assert 0 <= step_counts <= 4 * 1000


def test_a_transformer_is_recomputed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = predict(small_recipe(memory__gradient_checkpointing=True))
    monkeypatch.setattr(gradient_checkpointing, "recompute", lambda unet, groups: unet.enable_gradient_checkpointing())
    diffusers = predict(small_recipe(memory__gradient_checkpointing=True))
    assert _activations(ours) < 0.75 * _activations(diffusers)


def test_recomputing_changes_no_gradient() -> None:
    plain, recomputed = _gradients(), _gradients(memory__gradient_checkpointing=True)
    assert len(plain) == len(recomputed) > 100
    assert all(map(torch.equal, plain, recomputed))


def test_transformers_recomputed_separately_for_photos_and_class_images_give_the_same_gradient() -> None:
    """Up to the order of sums: the bound of step._forward_backward_halves, here far below 1e-5 of the largest."""
    plain, split = _gradients(2), _gradients(2, **SPLIT)
    assert len(plain) == len(split) > 100
    for one, other in zip(plain, split, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())


@pytest.mark.slow
def test_a_transformer_recomputed_separately_needs_half_of_its_tensors() -> None:
    changed = {**TWO_PASSES, "train__use_ema": False, "sample__every": None, "evaluate__encoder": EncoderKind.none,
               "prior__num_class_images": 1, "prior__sample_batch_size": 1}
    temporaries = [predict(demo_recipe("sd15", **changed, memory__split_prior=split))
                   .by_phase["backward"].by_category["temporaries"] for split in (True, False)]
    assert temporaries[1] - temporaries[0] > 50 * 2**20  # predicted bytes


def test_the_unet_is_in_host_memory_while_photos_are_encoded() -> None:
    prediction = predict(small_recipe())
    weights = [prediction.by_phase[phase].by_category["weights"] for phase in ("load", "caching")]
    assert weights[0] - weights[1] == prediction.trained_parameters * 4


def test_an_ema_in_host_memory_is_not_on_the_card() -> None:
    prediction = predict(small_recipe(memory__ema_device=EmaDevice.cpu))
    assert all("ema" not in usage.by_category for usage in prediction.by_phase.values())
    assert prediction.host_bytes == prediction.trained_parameters * 4


def test_averages_of_schedule_free_adamw_exist_after_the_steps() -> None:
    prediction = predict(small_recipe(optimizer__kind=OptimizerKind.schedule_free, train__use_ema=False))
    averages = {phase: usage.by_category.get("ema", 0) for phase, usage in prediction.by_phase.items()}
    assert averages["backward"] == 0
    assert averages["save"] == prediction.trained_parameters * 4


def test_data_parallel_needs_a_second_copy_of_the_gradients() -> None:
    one, four = (predict(small_recipe(hardware__gpus=count)) for count in (1, 4))
    gradients = [prediction.by_phase["step"].by_category["gradients"] for prediction in (one, four)]
    assert gradients[1] - gradients[0] == one.trained_parameters * 4


def _activations(prediction: Prediction) -> int:
    return prediction.by_phase["forward"].by_category["activations"]


def _gradients(rows: int = 1, **changed: object) -> list[torch.Tensor]:
    torch.manual_seed(0)
    recipe = small_recipe(**changed)
    parts = build_skeleton(recipe)
    denoiser = loading.prepare(parts, recipe)
    latents, text = torch.randn(rows, 4, 8, 8), torch.randn(rows, 77, parts.encoders[0].config.hidden_size)
    denoiser(latents, torch.arange(3, 3 + rows), text).square().mean().backward()
    return [p.grad for p in denoiser.parameters() if p.grad is not None]


# -- buckets ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_no_bucket_needs_more_memory_than_the_planned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(dataset__buckets=True, prior__with_prior_preservation=False)
    planned = max(usage.allocated for usage in predict(recipe).by_phase.values())
    for size in aspect_buckets.bucket_sizes(recipe.model.resolution):
        monkeypatch.setattr(rehearsal, "largest_bucket", lambda *_, size=size: size)
        assert max(usage.allocated for usage in predict(recipe).by_phase.values()) <= planned, size


def test_with_buckets_photos_and_class_images_have_separate_passes() -> None:
    activations = [_activations(predict(small_recipe(dataset__buckets=on))) for on in (False, True)]
    assert activations[1] < 0.75 * activations[0]


# -- evaluation ---------------------------------------------------------------------------------------------------

def _without_weights(kind: Callable[..., nn.Module], config: object) -> nn.Module:
    with fake_tensors():
        return kind(config)


@pytest.mark.parametrize("encoder, side, build", [
    (EncoderKind.efficientnet_lite0, EfficientNet.side, efficientnet_lite0),
    (EncoderKind.dino, 224, lambda: ViTModel(ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536), add_pooling_layer=False)),
    (EncoderKind.clip, 224, lambda: _without_weights(CLIPModel, CLIPConfig()))])  # its default is ViT-B/32
def test_an_encoder_needs_at_most_the_memory_in_the_table(
    encoder: EncoderKind, side: int, build: Callable[[], nn.Module]
) -> None:
    weights, pixels, activations = encoder_tensor_bytes(Evaluate(encoder=encoder), side)
    network = build().eval()
    with fake_tensors():
        trace, images = StorageTrace(), torch.empty(16, 3, side, side)
        with trace, torch.no_grad():
            getattr(network, "get_image_features", network)(images)
    network_bytes = sum(p.nbytes for p in network.parameters())
    assert 0.9 * weights <= network_bytes <= weights
    assert _peak(trace) - network_bytes <= pixels + activations


@pytest.mark.slow
def test_evaluation_is_a_phase_of_its_own() -> None:
    with_clip, without = predict(small_recipe(evaluate__encoder=EncoderKind.clip)), predict(small_recipe())
    assert "evaluate" not in without.by_phase
    encoder_bytes = sum(encoder_tensor_bytes(Evaluate(encoder=EncoderKind.clip), 64))
    allocated = {phase: usage.allocated for phase, usage in with_clip.by_phase.items()}
    assert allocated["evaluate"] - allocated["load"] > encoder_bytes
    assert allocated["evaluate"] == allocated["save"] + encoder_bytes


def test_the_loss_on_held_out_photos_is_planned() -> None:
    """It needs less memory than the backward pass. Of 2 photos, it has 8 forward passes each, 11 times in 100 steps."""
    recipe = small_recipe(dataset__validation_count=2, train__validate_every=10, train__max_train_steps=100)
    never = small_recipe(dataset__validation_count=2, train__validate_every=None, train__max_train_steps=100)
    measured, plain, card = predict(recipe), predict(never), find_card("T4")
    assert "validation" not in plain.by_phase
    assert measured.by_phase["validation"].allocated <= measured.by_phase["backward"].allocated
    assert plain.step_flops == measured.step_flops and 0 < measured.validation_flops < plain.step_flops / 5
    assert card is not None
    seconds = [estimate(*case, card).run_seconds or 0.0 for case in ((recipe, measured), (never, plain))]
    rate = flops_per_second(card, half=False)
    assert seconds[0] - seconds[1] == pytest.approx(11 * 2 * 8 * measured.validation_flops / rate)


def _peak(trace: StorageTrace) -> int:
    live = peak = 0
    for serial, size in trace.events:
        live += 0 if serial == MARK else size
        peak = max(peak, live)
    return peak
