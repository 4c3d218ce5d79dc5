"""The planner: storage traces, the allocator's model, optimizer memory models, levers chosen, tables and exit codes."""

import json
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from dreambooth import run
from dreambooth.config.compose import conf_dir
from dreambooth.config.dataset import Subject
from dreambooth.config.enums import (
    Dtype,
    EmaDevice,
    EncoderKind,
    OptimizerKind,
    Rounding,
    TrackingKind,
    Weights,
)
from dreambooth.config.evaluate import Evaluate
from dreambooth.config.recipe import Recipe
from dreambooth.data import aspect_buckets
from dreambooth.errors import UserError
from dreambooth.evaluation.efficientnet import efficientnet_lite0
from dreambooth.evaluation.encoders import EfficientNet
from dreambooth.models import loading
from dreambooth.planner import auto_memory, gpu_specs, rehearsal, report, skeleton_models, time_and_cost
from dreambooth.planner.allocation_trace import MARK, StorageTrace
from dreambooth.planner.caching_allocator import MIB, CachingAllocator
from dreambooth.planner.encoder_memory import encoder_tensor_bytes
from dreambooth.planner.fake_cuda import fake_tensors
from dreambooth.planner.memory_options import describe_memory_options, list_memory_options
from dreambooth.planner.optimizer_memory import CODEBOOK_BYTES, ModelledOptimizer
from dreambooth.planner.prediction import Prediction
from dreambooth.planner.rehearsal import predict, rehearse
from dreambooth.runs.run_folder import Result
from dreambooth.runtime.engine import Engine, create_engine
from dreambooth.training.setup import assemble
from dreambooth.utils.signals import StopRequest
from tests.support.configs import demo_recipe, small_recipe

# -- recording ----------------------------------------------------------------------------------------------------

def test_a_trace_sees_a_storage_come_and_go_once() -> None:
    trace = StorageTrace()
    with trace:
        trace.mark("a")
        x = torch.empty(256)
        y = x.view(16, 16)
        del x
        z = y + 1
        del y, z
    assert [size for serial, size in trace.events if serial != MARK] == [1024, 1024, -1024, -1024]


LEVERED = {"memory__gradient_checkpointing": True, "memory__optimizer_in_backward": True}  # two passes: it clips


@pytest.mark.parametrize("changed", [{}, LEVERED])
def test_fake_and_real_tensors_give_the_same_trace_byte_for_byte(changed: dict[str, object]) -> None:
    fake, real = predict(small_recipe(**changed)).trace, rehearse(small_recipe(**changed)).trace
    assert fake.events == real.events
    assert fake.category == real.category
    assert fake.flops == real.flops


def test_hollow_tensors_give_the_trace_of_pytorchs_fake_tensors() -> None:
    halves = small_recipe(**LEVERED, memory__autocast_cache=False, memory__weights=Weights.half,
                   memory__rounding=Rounding.stochastic, precision__dtype=Dtype.bf16)
    hollow = predict(halves).trace
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = rehearse(halves).trace
    assert hollow.events == fake.events
    assert hollow.category == fake.category
    assert hollow.flops == fake.flops


def test_the_value_of_a_hollow_tensor_cannot_be_read() -> None:
    with fake_tensors(), pytest.raises(DataDependentOutputException):
        torch.ones(3).sum().item()


@pytest.mark.parametrize("dtype, size", [(Dtype.fp32, 4), (Dtype.bf16, 4)])
def test_gradients_and_optimizer_state_have_the_size_of_the_weights(dtype: Dtype, size: int) -> None:
    found = predict(small_recipe(precision__dtype=dtype, train__use_ema=True))
    category = {kind: max(u.by_category.get(kind, 0) for u in found.by_phase.values())
                for kind in ("gradients", "optimizer", "ema")}
    assert category["gradients"] == found.trained_parameters * size
    assert category["ema"] == found.trained_parameters * 4
    assert 0 <= category["optimizer"] - found.trained_parameters * 8 <= 4 * 1000  # and a step count a weight


def _kept(found: Prediction) -> int:
    return found.by_phase["forward"].by_category["activations"]


def test_a_transformer_is_recomputed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = predict(small_recipe(memory__gradient_checkpointing=True))
    monkeypatch.setattr(loading, "recompute", lambda unet, groups: unet.enable_gradient_checkpointing())
    theirs = predict(small_recipe(memory__gradient_checkpointing=True))
    assert _kept(ours) < 0.75 * _kept(theirs)


def _gradients(rows: int = 1, **changed: object) -> list[torch.Tensor]:
    torch.manual_seed(0)
    asked = small_recipe(**changed)
    parts = skeleton_models.build_skeleton(asked)
    denoiser = loading.prepare(parts, asked)
    latents, text = torch.randn(rows, 4, 8, 8), torch.randn(rows, 77, parts.encoders[0].config.hidden_size)
    denoiser(latents, torch.arange(3, 3 + rows), text).square().mean().backward()
    return [p.grad for p in denoiser.parameters() if p.grad is not None]


def test_recomputing_changes_no_gradient() -> None:
    plain, again = _gradients(), _gradients(memory__gradient_checkpointing=True)
    assert len(plain) == len(again) > 100
    assert all(map(torch.equal, plain, again))


APART = {"memory__gradient_checkpointing": True, "memory__optimizer_in_backward": True, "memory__split_prior": True}


def test_transformers_recomputed_apart_for_photos_and_class_images_give_the_same_gradient() -> None:
    """Up to the order of sums: the bound of step._forward_backward_halves, here far below 1e-5 of the largest."""
    plain, apart = _gradients(2), _gradients(2, **APART)
    assert len(plain) == len(apart) > 100
    for one, other in zip(plain, apart, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())


def test_a_transformer_recomputed_apart_holds_half_of_its_tensors() -> None:
    full = {"memory__optimizer_in_backward": True, "memory__gradient_checkpointing": True, "train__use_ema": False,
            "sample__every": None, "evaluate__encoder": EncoderKind.none, "prior__num_class_images": 1,
            "prior__sample_batch_size": 1}
    halves, together = (predict(demo_recipe("sd15", **full, memory__split_prior=split)) for split in (True, False))
    held = [found.by_phase["backward"].by_category["temporaries"] for found in (halves, together)]
    assert held[1] - held[0] > 50 * 2**20  # predicted bytes


def test_the_unet_waits_in_host_memory_while_photos_are_encoded() -> None:
    found = predict(small_recipe())
    unet = found.trained_parameters * 4
    assert found.by_phase["load"].by_category["weights"] - found.by_phase["caching"].by_category["weights"] == unet


def test_an_average_in_host_memory_is_not_on_the_card() -> None:
    found = predict(small_recipe(memory__ema_device=EmaDevice.cpu))
    assert all("ema" not in usage.by_category for usage in found.by_phase.values())
    assert found.host_bytes == found.trained_parameters * 4


def _peak(trace: StorageTrace) -> int:
    now = most = 0
    for serial, size in trace.events:
        now += 0 if serial == MARK else size
        most = max(most, now)
    return most


def without_weights(kind: Callable[..., nn.Module], config: object) -> nn.Module:
    with fake_tensors():
        return kind(config)


@pytest.mark.parametrize("encoder, side, make", [
    (EncoderKind.efficientnet_lite0, EfficientNet.side, efficientnet_lite0),
    (EncoderKind.dino, 224, lambda: ViTModel(ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536), add_pooling_layer=False)),
    (EncoderKind.clip, 224, lambda: without_weights(CLIPModel, CLIPConfig()))])  # its default is ViT-B/32
def test_an_encoder_takes_what_the_table_says(
    encoder: EncoderKind, side: int, make: Callable[[], nn.Module]
) -> None:
    weights, pixels, moment = encoder_tensor_bytes(Evaluate(encoder=encoder), side)
    network = make().eval()
    with fake_tensors():
        trace, pictures = StorageTrace(), torch.empty(16, 3, side, side)
        with trace, torch.no_grad():
            getattr(network, "get_image_features", network)(pictures)
    held = sum(p.nbytes for p in network.parameters())
    assert 0.9 * weights <= held <= weights
    assert _peak(trace) - held <= pixels + moment


def test_evaluation_is_a_phase_of_its_own() -> None:
    seen, unseen = predict(small_recipe(evaluate__encoder=EncoderKind.clip)), predict(small_recipe())
    assert "evaluate" not in unseen.by_phase
    more = sum(encoder_tensor_bytes(Evaluate(encoder=EncoderKind.clip), 64))
    assert seen.by_phase["evaluate"].allocated - seen.by_phase["load"].allocated > more
    assert seen.by_phase["evaluate"].allocated == seen.by_phase["save"].allocated + more


# -- the allocator ------------------------------------------------------------------------------------------------

def test_small_blocks_share_a_segment_of_two_mebibytes() -> None:
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.malloc(500 * 1024)
    assert (allocator.allocated, allocator.reserved) == (4 * 500 * 1024, 2 * MIB)


def test_a_freed_block_joins_its_neighbours_and_serves_again() -> None:
    allocator = CachingAllocator()
    first, second = allocator.malloc(6 * MIB), allocator.malloc(6 * MIB)
    allocator.release(first)
    allocator.release(second)
    allocator.malloc(20 * MIB)
    assert allocator.reserved == 20 * MIB


def test_large_segments_are_multiples_of_two_mebibytes_and_leave_when_the_cache_is_emptied() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(11 * MIB)
    assert allocator.reserved == 12 * MIB
    allocator.release(block)
    allocator.empty_cache()
    assert allocator.reserved == 0


def test_expandable_segments_lose_less_between_blocks() -> None:
    def reserved(expandable: bool) -> int:
        allocator = CachingAllocator(expandable)
        for size in (30, 45, 60, 80):
            allocator.release(allocator.malloc(size * MIB))
        return allocator.reserved

    assert reserved(True) < reserved(False)


def test_emptying_the_cache_gives_the_free_pages_of_a_growing_range_back() -> None:
    allocator = CachingAllocator(expandable=True)
    kept, gone = allocator.malloc(20 * MIB), allocator.malloc(100 * MIB)
    allocator.release(gone)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (20 * MIB, 20 * MIB)
    allocator.malloc(40 * MIB)
    assert allocator.reserved == 60 * MIB
    allocator.release(kept)


# -- optimizers ---------------------------------------------------------------------------------------------------

def _state_bytes(optimizer: torch.optim.Optimizer, without: tuple[str, ...] = ()) -> int:
    tensors = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
               for state in optimizer.state.values() for name, tensor in state.items()
               if isinstance(tensor, torch.Tensor) and name not in without}
    return sum(tensors.values())


def _stepped(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(*shape)) for shape in ((4095,), (4096,), (300, 70), (8, 4, 3, 3), (1,))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = make(parameters)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("form", ["fused", "foreach", "single"])
def test_adamw_keeps_what_pytorchs_keeps(form: str) -> None:
    real = _stepped(lambda p: torch.optim.AdamW(p, fused=form == "fused", foreach=form == "foreach"))
    assert _state_bytes(_stepped(lambda p: ModelledOptimizer(p, OptimizerKind.adamw, form=form))) == _state_bytes(real)


def test_adamw8bit_keeps_what_bitsandbytes_keeps() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    real = _stepped(lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3))
    model = _stepped(lambda p: ModelledOptimizer(p, OptimizerKind.adamw8bit))
    assert _state_bytes(model) == _state_bytes(real, without=("qmap1", "qmap2"))
    assert _state_bytes(real) - _state_bytes(model) in (0, CODEBOOK_BYTES)


def test_adafactor_keeps_what_transformers_keeps() -> None:
    from transformers.optimization import Adafactor

    real = _stepped(lambda p: Adafactor(p, lr=1e-3, scale_parameter=False, relative_step=False))
    assert _state_bytes(_stepped(lambda p: ModelledOptimizer(p, OptimizerKind.adafactor))) == _state_bytes(real)


# -- choosing levers ----------------------------------------------------------------------------------------------

ROOMY = {"memory__auto": True, "hardware__usable_vram_gib": 80.0}  # nothing is ruled out by counting


class Sized:
    """Stands for a rehearsal: a run takes `needed(recipe)` GiB."""

    def __init__(self, needed: Callable[[Recipe], float]) -> None:
        self.needed = needed
        self.asked: list[Recipe] = []

    def __call__(self, asked: Recipe) -> object:
        self.asked.append(asked)
        base = predict(small_recipe())
        size = int(self.needed(asked) * 2**30)
        return type("Found", (), {"reserved": size, "trained_parameters": base.trained_parameters,
                                  "by_phase": base.by_phase, "peak_over": base.peak_over,
                                  "peak_phase": "backward"})()


def test_auto_adds_nothing_where_everything_fits() -> None:
    choice = auto_memory.choose_memory_options(demo_recipe("sd15", **ROOMY), Sized(lambda r: 10.0))  # type: ignore[arg-type]
    assert choice.added == ()


def test_auto_takes_the_first_rung_that_fits_95_percent_of_the_card() -> None:
    needed = Sized(lambda r: 75.0 if r.memory.gradient_checkpointing else 75.5)  # of 76, and 0.74 beside it
    choice = auto_memory.choose_memory_options(demo_recipe("sd15", **ROOMY), needed)  # type: ignore[arg-type]
    assert choice.added == ("memory.gradient_checkpointing=true",)


def test_auto_never_touches_what_changes_numbers() -> None:
    asked = Sized(lambda r: 99.0)
    plain = demo_recipe("sd15", prior__sample_batch_size=1, **ROOMY)
    auto_memory.choose_memory_options(plain, asked)  # type: ignore[arg-type]
    assert len(asked.asked) > 3
    for candidate in asked.asked:
        assert replace(candidate, memory=plain.memory) == plain
        for key in ("weights", "rounding", "ema_every", "split_prior", "offload_optimizer"):
            assert getattr(candidate.memory, key) == getattr(plain.memory, key), key


def test_what_cannot_fit_is_counted_out_and_not_rehearsed() -> None:
    asked = Sized(lambda r: 12.0)
    auto_memory.choose_memory_options(demo_recipe("sd15", memory__auto=True), asked)  # type: ignore[arg-type]
    assert asked.asked[0].memory.gradient_checkpointing, "20 bytes a weight are more than a T4 has"


def test_pictures_are_drawn_one_at_a_time_where_only_drawing_does_not_fit() -> None:
    asked = Sized(lambda r: 79.0 if r.prior.sample_batch_size > 1 else 70.0)
    choice = auto_memory.choose_memory_options(demo_recipe("sd15", **ROOMY), asked)  # type: ignore[arg-type]
    assert choice.added == ("prior.sample_batch_size=1",)


def test_auto_leaves_on_what_the_user_switched_on() -> None:
    asked = demo_recipe("sd15", memory__gradient_checkpointing=True, **ROOMY)
    choice = auto_memory.choose_memory_options(asked, Sized(lambda r: 1.0))  # type: ignore[arg-type]
    assert choice.recipe.memory.gradient_checkpointing


def test_auto_does_not_step_in_the_backward_pass_while_gradients_accumulate() -> None:
    asked = Sized(lambda r: 99.0)
    auto_memory.choose_memory_options(demo_recipe("sd15", train__gradient_accumulation_steps=2, **ROOMY), asked)  # type: ignore[arg-type]
    assert not any(candidate.memory.optimizer_in_backward for candidate in asked.asked)


def test_auto_does_not_step_in_the_backward_pass_of_a_compiled_model() -> None:
    asked = Sized(lambda r: 99.0)
    auto_memory.choose_memory_options(demo_recipe("sd15", train__compile=True, **ROOMY), asked)  # type: ignore[arg-type]
    assert not any(candidate.memory.optimizer_in_backward for candidate in asked.asked)


def test_what_is_left_to_do_is_said_where_the_run_needs_most() -> None:
    """Levers that change no number first, with what they cost; of pictures where drawing is what is too large."""
    asked = demo_recipe("sd15", memory__auto=False, prior__num_class_images=1, sample__every=None)
    found = list_memory_options(asked, predict(asked))
    assert [way.exact for way in found] == sorted((way.exact for way in found), reverse=True)
    cost = {way.what: way.seconds for way in found}
    assert cost["memory.gradient_checkpointing=true"] > 0.1 and cost["memory.ema_device=cpu"] > 0.1  # type: ignore[operator]
    said = describe_memory_options(asked, predict(asked))
    assert said.startswith("memory=auto") and said.endswith("hardware=g5")
    drawing = demo_recipe("sd15", prior__sample_batch_size=32, sample__images_per_prompt=1,
                     memory__gradient_checkpointing=True)
    assert list_memory_options(drawing, predict(drawing))[0].what == "prior.sample_batch_size=1"


def test_auto_does_not_step_in_the_backward_pass_of_several_processes() -> None:
    asked = Sized(lambda r: 99.0)
    auto_memory.choose_memory_options(demo_recipe("sd15", **ROOMY), asked, processes=2)  # type: ignore[arg-type]
    assert not any(candidate.memory.optimizer_in_backward for candidate in asked.asked)


def test_a_finished_run_is_not_planned_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = Result(8, 0.5, 1.0, str(tmp_path), "model")
    monkeypatch.setattr(run, "load_finished", lambda recipe: done)
    monkeypatch.setattr(run, "track_run", lambda recipe, main, update_status: nullcontext())
    monkeypatch.setattr(auto_memory, "apply_auto_memory", lambda *_: pytest.fail("it was planned"))
    asked = demo_recipe(memory__auto=True, tracking__kind=TrackingKind.none)
    assert run.execute(replace(asked, run_dir=tmp_path), StopRequest()) is done


def test_the_choice_of_the_autocast_cache_comes_after_the_engine() -> None:
    AcceleratorState._reset_state()  # one precision a process
    engine, _ = create_engine("cpu", Dtype.bf16)
    seen = []
    for enabled in (True, False):
        engine.set_autocast_cache(enabled)
        with engine.autocast():
            seen.append(torch.is_autocast_cache_enabled())
    AcceleratorState._reset_state()
    assert seen == [True, False]


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_tells_the_engine_whether_to_keep_the_autocast_cache(kept: bool) -> None:
    class Told(Exception):
        pass

    def set_autocast_cache(enabled: bool) -> None:
        raise Told(enabled)

    nothing: Any = None
    with pytest.raises(Told, match=str(kept)):
        engine = Engine(set_autocast_cache=set_autocast_cache)
        assemble(small_recipe(memory__autocast_cache=kept), engine, *[nothing] * 4)


def test_a_chosen_recipe_travels_between_processes() -> None:
    asked = demo_recipe("sd15")
    assert pickle.loads(pickle.dumps(asked)) == asked  # as engine.share sends it, from our own process


def test_a_run_on_the_cpu_has_nothing_to_choose() -> None:
    plain = small_recipe(memory__auto=True)
    assert auto_memory.apply_auto_memory(plain) == (plain, {}, "")


# -- the door -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, card", [("Tesla T4", "T4"), ("NVIDIA A10G", "A10G"), ("NVIDIA L4", "L4"),
                                        ("NVIDIA A100-SXM4-40GB", "A100")])
def test_a_card_is_known_by_its_drivers_name(name: str, card: str) -> None:
    found = gpu_specs.find_card(name)
    assert found is not None and found.name == card


def test_only_the_average_gets_cheaper_when_it_is_updated_less_often() -> None:
    alone, averaged = (small_recipe(memory__offload_optimizer=True, memory__ema_every=4, train__use_ema=ema)
                       for ema in (False, True))
    found, t4 = predict(alone), gpu_specs.CARDS["T4"]
    every = [replace(r, memory=replace(r.memory, ema_every=1)) for r in (alone, averaged)]
    each = [time_and_cost.step_seconds(r, found, t4) for r in every]
    fourth = [time_and_cost.step_seconds(r, found, t4) for r in (alone, averaged)]
    assert fourth[0] == each[0]
    assert fourth[1] - fourth[0] == pytest.approx((each[1] - each[0]) / 4)


def test_an_unknown_card_has_no_speed() -> None:
    assert gpu_specs.find_card("Voodoo 3") is None
    assert gpu_specs.find_card(None) is None


def test_a_plan_has_the_keys_that_programs_read() -> None:
    planned = report.Plan(small_recipe(), predict(small_recipe()), (), "")
    found = json.loads(report.plans_as_json([planned]))
    assert found.keys() >= {"fits", "card_gib", "reserved_gib", "allocated_gib", "usable_vram_gib", "by_phase",
                            "by_category", "levers", "step_seconds", "run_seconds", "price_usd"}
    assert found["by_phase"].keys() >= {"load", "forward", "backward", "step", "ema", "save"}


def test_a_table_fits_80_columns() -> None:
    planned = report.Plan(small_recipe(), predict(small_recipe()), ("memory.gradient_checkpointing=true",), "why not")
    assert max(map(len, report.format_plan(planned).splitlines())) <= 80
    assert max(map(len, report.format_comparison([planned, planned]).splitlines())) <= 80


def test_the_picture_of_a_step_is_written(tmp_path: Path) -> None:
    report.plot_step_memory(report.Plan(small_recipe(), predict(small_recipe()), (), ""), tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("vae, dtype", [
    (None, torch.float32), ("madebyollin/sdxl-vae-fp16-fix", torch.float16), ("stabilityai/sdxl-vae", torch.float32),
    ("models/sdxl_vae.safetensors", torch.float32), ("models/sdxl-vae-fp16-fix.safetensors", torch.float16)])
def test_a_vae_of_its_own_is_planned_in_the_precision_that_it_is_loaded_in(
        vae: str | None, dtype: torch.dtype) -> None:
    """Half overflows in SDXL's VAE, whoever publishes it; its fix is known by name."""
    with fake_tensors():
        assert skeleton_models.build_skeleton(demo_recipe("sdxl", model__vae=vae)).vae.dtype is dtype


@pytest.mark.parametrize("upcast", [True, False])
def test_a_folder_of_a_vae_says_itself_whether_half_overflows(upcast: bool, tmp_path: Path) -> None:
    known = Path(skeleton_models.resolve_asset("package:architectures")) / "sdxl/vae/config.json"
    (tmp_path / "config.json").write_text(json.dumps(json.loads(known.read_text()) | {"force_upcast": upcast}))
    with fake_tensors():
        found = skeleton_models.build_skeleton(demo_recipe("sdxl", model__vae=str(tmp_path))).vae
    assert found.dtype is (torch.float32 if upcast else torch.float16)


def test_a_model_of_unknown_shape_is_refused_with_what_to_type() -> None:
    strange = demo_recipe("sd15", model__name="other", model__source="somebody/other")
    with pytest.raises(UserError, match=r"type model\.source=DIR"):
        predict(strange)


@pytest.mark.parametrize("option", ["g4dn", "g5", "g6", "g5_12xlarge", "g6_12xlarge", "p4d"])
def test_every_card_on_file_is_known_and_has_a_price(option: str) -> None:
    text = (conf_dir() / "hardware" / f"{option}.yaml").read_text("utf-8")
    gpu = next(line.split()[1] for line in text.splitlines() if line.startswith("gpu:"))
    assert gpu_specs.find_card(gpu) is not None
    assert "price_usd_hour: null" not in text.replace("spot_price_usd_hour", "spot")


# -- several cards, buckets, several subjects ---------------------------------------------------------------------

def test_data_parallel_holds_the_gradients_a_second_time() -> None:
    one, four = (predict(small_recipe(hardware__gpus=count)) for count in (1, 4))
    held = [found.by_phase["step"].by_category["gradients"] for found in (one, four)]
    assert held[1] - held[0] == one.trained_parameters * 4


def test_several_cards_are_planned_without_levers_that_work_in_one_process() -> None:
    asked = Sized(lambda r: 99.0)
    auto_memory.choose_memory_options(demo_recipe("sd15", hardware__gpus=4, **ROOMY), asked)  # type: ignore[arg-type]
    assert not any(candidate.memory.optimizer_in_backward for candidate in asked.asked)


def test_gradients_of_several_cards_take_time_on_the_link() -> None:
    found, a10g = predict(small_recipe()), gpu_specs.CARDS["A10G"]
    one, four = (time_and_cost.step_seconds(small_recipe(hardware__gpus=count), found, a10g) for count in (1, 4))
    assert four - one == pytest.approx(1.5 * found.trained_parameters * 4 / 10e9)


def test_tf32_is_counted_at_half_the_rate_of_half_precision() -> None:
    found, a100 = predict(small_recipe()), gpu_specs.CARDS["A100"]
    asked = small_recipe()
    plain, fast = (time_and_cost.step_seconds(replace(asked, precision=replace(asked.precision, tf32=on)), found, a100)
                   for on in (False, True))
    assert fast < plain


def test_no_bucket_takes_more_than_the_one_that_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = small_recipe(dataset__buckets=True, prior__with_prior_preservation=False)
    planned = max(usage.allocated for usage in predict(asked).by_phase.values())
    for size in aspect_buckets.bucket_sizes(asked.model.resolution):
        monkeypatch.setattr(rehearsal, "largest", lambda *_, size=size: size)
        assert max(usage.allocated for usage in predict(asked).by_phase.values()) <= planned, size


def test_with_buckets_photos_and_class_images_pass_one_after_the_other() -> None:
    kept = [_kept(predict(small_recipe(dataset__buckets=on))) for on in (False, True)]
    assert kept[1] < 0.75 * kept[0]


def test_two_subjects_have_class_images_of_their_own_to_draw() -> None:
    one = small_recipe(hardware__gpu="T4")
    two = replace(one, dataset=replace(one.dataset, concepts=[
        Subject("a", "a zwx toy", None, "a toy"), Subject("b", "a ohwx cup", None, "a cup")]))
    found = predict(one)
    seconds = [time_and_cost.estimate(asked, found, gpu_specs.CARDS["T4"]).run_seconds or 0.0 for asked in (one, two)]
    assert seconds[1] > seconds[0]
