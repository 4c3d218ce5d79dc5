"""Files of LoKr, LoHa and chosen layers: other programs compute the weights of the merged model from them.

Checked once against the programs' own code: ComfyUI of October 2025, LyCORIS 3.4 and AUTOMATIC1111 compute the merged
weights of the tiny base from these files exactly. Here their formulas are written again.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dreambooth.config.enums import Dtype, MethodKind, Targets
from dreambooth.config.method import Method
from dreambooth.errors import UserError
from dreambooth.inference.attached_lokr import AttachedLoKr
from dreambooth.inference.loras import find_loras
from dreambooth.models import families, lora
from dreambooth.models.adapters.factors import LoKr
from dreambooth.models.components import Components
from dreambooth.serialization import lora_files
from dreambooth.serialization.export_layout import ADAPTER

SD, Z = families.of_architecture("sd15"), families.of_architecture("z_image")
KINDS = [MethodKind.lora, MethodKind.lokr, MethodKind.loha]


def unet() -> nn.Module:
    """A model with names as in a UNet."""
    torch.manual_seed(0)
    model = nn.Module()
    attention = nn.ModuleDict({"to_q": nn.Linear(24, 32), "to_k": nn.Linear(40, 32)})
    model.unet = nn.ModuleDict({"mid_block": nn.ModuleDict({"attn2": attention}), "conv_in": nn.Conv2d(4, 24, 3)})
    return model


def transformer() -> nn.Module:
    """A model with names as in Z-Image, where query, key and value are one layer in ComfyUI."""
    torch.manual_seed(0)
    model = nn.Module()
    attention = {name: nn.Linear(16, 16) for name in ("to_q", "to_k", "to_v")}
    block = nn.ModuleDict({"attention": nn.ModuleDict(attention), "feed_forward": nn.ModuleDict(
        {"w1": nn.Linear(16, 24)})})
    model.transformer = nn.ModuleDict({"layers": nn.ModuleList([block])})
    return model


def write(folder: Path, model: nn.Module, family: Any, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write the files of an adapter that has learned something. Return the weights of base and merged model."""
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    lora.inject(model, Method(**{"name": "x", "rank": 2, "alpha": 3.0, "targets": Targets.all} | settings),
                family.adapter_targets, 1, Dtype.fp32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    known = lora.adapter_weights(model)
    parts = Components(family, SimpleNamespace(config=SimpleNamespace()), [], None, [], {})
    lora_files.write(folder, known, {}, parts, "toy", {"method": settings["kind"].value})
    return base, {f"{name}.weight": adapter.merged(base[f"{name}.weight"]) for name, adapter in known.items()}


def change(file: dict[str, Tensor], key: str, used: set[str]) -> Tensor:
    """The change of a weight, as a matrix, as ComfyUI and LyCORIS compute it from the tensors of one layer."""
    layer = {name.removeprefix(f"{key}."): tensor for name, tensor in file.items() if name.startswith(f"{key}.")}
    used |= {f"{key}.{name}" for name in layer}
    alpha = float(layer["alpha"])
    if "lora_up.weight" in layer:
        return alpha / len(layer["lora_down.weight"]) * layer["lora_up.weight"].flatten(1) @ layer[
            "lora_down.weight"].flatten(1)
    if "hada_w1_a" in layer:
        a1, b1, a2, b2 = (layer[f"hada_w{n}_{side}"] for n in (1, 2) for side in "ab")
        return (a1 @ b1) * (a2 @ b2) * alpha / b1.shape[0]
    rank, factors = None, []
    for name in ("lokr_w1", "lokr_w2"):
        if name in layer:
            factors.append(layer[name])
        else:
            rank = layer[f"{name}_b"].shape[0]
            factors.append(layer[f"{name}_a"] @ layer[f"{name}_b"])
    left, right = factors
    assert left.shape[0] <= right.shape[0] and left.shape[1] <= right.shape[1], "LyCORIS expects the smaller one first"
    return torch.kron(left, right.flatten(1)) * (alpha / rank if rank else 1.0)  # two whole matrices have no scale


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"rank_pattern": {"to_k": 1}}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_other_programs_compute_the_merged_weights(kind: MethodKind, more: dict[str, Any], tmp_path: Path) -> None:
    base, merged = write(tmp_path, unet(), SD, kind=kind, **more)
    path, used = tmp_path / "webui/toy.safetensors", set[str]()
    file = load_file(path)
    for name, weight in merged.items():
        key = "lora_unet_" + name.removeprefix("unet.").removesuffix(".weight").replace(".", "_")
        found = base[name] + change(file, key, used).reshape(weight.shape)
        assert torch.allclose(found, weight, atol=1e-5), name
    assert used == file.keys() and len(merged) == 3
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_dim"] == ("2" if "rank_pattern" not in more else "Dynamic")
    if kind is not MethodKind.lora:
        assert json.loads(metadata["ss_network_args"]) == {"algo": kind.value}
        assert metadata["ss_network_module"] == "lycoris.kohya"
        with pytest.raises(UserError, match=rf"in kohya's layout.*: type lora=DIR, the folder with its {ADAPTER}"):
            find_loras([str(path)], [1.0])


@pytest.mark.parametrize("chosen", [None, ["to_k", "w1"]], ids=["all", "some"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_comfyui_joins_are_joined_or_named_as_slices(kind: MethodKind, chosen: list[str] | None,
                                                               tmp_path: Path) -> None:
    base, merged = write(tmp_path, transformer(), Z, kind=kind, target_modules=chosen)
    file, used = load_file(tmp_path / "webui/toy.safetensors"), set[str]()
    names = [f"transformer.layers.0.attention.to_{letter}.weight" for letter in "qkv"]
    if kind is MethodKind.lokr or chosen:
        for name in names:  # ComfyUI knows each as a slice of the joined layer
            key = "lycoris_" + name.removeprefix("transformer.").removesuffix(".weight").replace(".", "_")
            if name in merged:
                assert torch.allclose(base[name] + change(file, key, used), merged[name], atol=1e-5)
    else:
        joined = change(file, "lora_unet_layers_0_attention_qkv", used)
        assert torch.allclose(torch.cat([base[name] for name in names]) + joined,
                              torch.cat([merged[name] for name in names]), atol=1e-5)
    last = "transformer.layers.0.feed_forward.w1.weight"
    alone = change(file, "lora_unet_layers_0_feed_forward_w1", used)
    assert torch.allclose(base[last] + alone, merged[last], atol=1e-5)
    assert used == file.keys() and len(merged) == (2 if chosen else 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_for_diffusers_has_the_same_changes(kind: MethodKind, tmp_path: Path) -> None:
    base, merged = write(tmp_path, unet(), SD, kind=kind)
    read = lora_files.read(tmp_path / ADAPTER)
    assert {f"{name}.weight" for name in read} == merged.keys()
    for name, adapter in read.items():
        weight = base[f"{name}.weight"]
        assert torch.allclose(adapter.merged(weight), merged[f"{name}.weight"], atol=1e-5)
    keys = load_file(tmp_path / ADAPTER).keys()
    assert all((".lokr_w" if kind is MethodKind.lokr else ".lora_") in key for key in keys)


@torch.no_grad()
def test_hooks_add_a_lokr_to_a_pipeline_and_go(tmp_path: Path) -> None:
    base, merged = write(tmp_path, unet(), SD, kind=MethodKind.lokr, decompose_factor=4)
    model = unet()
    pipeline = SimpleNamespace(unet=model.unet)
    lokr = AttachedLoKr(pipeline, SD, {name: adapter for name, adapter in lora_files.read(tmp_path / ADAPTER).items()
                                       if isinstance(adapter, LoKr)})
    values, layer = torch.randn(2, 24), model.unet["mid_block"]["attn2"]["to_q"]
    name = "unet.mid_block.attn2.to_q.weight"
    for scale in (0.0, 1.0, 0.5):
        lokr.scale = scale
        weight = base[name] + scale * (merged[name] - base[name])
        assert torch.allclose(layer(values), nn.functional.linear(values, weight, layer.bias), atol=1e-5)
    lokr.detach()
    assert layer(values).equal(nn.functional.linear(values, base[name], layer.bias))
    with pytest.raises(ValueError, match="no layer unet"):
        AttachedLoKr(pipeline, SD, {"unet.other": LoKr((torch.eye(2),), (torch.eye(2),))})
    with pytest.raises(ValueError, match="another size"):
        AttachedLoKr(pipeline, SD, {"unet.conv_in": LoKr((torch.eye(2),), (torch.eye(2),))})
