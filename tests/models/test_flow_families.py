"""Tiny models of the families of flow matching: they train, resume, sample and export, and agree with diffusers."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreambooth.config.enums import AttentionKind, Device, Dtype, MethodKind, Targets
from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.models import families, text_encoders
from dreambooth.models.families import qwen_text
from dreambooth.models.loading import encode_prompts, exact_frozen, load
from dreambooth.models.pipeline import Sampler, build_pipeline, generate_images
from tests.support.configs import small_recipe
from tests.support.faults import call, train
from tests.support.runs import assert_same, the_run
from tests.support.tiny_models import FLOW_FAMILIES

PROMPT = "a photo of a toy"


def recipe_for(family: str, flow_bases: dict[str, Path], **settings: Any) -> Any:
    return small_recipe(model__source=str(flow_bases[family]), model__name=family, model__resolution=16,
                        train__train_text_encoder=False, **settings)


@pytest.mark.parametrize("family", FLOW_FAMILIES)
def test_a_step_of_the_pipeline_follows_our_velocity(family: str, flow_bases: dict[str, Path]) -> None:
    """The pipeline's only Euler step, from noise level 1 to 0, is x - v, with our prediction v and our decoding."""
    parts = load(recipe_for(family, flow_bases, memory__cache_text=False), torch.device("cpu"))
    assert parts.family is families.of_architecture(family)
    pipeline = build_pipeline(parts)
    side = 16 // parts.vae_scale
    noise = torch.randn(2, parts.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_dynamic_shifting=False, shift=1.0,
                                                 shift_terminal=None)
    pipeline.scheduler = scheduler
    with torch.no_grad():
        text = torch.cat([parts.frozen_text(prompt) for prompt in (PROMPT, "a red toy in the snow")])
        velocity = parts.predict(noise, torch.ones(2), text)
        ours = (parts.decode((noise - velocity) / parts.scaling_factor) / 2 + 0.5).clamp(0, 1)
        arguments = parts.family.sampling_arguments(pipeline) | parts.family.guidance_arguments(
            parts.family.no_guidance, 2)
        if family == "qwen_image":  # its pipeline takes tokens
            noise = pipeline._pack_latents(noise, *noise.shape)
        theirs = pipeline(
            prompt=[PROMPT, "a red toy in the snow"], height=16, width=16, num_inference_steps=1, latents=noise,
            sigmas=[1.0], output_type="pt", **arguments).images
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def pictures(recipe: Recipe, **options: str) -> Tensor:
    """Two pictures of the base model with classifier-free guidance, (2, 16, 16, 3)."""
    pipeline = build_pipeline(load(recipe, torch.device("cpu")))
    drawn = generate_images(pipeline, [PROMPT, "a red toy"], [1, 2], Sampler(2, 3.0, 16), 2, **options)
    return torch.stack([torch.from_numpy(np.array(picture)) for batch in drawn for picture in batch])


@pytest.mark.parametrize("family", FLOW_FAMILIES)
def test_pictures_by_encoded_prompts_equal_those_by_prompts(
        family: str, flow_bases: dict[str, Path], tmp_path: Path) -> None:
    encoded = replace(recipe_for(family, flow_bases), run_root=tmp_path)
    plain = recipe_for(family, flow_bases, memory__cache_text=False)
    assert load(encoded, torch.device("cpu")).encoders == []
    drawn = pictures(encoded)
    assert drawn.equal(pictures(plain))
    negative = pictures(encoded, negative_prompt="a red toy")
    assert negative.equal(pictures(plain, negative_prompt="a red toy"))
    assert not negative.equal(drawn)


@pytest.mark.parametrize("family", ["sd35_medium", "z_image"])
def test_a_picture_made_from_another_has_its_size(family: str, flow_bases: dict[str, Path]) -> None:
    """Otherwise the pipeline of Stable Diffusion 3 draws at the size of the published model."""
    pipeline = build_pipeline(load(recipe_for(family, flow_bases, memory__cache_text=False), torch.device("cpu")))
    pipeline = families.of_architecture(family).image_to_image(pipeline)
    [[picture]] = generate_images(pipeline, [PROMPT], [1], Sampler(2, 1.0, 16), 1, start=Image.new("RGB", (16, 32)))
    assert picture.size == (16, 32)


@pytest.mark.parametrize("family", FLOW_FAMILIES)
def test_xformers_is_refused(family: str, flow_bases: dict[str, Path]) -> None:
    """It needs query, key and value in one precision, which the norms of query and key do not give under autocast."""
    recipe = recipe_for(family, flow_bases)
    with pytest.raises(UserError, match="has no attention=xformers: type attention=sdpa"):
        families.of_architecture(family).check_training(replace(
            recipe, attention=recipe.attention.copy_with(kind=AttentionKind.xformers)))


def test_dropout_in_layers_without_samples_is_refused(flow_bases: dict[str, Path]) -> None:
    settings = {"method__name": "lora", "method__kind": MethodKind.lora, "method__targets": Targets.all}
    check = families.of_architecture("z_image").check_training
    check(recipe_for("z_image", flow_bases, **settings))
    with pytest.raises(UserError, match=r"type method.targets=transformer, or method.dropout=0"):
        check(recipe_for("z_image", flow_bases, **settings, method__dropout=0.1))


@pytest.mark.parametrize("family", FLOW_FAMILIES)
def test_a_second_run_loads_no_text_encoder(
        family: str, flow_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, device = replace(recipe_for(family, flow_bases), run_root=tmp_path), torch.device("cpu")
    encode_prompts(recipe, device, lambda: [PROMPT])
    expected = load(recipe_for(family, flow_bases, memory__cache_text=False), device).frozen_text(PROMPT)
    monkeypatch.setattr(text_encoders, "load", None)
    encode_prompts(recipe, device, lambda: [PROMPT, ""])
    assert load(recipe, device).frozen_text(PROMPT).equal(expected)
    changed = shutil.copytree(flow_bases[family], tmp_path / "changed")
    (changed / "tokenizer/special.json").write_text("{}")
    with pytest.raises(TypeError):  # another tokenizer: the text encoders would be loaded
        encode_prompts(replace(recipe, source=str(changed)), device, lambda: [PROMPT])


def text_encoders_in_bf16(source: Path, target: Path) -> Path:
    """A copy of a model whose text encoders are files in bf16."""
    shutil.copytree(source, target)
    for path in target.glob("text_encoder*/model.safetensors"):
        weights = {name: value.to(torch.bfloat16) for name, value in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})
        config = path.with_name("config.json")
        config.write_text(config.read_text().replace("float32", "bfloat16"))
    return target


@pytest.mark.parametrize("family", FLOW_FAMILIES)
def test_text_encoders_in_bf16_compute_in_fp32(family: str, flow_bases: dict[str, Path], tmp_path: Path) -> None:
    """As if their files were fp32; no layer stays in fp32."""
    source = str(text_encoders_in_bf16(flow_bases[family], tmp_path / "bf16"))
    encoded, plain = (replace(recipe_for(family, flow_bases, memory__cache_text=cached), source=source,
                              run_root=tmp_path) for cached in (True, False))
    encode_prompts(encoded, torch.device("cpu"), lambda: [PROMPT])
    parts = load(plain, torch.device("cpu"))
    assert load(encoded, torch.device("cpu")).frozen_text(PROMPT).equal(parts.frozen_text(PROMPT))
    for encoder in text_encoders.load(encoded.source, parts.family, "auto", local_files_only=True):
        text_encoders.compute_in_fp32(encoder)
        small = {name for name, p in encoder.named_parameters() if p.dtype is not torch.float32}
        assert small == {name for name, _ in encoder.named_parameters() if re.search(r"(layers|blocks?)\.\d", name)}


def test_an_exported_model_has_the_text_encoder_of_the_source(flow_bases: dict[str, Path], tmp_path: Path) -> None:
    """In the precision of its file, although the run computes in another one."""
    source = text_encoders_in_bf16(flow_bases["z_image"], tmp_path / "bf16")
    weights = load_file(source / "text_encoder/model.safetensors")
    recipe = replace(recipe_for("z_image", flow_bases), source=str(source), run_root=tmp_path)
    whole = exact_frozen(load(recipe, torch.device("cpu")), recipe)
    [encoder] = whole.encoders
    assert whole.encodings is None and encoder.dtype is torch.bfloat16
    assert all(value.equal(weights[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("family", FLOW_FAMILIES)
def test_latents_come_back_as_the_picture(family: str, flow_bases: dict[str, Path]) -> None:
    """Encoding and decoding give what the VAE alone gives."""
    parts = load(recipe_for(family, flow_bases), torch.device("cpu"))
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        mean, std = parts.encode(pixels)
        frames = pixels.unsqueeze(2) if family == "qwen_image" else pixels  # of a video
        alone = parts.vae.decode(parts.vae.encode(frames).latent_dist.mean).sample
        torch.testing.assert_close(parts.decode(mean), alone.view_as(pixels), rtol=1e-4, atol=1e-4)
    assert mean.shape[1] == parts.latent_channels and (std > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", FLOW_FAMILIES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_trains_resumes_bit_for_bit_samples_and_exports(
    family: str, method: str, flow_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = [f"model={family}", f"method={method}", f"model.source={flow_bases[family]}", "model.offline=true",
           "model.resolution=16", "dataset.allow_drawings=true", "train.max_train_steps=4", "train.learning_rate=1e-3",
           "name=demo-x", "prior.num_inference_steps=2", "sample.num_inference_steps=2", "sample.guidance_scale=3",
           "train.gradient_accumulation_steps=1"]
    assert train(tmp_path / "straight", *ask) == 0
    assert train(tmp_path / "killed", *ask, fault="checkpoint_rename") == -9
    assert train(tmp_path / "killed", *ask) == 0
    straight = the_run(tmp_path / "straight")
    assert_same(the_run(tmp_path / "killed"), straight)
    if method == "full":
        ours, theirs = (load_file(next((folder / "transformer").glob("*.safetensors"))) for folder in (
            straight / "model", flow_bases[family]))
        moved = [name for name in theirs if not ours[name].equal(theirs[name])]
        assert len(moved) > 0.6 * len(theirs)
    assert call("generate", [f"run={straight}", f"prompt={PROMPT}", "num_images=1", "num_inference_steps=2"]) == 0
    monkeypatch.chdir(straight)  # the folder of the result is that of the card's code
    card = (straight / "model/README.md").read_text()
    known: dict[str, Any] = {}
    exec(card.split("```")[1].removeprefix("python\n").partition("pipeline(prompt")[0], known)
    kind = families.of_architecture(family)
    pixels = known["pipeline"](prompt=PROMPT, num_inference_steps=2, height=16, width=16,
                               generator=torch.Generator().manual_seed(0), output_type="np",
                               **kind.sampling_arguments(known["pipeline"]), **kind.guidance_arguments(3.0, 1)).images
    drawn = np.asarray(Image.open(straight / "generated/a-photo-of-a-toy-seed0.png")).astype(int)
    assert np.abs((pixels[0] * 255).round() - drawn).max() <= (0 if method == "full" else 1)
    title, license_title = kind.title, kind.license[1]
    assert f"| family | {title} |" in card and f"the published models of {title} are under {license_title}" in card
    assert "a photo of a zwx toy" in card


@pytest.mark.slow
def test_a_quantised_run_with_swapped_blocks_equals_one_without(flow_bases: dict[str, Path], tmp_path: Path) -> None:
    ask = ["model=z_image", "method=dora", f"model.source={flow_bases['z_image']}", "model.offline=true",
           "model.resolution=16", "dataset.allow_drawings=true", "train.max_train_steps=3", "train.learning_rate=1e-3",
           "name=demo-x", "prior.num_inference_steps=2", "sample.num_inference_steps=2", "memory=low",
           "method.base_weights=int8"]
    assert train(tmp_path / "plain", *ask) == 0
    assert train(tmp_path / "swapped", *ask, "memory.swap_blocks=2") == 0
    assert_same(the_run(tmp_path / "swapped"), the_run(tmp_path / "plain"))


@pytest.mark.parametrize("setting, typed", [
    ({"train__snr_gamma": 5.0}, "train.snr_gamma=null"), ({"train__huber_delta": 0.1}, "train.huber_delta=null"),
    ({"train__debiased_estimation": True}, "train.debiased_estimation=false"),
    ({"train__noise_offset": 0.1}, "train.noise_offset=0"), ({"train__multires_noise": 0.3}, "train.multires_noise=0"),
    ({"model__zero_terminal_snr": True}, "model.zero_terminal_snr=false")])
def test_what_flow_matching_does_not_define_is_refused(
    setting: dict[str, Any], typed: str, flow_bases: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=f"Z-Image is trained by flow matching, .* are not defined: type {typed}$"):
        load(recipe_for("z_image", flow_bases, **setting), torch.device("cpu"))


def test_fp16_is_refused_where_it_overflows(flow_bases: dict[str, Path]) -> None:
    t4 = {"precision__dtype": Dtype.fp16, "hardware__device": Device.cuda, "hardware__compute_capability": 7.5}
    with pytest.raises(UserError, match="exceed the largest number of fp16: type precision=bf16 on a GPU"):
        encode_prompts(recipe_for("z_image", flow_bases, **t4), torch.device("cpu"), list)


def test_an_encoded_prompt_that_is_not_finite_is_refused(
        flow_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(recipe_for("z_image", flow_bases), run_root=tmp_path)
    family = families.of_architecture("z_image")
    monkeypatch.setattr(type(family), "text", lambda *_: torch.full((1, 64, 33), torch.inf))
    with pytest.raises(UserError, match="output for '' is not finite in fp32: type precision=bf16"):
        encode_prompts(recipe, torch.device("cpu"), list)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tokens_of_long_prompts_are_counted_in_half_precision(dtype: torch.dtype) -> None:
    text = torch.zeros(2, 512, 2, dtype=dtype)
    text[0, :301, -1] = text[1, :, -1] = 1
    assert qwen_text.lengths(text) == [301, 512]


def test_a_prompt_is_counted_without_its_template(flow_bases: dict[str, Path]) -> None:
    family = families.of_architecture("qwen_image")
    tokenizers = [family.load_tokenizer("tokenizer", flow_bases["qwen_image"])]
    with pytest.raises(UserError, match="this model reads 94 tokens and the prompt has 95: shorten 'toy toy"):
        family.check_prompt(tokenizers, " ".join(["toy"] * 41))
    assert family.tokens(tokenizers, " ".join(["toy"] * 40)).shape == (1, 2, 128)


def test_a_model_that_edits_pictures_belongs_to_no_family(flow_bases: dict[str, Path]) -> None:
    family, layout = families.of_source(flow_bases["qwen_image"])
    assert families.of_layout(layout) is family
    assert families.of_layout(replace(layout, parts=[*layout.parts, "processor"])) is None


def test_swapped_blocks_are_refused_elsewhere() -> None:
    with pytest.raises(UserError, match=r"has no blocks to swap: type memory\.swap_blocks=null"):
        load(small_recipe(memory__swap_blocks=1, memory__gradient_checkpointing=True, method__kind=MethodKind.lora),
             torch.device("cpu"))


def test_settings_of_flow_matching_are_refused_elsewhere() -> None:
    recipe = small_recipe(flow__shift=3.0)
    with pytest.raises(UserError, match=r"flow\.shift is a setting of flow matching, which .* leave flow\.shift out"):
        load(recipe, torch.device("cpu"))
