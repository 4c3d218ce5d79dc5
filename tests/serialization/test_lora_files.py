"""An adapter's files: loaded by diffusers they draw what the run's own model draws."""

import json
import struct
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dreambooth.config.enums import Dtype, MethodKind, Targets
from dreambooth.config.method import Method
from dreambooth.errors import UserError
from dreambooth.models import families, loading, lora
from dreambooth.models.components import Components
from dreambooth.serialization import lora_files
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.utils.assets import resolve_asset
from tests.support.tiny_models import make

BASE = resolve_asset("package:tiny-sd")
ONE, TWO = (families.of_architecture(name) for name in ("sd15", "sdxl"))  # text encoders
ONE_V, SDXL_LORA = families.of_architecture("sd21"), "https://github.com/Stability-AI/generative-models"


def pipeline() -> Any:
    from diffusers import StableDiffusionPipeline

    made = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def over(pipe: Any) -> loading.TrainedModel:
    """The pipeline's UNet and text encoders as a run trains them."""
    family = TWO if hasattr(pipe, "text_encoder_2") else ONE
    names = [family.denoiser.name, *(part.name for part in family.encoders)]
    return loading.TrainedModel(family, {name: getattr(pipe, name) for name in names}, pipe.vae_scale_factor)


def parts_of(pipe: Any) -> Components:
    return Components(over(pipe).family, pipe.unet, [], pipe.vae, [], {})


def write(folder: Path, pipe: Any, known: dict[str, lora.LowRank], title: str = "toy", **metadata: str) -> None:
    lora_files.write(folder, known, lora.base_scales(over(pipe), known), parts_of(pipe), title, metadata)


def draw(pipe: Any) -> np.ndarray:
    """Pictures before they are rounded to bytes, in [0, 1]."""
    with torch.no_grad():
        return pipe("a photo of a zwx toy", num_inference_steps=4, guidance_scale=3.0, output_type="np",
                    generator=torch.Generator().manual_seed(4), height=64, width=64).images


@cache
def base_picture() -> np.ndarray:
    return draw(pipeline())


def taught(kind: MethodKind, targets: Targets) -> tuple[Any, dict[str, lora.LowRank]]:
    """The base with an adapter that changes its pictures, and what it has learned."""
    loading.import_libraries()
    pipe = pipeline()
    denoiser = over(pipe)
    method = Method(name=kind.value, kind=kind, rank=3, alpha=4.5, targets=targets)
    lora.inject(denoiser, method, ONE.adapter_targets, 1, Dtype.fp32)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn_like(parameter)
            if "magnitude" in name:
                parameter *= 1 + 0.05 * torch.randn_like(parameter)
    pipe.unet.eval(), pipe.text_encoder.eval()
    return pipe, lora.adapter_weights(denoiser)


# Pictures are told apart by this much (of 1): far below a step of a byte (1/255), far above what fp32 rounds away.
SAME = 2e-4


@pytest.mark.parametrize("targets", list(Targets))
@pytest.mark.parametrize("kind", [MethodKind.lora, MethodKind.dora])
def test_both_layouts_draw_the_same_picture_in_diffusers(kind: MethodKind, targets: Targets, tmp_path: Path) -> None:
    ours, known = taught(kind, targets)
    write(tmp_path, ours, known)
    wanted, base = draw(ours), base_picture()
    assert np.abs(wanted - base).max() > 0.05, "the adapter changes nothing"
    assert (tmp_path / ADAPTER).is_file() and "for_diffusers" in ADAPTER  # ComfyUI reads a half of it, silently
    paths = [tmp_path] + ([tmp_path / "webui/toy.safetensors"] if kind is MethodKind.lora else [])
    for path in paths:
        theirs = pipeline()
        theirs.load_lora_weights(path)
        assert np.abs(draw(theirs) - wanted).max() < SAME, path


@pytest.mark.parametrize("kind", [MethodKind.lora, MethodKind.dora])
def test_merged_draws_what_applied_draws(kind: MethodKind) -> None:
    ours, known = taught(kind, Targets.all)
    merged = pipeline()
    lora.merge(over(merged), known)
    assert np.abs(draw(merged) - draw(ours)).max() < SAME


def test_kohya_keys_are_those_of_web_uis(tmp_path: Path) -> None:
    pipe, known = taught(MethodKind.dora, Targets.transformer)
    write(tmp_path, pipe, known, base_model="tiny")
    path = tmp_path / "webui/toy.safetensors"
    tensors = load_file(path)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {key.removeprefix(stem) for key in tensors if key.startswith(stem)} == {
        ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"}
    assert tensors[f"{stem}.alpha"].shape == () and float(tensors[f"{stem}.alpha"]) == 3.0
    assert tensors[f"{stem}.dora_scale"].shape == (tensors[f"{stem}.lora_up.weight"].shape[0], 1)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    weight, low = over(pipe).get_submodule(name).get_base_layer().weight, known[name]
    factor = tensors[f"{stem}.dora_scale"] / weight.norm(dim=1, keepdim=True)  # as ComfyUI and Forge compute
    assert torch.allclose((weight + low.delta) * factor, low.merged(weight), rtol=1e-5, atol=1e-7)
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in tensors
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight" in tensors
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header["__metadata__"] | {"ss_network_dim": "3", "ss_network_alpha": "3.0", "base_model": "tiny"} \
        == header["__metadata__"]
    assert header["__metadata__"] | {"ss_v2": "False", "modelspec.architecture": "stable-diffusion-v1/lora"} \
        == header["__metadata__"]


def test_two_text_encoders_have_prefixes_of_their_own() -> None:
    keys = TWO.kohya_names(["text_encoder.encoder.layers.0.mlp.fc1", "text_encoder_2.text_projection",
                            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"], SimpleNamespace(layers_per_block=2))
    assert set(keys.values()) == {"lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_projection",
                                  "lora_te2_text_model_encoder_layers_0_mlp_fc1"}


@pytest.mark.parametrize(("family", "prediction_type", "architecture", "base", "second", "implementation"), [
    (ONE, "epsilon", "stable-diffusion-v1", "sd_v1", "False", "diffusers"),
    (ONE_V, "epsilon", "stable-diffusion-v2-512", "sd_v2", "True", "diffusers"),
    (ONE_V, "v_prediction", "stable-diffusion-v2-768-v", "sd_v2_v", "True", "diffusers"),
    (TWO, "epsilon", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False", SDXL_LORA)])
def test_a_lora_says_its_base_model_as_web_uis_sort_by(
    family: Any, prediction_type: str, architecture: str, base: str, second: str, implementation: str
) -> None:
    assert family.kohya_metadata(prediction_type) == {
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation, "ss_base_model_version": base, "ss_v2": second,
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon"}


@pytest.mark.parametrize("targets", list(Targets))
def test_diffusers_finds_every_layer_of_sdxl_in_both_layouts(targets: Targets, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    base = make("sdxl", tmp_path / "base")
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    denoiser = over(pipe)
    method = Method(name="lora", kind=MethodKind.lora, rank=2, alpha=2, targets=targets)
    lora.inject(denoiser, method, TWO.adapter_targets, 1, Dtype.fp32)
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn_like(parameter)
    known = {TWO.published_name(name): low for name, low in lora.adapter_weights(denoiser).items()}
    lora_files.write(tmp_path, known, {}, parts_of(pipe), "toy", {})
    for path in (tmp_path / ADAPTER, tmp_path / "webui/toy.safetensors"):
        theirs = StableDiffusionXLPipeline.from_pretrained(base)
        theirs.load_lora_weights(path.parent, weight_name=path.name)
        parts = over(theirs)
        deltas = {TWO.published_name(name): layer.get_delta_weight(next(iter(layer.lora_A)))
                  for name, layer in lora.layers(parts)}
        assert deltas.keys() == known.keys(), path
        assert all(torch.allclose(deltas[name], known[name].delta, atol=1e-5) for name in known), path


def test_a_file_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    pipe, known = taught(MethodKind.dora, Targets.attention)
    write(tmp_path, pipe, known)
    found = lora_files.read(tmp_path / ADAPTER)
    assert len(found) == len(known)
    for name, low in known.items():
        again = found[TWO.published_name(name)]
        assert all(a.equal(b) for a, b in zip(vars(low).values(), vars(again).values(), strict=True))


def test_a_broken_file_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / ADAPTER
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        lora_files.read(path)
