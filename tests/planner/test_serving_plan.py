"""The plan of inference: its memory against the real pipeline, its memory options, and the choice for each card."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dreambooth import serve
from dreambooth.config.enums import BaseWeights, MethodKind
from dreambooth.config.generate import Generate
from dreambooth.config.hardware import Hardware, presets
from dreambooth.errors import DoesNotFit
from dreambooth.inference.model_sources import find_source
from dreambooth.inference.picture_request import PictureRequest
from dreambooth.inference.renderer import Renderer
from dreambooth.models import families, inference_memory
from dreambooth.models.inference_memory import PLAIN, InferenceMemory, read_memory
from dreambooth.models.pipeline import inference_dtype
from dreambooth.planner import serving_plan
from dreambooth.planner.allocation_trace import StorageTrace
from dreambooth.planner.auto_memory import MAX_CARD_SHARE
from dreambooth.planner.caching_allocator import CachingAllocator
from dreambooth.planner.fake_cuda import fake_tensors, to_dtype
from dreambooth.planner.gpu_specs import cuda_overhead_gib
from dreambooth.planner.rehearsal import predict
from dreambooth.planner.report import Plan, format_plan, plans_as_json
from dreambooth.planner.serving_plan import (
    format_serving,
    model_of_recipe,
    model_of_source,
    plan_presets,
    plan_serving,
    serving_as_dicts,
)
from dreambooth.planner.serving_rehearsal import Footprint, ServedModel, predict_serving, rehearse_serving
from dreambooth.planner.trace_replay import Usage, replay
from dreambooth.serving import worker
from dreambooth.serving.options import Serve
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.hardware import Machine
from tests.support import tiny_models
from tests.support.configs import small_recipe

BASES = ("package:tiny-sd", "package:tiny-flow")
TINY = resolve_asset(BASES[0])
SLICED, TILED = InferenceMemory(vae_slicing=True), InferenceMemory(vae_tiling=True)
OFFLOADED, INT8 = InferenceMemory(cpu_offload=True), InferenceMemory(base_weights=BaseWeights.int8)
REQUESTS = [PictureRequest("a photo of a toy", seed=seed, num_inference_steps=2, width=64, height=64,
                           guidance_scale=7.5) for seed in range(3)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_memory, "TILE", 32)  # half of a picture


def open_renderer(base: str, memory: InferenceMemory) -> Renderer:
    return Renderer(find_source(Generate(base=base)), "cpu", memory=memory)


# -- memory options -----------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_memory_options_change_pictures_within_their_bounds(base: str, small_tiles: None) -> None:
    """Offloading changes no bit. Slicing computes with another batch size, which changes roundings. Tiles of half the
    side have their own means in the VAE's group norms; int8 rounds weights to 1 / 254 of the largest of a row. The
    bounds of the last two, in levels of 255 on average, are measured."""
    plain = pixels(base, PLAIN)
    assert np.array_equal(pixels(base, OFFLOADED), plain)
    assert np.abs(pixels(base, SLICED) - plain).max() <= 1
    for memory, mean in ((TILED, 10.0), (INT8, 4.0)):
        difference = np.abs(pixels(base, memory) - plain)
        assert 0 < difference.mean() < mean
    assert np.array_equal(pixels(base, replace(INT8, cpu_offload=True)), pixels(base, INT8))


def pixels(base: str, memory: InferenceMemory) -> np.ndarray:
    return np.stack([np.asarray(picture, int) for picture in open_renderer(base, memory).pictures(REQUESTS)])


@pytest.mark.parametrize("value, memory", [
    ("auto", None), (None, PLAIN), ([], PLAIN), ("int8", INT8), (["vae_slicing"], SLICED),
    (["cpu_offload", "int8"], replace(INT8, cpu_offload=True))])
def test_memory_options_are_read_from_what_the_user_types(value: object, memory: InferenceMemory | None) -> None:
    assert read_memory(value) == memory
    assert memory is None or read_memory(memory.names) == memory


@pytest.mark.parametrize("value, words", [
    ("fast", "memory_options must be auto, or a list of vae_slicing, vae_tiling, cpu_offload and one of int8, fp8, "),
    (["int8", "nf4"], "one of int8, fp8, nf4"), (["cpu_offload", "nf4"], "must not have both cpu_offload and nf4")])
def test_impossible_memory_options_are_refused(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_memory(value)


@pytest.mark.parametrize("name, capability, dtype", [
    ("z_image", (8, 6), torch.bfloat16), ("z_image", (7, 5), torch.float32), ("sdxl", (8, 6), torch.float16),
    ("sdxl", (7, 5), torch.float16), ("z_image", None, torch.float32)])
def test_a_model_that_overflows_in_fp16_draws_in_another_precision(
        name: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> None:
    family = next(family for family in families.FAMILIES if family.architecture == name)
    assert inference_dtype(family, capability) is dtype


# -- predicted memory ---------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("base, memory", [
    (BASES[1], PLAIN), (BASES[0], PLAIN), (BASES[0], SLICED),
    (BASES[0], InferenceMemory(vae_slicing=True, vae_tiling=True))],
    ids=lambda value: value if isinstance(value, str) else "+".join(value.names) or "plain")
def test_the_predicted_peak_is_that_of_the_real_pipeline(
        base: str, memory: InferenceMemory, small_tiles: None) -> None:
    renderer, trace = open_renderer(base, memory), StorageTrace()
    with trace:
        trace.mark("load")
        for module in renderer._pipeline.components.values():
            trace.add_module(module if isinstance(module, torch.nn.Module) else None, "weights")
        trace.mark("draw")
        renderer.pictures(REQUESTS)
    real = replay(trace.events, trace.category, trace.marks, CachingAllocator(full=True))
    model = ServedModel(find_source(Generate(base=base)).model, batch=len(REQUESTS), size=(64, 64))
    with fake_tensors():
        predicted = rehearse_serving(model, memory, None)
    assert peak(predicted) == pytest.approx(real["draw"].allocated, rel=0.01)
    assert predicted.reserved == pytest.approx(real["draw"].reserved, rel=0.05)


@pytest.mark.slow
def test_tensors_without_data_give_the_memory_of_real_tensors() -> None:
    model = ServedModel(find_source(Generate(base=BASES[0])).model, batch=2, size=(64, 64))
    assert rehearse_serving(model, SLICED, None) == predict_serving(model, SLICED, None)


@pytest.mark.slow
def test_offloading_leaves_the_largest_part_on_the_card() -> None:
    model = ServedModel(TINY, size=(64, 64))
    plain, offloaded = (predict_serving(model, memory, 8.0) for memory in (PLAIN, OFFLOADED))
    assert plain.part_bytes == offloaded.part_bytes and plain.weight_bytes == offloaded.weight_bytes
    saved = plain.by_phase["denoise"].allocated - offloaded.by_phase["denoise"].allocated
    assert saved == pytest.approx(sum(plain.part_bytes[1:]), rel=0.1)


@pytest.mark.slow
def test_eight_bits_halve_the_denoiser(tiny_flow_plans: dict[BaseWeights, Footprint]) -> None:
    half, int8, nf4 = (tiny_flow_plans[kind].weight_bytes for kind in (
        BaseWeights.half, BaseWeights.int8, BaseWeights.nf4))
    quantised = tiny_flow_plans[BaseWeights.int8].quantised
    assert half - int8 == pytest.approx(quantised, rel=0.05)
    assert int8 - nf4 == pytest.approx(quantised / 2, rel=0.05)
    assert tiny_flow_plans[BaseWeights.int8].part_bytes[0] == pytest.approx(
        tiny_flow_plans[BaseWeights.half].part_bytes[0], rel=0.05)


@pytest.fixture(scope="module")
def tiny_flow_plans() -> dict[BaseWeights, Footprint]:
    model = ServedModel(find_source(Generate(base=BASES[1])).model, size=(64, 64))
    return {kind: predict_serving(model, InferenceMemory(base_weights=kind), 8.0) for kind in BaseWeights}


def test_t5_keeps_layers_in_fp32_as_transformers_loads_them(tmp_path: Path) -> None:
    """In fp16, transformers keeps the output layers of T5's feed-forward layers in fp32: 1.9 GiB of SD 3.5."""
    folder, family = tiny_models.make_sd35_medium(tmp_path), families.of_folder(tmp_path)
    assert family is not None
    part = family.encoders[2]
    with fake_tensors():
        built = to_dtype(part.build(part.configuration(folder, subfolder=part.name)), torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = part.load(str(folder), torch.float16, subfolder=part.name)
    assert {name: value.dtype for name, value in built.named_parameters()} == {
        name: value.dtype for name, value in loaded.named_parameters()}


# -- choices ------------------------------------------------------------------------------------------------------

MODEL = ServedModel("x", batch=4)
GIB = 2**30


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose denoiser has 6 GiB, its text encoder 4 and its VAE 1; decoding needs 5 GiB, or sliced 2."""
    def predict(model: ServedModel, memory: InferenceMemory, capability: float | None) -> Footprint:
        share = {BaseWeights.int8: 0.5, BaseWeights.fp8: 0.5, BaseWeights.nf4: 0.25}.get(memory.base_weights, 1.0)
        weights = (6 * share, 4, 1)
        picture = 1 if memory.vae_tiling else 2 if memory.vae_slicing else 5
        phases = ((weights[1], 0.5), (weights[0], 0.5), (weights[2], picture))
        on_card = [part if memory.cpu_offload else sum(weights) for part, _ in phases]
        usage = {name: Usage(0, int((gib + activations) * GIB)) for name, gib, (_, activations) in zip(
            ("prompts", "denoise", "decode"), on_card, phases, strict=True)}
        quantised = 3 * GIB * (memory.base_weights is not BaseWeights.half)
        return Footprint((512, 512), usage, {"prompts": 10**9, "denoise": 10**12, "decode": 10**12}, 100,
                         (6 * GIB, 4 * GIB, GIB), int(sum(weights) * GIB), quantised, True, True)

    monkeypatch.setattr(serving_plan, "predict_serving", predict)


def card(gib: float, host: float | None = None) -> Hardware:
    """A card on which a plan may use `gib` beside the CUDA overhead of a process."""
    return replace(presets()["g5"], usable_vram_gib=(gib + cuda_overhead_gib("A10G")) / MAX_CARD_SHARE + 1e-6,
                   host_ram_gib=host)


@pytest.mark.parametrize("gib, host, names", [
    (16, None, []), (15.9, None, ["vae_slicing"]), (12.9, None, ["cpu_offload"]),
    (12.9, 14, ["vae_slicing", "vae_tiling"]),  # the whole model does not fit into host memory
    (11.9, 14, ["vae_slicing", "int8"]), (9.9, 14, ["vae_slicing", "vae_tiling", "int8"]),
    (6.4, None, ["vae_slicing", "vae_tiling", "cpu_offload", "int8"])])
def test_the_first_set_that_fits_is_chosen_and_exact_ones_come_first(
        gib: float, host: float | None, names: list[str], small_model: None) -> None:
    plan = plan_serving(MODEL, card(gib, host))
    assert plan.memory.names == names and plan.fits and plan.peak_gib <= gib + 0.74 + 1e-6


def test_memory_options_cost_time(small_model: None) -> None:
    seconds = [plan_serving(MODEL, card(40), memory).seconds_per_picture or 0 for memory in (PLAIN, INT8, OFFLOADED)]
    assert seconds == sorted(seconds)
    assert seconds[2] - seconds[0] == pytest.approx(2 * 11 * GIB / 10e9 / 4)


def test_a_plan_that_does_not_fit_says_what_is_too_small(small_model: None) -> None:
    hopeless = plan_serving(MODEL, card(2))
    assert not hopeless.fits
    assert "max_batch=1 instead of 4" in hopeless.shortfall and "A10G has 2.88" in hopeless.shortfall
    typed = plan_serving(MODEL, card(8), PLAIN)
    assert typed.memory == PLAIN and not typed.fits
    host = plan_serving(MODEL, card(20, host=3))
    assert "of host memory to load the model, and the machine has 3" in host.shortfall


def test_every_gpu_of_the_configuration_has_a_row(small_model: None) -> None:
    plans = plan_presets(MODEL)
    assert [plan.hardware.gpu for plan in plans] == ["T4", "L4", "A10G", "A100", "L40S"]
    assert plans[0].footprint.size == (512, 512) and all(plan.fits for plan in plans)
    lines, rows = format_serving(plans), serving_as_dicts(plans)
    assert max(map(len, lines)) <= 80 and len(lines) == 7 and "4 at a time" in lines[0]
    assert [row["peak_gib"] for row in rows] == pytest.approx([plan.peak_gib for plan in plans], abs=1e-3)
    cpu = plan_serving(MODEL, presets()["cpu"])
    assert (cpu.peak_gib, cpu.seconds_per_picture) == (0.0, None)


def test_a_source_names_its_adapter_and_resolution(tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"x" * 1000)
    source = replace(find_source(Generate(base=BASES[0])), adapter=str(lora),
                     settings={"model.resolution": "64", "sample.guidance_scale": "3", "model.name": "tiny"})
    model = model_of_source(source, 2, adapters=[lora])
    assert model == ServedModel(source.model, "tiny", None, 2000, 3.0, 2, (64, 64))
    assert model_of_source(source, 2, (32, 64)).size == (32, 64)


def test_the_server_chooses_for_its_own_gpu(
        tmp_path: Path, small_model: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = find_source(Generate(base=BASES[0]))
    for name, size in (("one", 10), ("two", 30), ("three", 20)):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x" * size)
    start = {"max_batch": 4, "max_adapters": 2, "workers_per_gpu": 1}
    monkeypatch.setattr(serving_plan, "detect_machine", lambda: Machine("NVIDIA A10G", 15.0, 8.6))
    plan = serving_plan.plan_this_machine(source, 4, sorted(tmp_path.iterdir()), 2)
    assert plan.model.adapter_bytes == 50 and plan.model.batch == 4
    assert worker._choose_memory(source, start, []) == SLICED
    told = capsys.readouterr().out
    assert "memory_options=auto: about 13.7 of 15.0 GiB of the GPU for 4 pictures with vae_slicing" in told
    monkeypatch.setattr(serving_plan, "detect_machine", lambda: Machine("NVIDIA A10G", 30.0, 8.6))
    assert worker._choose_memory(source, start | {"workers_per_gpu": 2}, []) == SLICED
    monkeypatch.setattr(serving_plan, "detect_machine", lambda: Machine("NVIDIA A10G", 4.0, 8.6))
    with pytest.raises(DoesNotFit, match=r"max_batch=1 instead of 4.*memory_options=\[\], to try it nevertheless"):
        worker._choose_memory(source, start, [])


@pytest.mark.slow
def test_the_plan_of_a_run_shows_serving(small_model: None) -> None:
    recipe = small_recipe()
    plan = Plan(recipe, predict(recipe), (), "", plan_presets(MODEL))
    assert "serving: 512 x 512 px, 4 at a time" in format_plan(plan)
    assert [row["gpu"] for row in json.loads(plans_as_json([plan]))["serving"]] == ["T4", "L4", "A10G", "A100", "L40S"]
    adapter = small_recipe(method__kind=MethodKind.lora)
    models = [model_of_recipe(one, 1000, 4) for one in (recipe, adapter)]
    assert [model.adapter_bytes for model in models] == [0, 2000]
    assert models[0].size == (recipe.model.resolution,) * 2 and models[0].source == recipe.source


def test_serve_prints_a_plan(small_model: None, capsys: pytest.CaptureFixture[str]) -> None:
    serve._show_plan(Serve(base=BASES[0], max_batch=3, memory_options=["int8"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[0].startswith("serving: 512 x 512 px, 3 at a time, 25 steps")
    assert all(line.endswith("* int8") for line in lines[2:])


@pytest.mark.slow
def test_a_short_kernel_costs_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """For SD 1.5 on an A100, diffusers publishes 21.66 steps per second with one picture."""
    model = ServedModel("x", "sd15")
    one = plan_serving(model, presets()["p4d"], steps=1000)
    assert 1000 / (one.seconds_per_picture or 0) == pytest.approx(21.66, rel=0.05)
    monkeypatch.setattr(serving_plan, "LAUNCH_SECONDS", 0.0)
    assert (plan_serving(model, presets()["p4d"], steps=1000).seconds_per_picture or 0) < (
        one.seconds_per_picture or 0)


def peak(footprint: Footprint) -> int:
    return max(usage.allocated for usage in footprint.by_phase.values())
