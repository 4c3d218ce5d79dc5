"""An adapter's files: loaded by diffusers they draw what the run's own model draws."""

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dreambooth.config.enums import Dtype, MethodKind, Targets
from dreambooth.config.method import Method
from dreambooth.errors import UserError
from dreambooth.models import families, loading, lora
from dreambooth.serialization import lora_files
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.utils.assets import resolve_asset
from tests.support.tiny_models import make

BASE = resolve_asset("package:tiny-sd")
ONE, TWO = (families.of_architecture(name) for name in ("sd15", "sdxl"))  # text encoders


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
    lora_files.write(tmp_path, known, ONE, "toy", {"base_model": "tiny"})
    wanted, base = draw(ours), base_picture()
    assert np.abs(wanted - base).max() > 0.05, "the adapter changes nothing"
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
    _, known = taught(MethodKind.dora, Targets.transformer)
    lora_files.write(tmp_path, known, ONE, "toy", {"base_model": "tiny"})
    path = tmp_path / "webui/toy.safetensors"
    tensors = load_file(path)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {key.removeprefix(stem) for key in tensors if key.startswith(stem)} == {
        ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"}
    assert tensors[f"{stem}.alpha"].shape == () and float(tensors[f"{stem}.alpha"]) == 3.0
    assert tensors[f"{stem}.dora_scale"].shape == (tensors[f"{stem}.lora_up.weight"].shape[0], 1)
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in tensors
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight" in tensors
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header["__metadata__"] | {"ss_network_dim": "3", "ss_network_alpha": "3.0", "base_model": "tiny"} \
        == header["__metadata__"]


def test_two_text_encoders_have_prefixes_of_their_own() -> None:
    low = lora.LowRank(torch.zeros(1, 2), torch.zeros(2, 1))
    keys = lora_files.kohya_layout({
        "text_encoder.encoder.layers.0.mlp.fc1": low, "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": low}, TWO)
    assert {key.partition(".")[0] for key in keys} == {
        f"lora_{te}_text_model_encoder_layers_0_mlp_fc1" for te in ("te1", "te2")}


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
    lora_files.write(tmp_path, known, TWO, "toy", {"base_model": "tiny"})
    for path in (tmp_path / ADAPTER, tmp_path / "webui/toy.safetensors"):
        theirs = StableDiffusionXLPipeline.from_pretrained(base)
        theirs.load_lora_weights(path.parent, weight_name=path.name)
        parts = over(theirs)
        deltas = {TWO.published_name(name): layer.get_delta_weight(next(iter(layer.lora_A)))
                  for name, layer in lora.layers(parts)}
        assert deltas.keys() == known.keys(), path
        assert all(torch.allclose(deltas[name], known[name].delta, atol=1e-5) for name in known), path


def test_a_file_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    _, known = taught(MethodKind.dora, Targets.attention)
    lora_files.write(tmp_path, known, ONE, "toy", {})
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
