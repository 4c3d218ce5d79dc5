"""The original layout of single files: converted in, out and in again, and what other programs make of them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.errors import UserError
from dreambooth.models import families, lora
from dreambooth.models.families import ldm_keys
from dreambooth.models.families.latent_unet import RESCALABLE_SCHEDULERS
from dreambooth.models.families.ldm_keys import EDM, IGNORED
from dreambooth.serialization import single_file
from dreambooth.serialization.convert import convert
from dreambooth.serialization.detect_format import DetectedModel, open_model_file
from dreambooth.serialization.load_parts import build_parts, load_parts
from dreambooth.utils.assets import resolve_asset
from tests.support.configs import small_recipe
from tests.support.tiny_models import FAMILIES, make
from tests.support.weights import same, weights

LAYOUTS = Path(__file__).parents[1] / "support/layouts"
FAMILY = {name: families.of_architecture(name) for name in FAMILIES}
FOUND = {name: DetectedModel(FAMILY[name], "epsilon", 512, False, "a test") for name in FAMILIES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_out_and_in_again_is_the_same_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make(family, tmp_path / "base", dtype)
    first = convert(str(base), str(tmp_path / "first.safetensors"))
    inside = convert(str(first), str(tmp_path / "inside"), config=str(base))
    second = convert(str(inside), str(tmp_path / "second.safetensors"))
    assert same(weights(inside), weights(base))
    assert same(load_file(second), load_file(first))


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_opens_our_file_with_equal_weights(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    file = convert(str(bases[family]), str(tmp_path / "model.safetensors"))
    pipeline = (StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline).from_single_file(
        str(file), config=str(bases[family]), local_files_only=True)
    ours = load_parts(bases[family])
    for name in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])):
        assert same(getattr(pipeline, name).state_dict(), ours.modules_by_name[name].state_dict()), name


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_predicts_and_at_which_noise_survives_the_file(
    family: str, zero: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    """ComfyUI asks the same two marks; the scheduler that comes out knows zero terminal SNR (PNDM does not)."""
    base = shutil.copytree(bases[family], tmp_path / "base")
    path = base / "scheduler/scheduler_config.json"
    facts = json.loads(path.read_text()) | {"prediction_type": "v_prediction"}
    path.write_text(json.dumps(FAMILY[family].rescale_to_zero_snr(facts) if zero else facts))
    file = convert(str(base), str(tmp_path / "x.safetensors"))
    marks = {name: value.numel() for name, value in load_file(file).items() if "." not in name}
    assert marks == ({"v_pred": 0, "ztsnr": 0} if zero else {"v_pred": 0})
    inside = convert(str(file), str(tmp_path / "inside"), config=str(bases[family]))
    found = json.loads((inside / "scheduler/scheduler_config.json").read_text())
    assert found["prediction_type"] == "v_prediction"
    assert (found.get("rescale_betas_zero_snr", False), found["timestep_spacing"] == "trailing") == (zero, zero)
    assert not zero or found["_class_name"] in RESCALABLE_SCHEDULERS
    assert load_parts(inside).noise_schedule(small_recipe()).alphas_cumprod[-1].eq(0) == zero
    again = load_file(convert(str(inside), str(tmp_path / "again.safetensors")))
    assert same(again, load_file(file))


def test_a_model_that_predicts_the_picture_is_no_such_file(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["sd15"], tmp_path / "base")
    path = base / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(UserError, match=r"this model predicts sample, .*type in=DIR"):
        convert(str(base), str(tmp_path / "x.safetensors"))
    assert not (tmp_path / "x.safetensors").exists()


def test_a_folder_of_an_older_diffusers_is_read(bases: dict[str, Path], tmp_path: Path) -> None:
    """Its VAE called the attention's layers otherwise, its text encoder had a level more and counted positions."""
    old = Path(shutil.copytree(bases["sd15"], tmp_path / "old"))
    path = old / "vae/diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    save_file({re.sub(r"(?<=attentions\.0\.)(to_[qkv]|to_out\.0)", lambda found: names[found[0]], name): value
               for name, value in load_file(path).items()}, path)
    path = old / "text_encoder/model.safetensors"
    save_file({**load_file(path), "text_model.embeddings.position_ids": torch.arange(16)[None]}, path)
    files = [convert(str(folder), str(tmp_path / f"{folder.name}.safetensors")) for folder in (old, bases["sd15"])]
    assert same(*map(load_file, files))


@pytest.mark.parametrize("original", [True, False])
def test_a_vae_of_other_tools_is_read(original: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    """In the original layout with attention as linear layers, in diffusers' with its first names."""
    own = load_file(bases["sd15"] / "vae/diffusion_pytorch_model.safetensors")
    if original:
        whole = load_file(convert(str(bases["sd15"]), str(tmp_path / "whole.safetensors")))
        inside = {name.removeprefix(ldm_keys.VAE): value for name, value in whole.items()
                  if name.startswith(ldm_keys.VAE)}
        other = {name: value[:, :, 0, 0].clone() if ".attn_1." in name and value.dim() == 4 else value
                 for name, value in inside.items()}
        assert [value for name, value in other.items() if name.endswith("attn_1.q.weight") and value.dim() == 2]
    else:
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        other = {re.sub(r"(?<=attentions\.0\.)(to_[qkv]|to_out\.0)", lambda found: names[found[0]], name): value
                 for name, value in own.items()}
        assert other.keys() != own.keys()
    save_file(other, tmp_path / "vae.safetensors")
    vae = build_parts(bases["sd15"]).vae
    single_file.fill_vae(vae, FAMILY["sd15"], open_model_file(tmp_path / "vae.safetensors"))
    assert same(vae.state_dict(), own)


def test_text_encoders_names_without_their_level_are_read(bases: dict[str, Path], tmp_path: Path) -> None:
    whole = load_file(convert(str(bases["sd15"]), str(tmp_path / "whole.safetensors")))
    old = {name.replace(".transformer.text_model.", ".transformer."): value for name, value in whole.items()}
    assert old.keys() != whole.keys()
    save_file(old, tmp_path / "old.safetensors")
    folder = convert(str(tmp_path / "old.safetensors"), str(tmp_path / "out"), config=str(bases["sd15"]))
    assert same(weights(folder), weights(bases["sd15"]))


def published(name: str) -> dict[str, tuple[int, ...]]:
    lines = (LAYOUTS / f"{name}.txt").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    return {key: tuple(map(int, shape)) for key, *shape in rows}


def full_size(name: str) -> tuple[single_file.Components, dict[str, tuple[int, ...]]]:
    """Parts of the published size without memory, and the keys and shapes of their file."""
    parts = build_parts(Path(resolve_asset("package:architectures")) / name, FOUND[name])
    shapes = {part: {key: tuple(value.shape) for key, value in module.state_dict().items()}
              for part, module in parts.modules_by_name.items()}
    return parts, {entry.key: entry.shape([shapes[entry.part][key] for key in entry.names])
                   for entry in single_file.all_entries(parts)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_and_shape_is_that_of_the_published_file(name: str) -> None:
    parts, ours = full_size(name)
    last = r"cond_stage_model\.model\.transformer\.resblocks\.23\..*"  # 2.x: a layer that it does not look at
    theirs = {key: shape for key, shape in published(name).items()  # sd-mecha's list is of CosXL too
              if not IGNORED.fullmatch(key) and not re.fullmatch(last, key) and not key.startswith(EDM)}
    assert ours == theirs
    assert len(ours) > 1000
    if name == "sdxl":  # web UIs and kohya's trainer find a layer of an adapter by the published name
        unet = [key.removesuffix(".weight") for key, shape in ours.items()
                if key.startswith("model.diffusion_model.") and key.endswith(".weight") and len(shape) > 1]
        layers = [f"unet.{layer}" for layer in lora.target_layers(parts.denoiser, re.compile(".*"))]
        assert set(FAMILY[name].kohya_names(layers, parts.denoiser.config).values()) == {
            key.replace("model.diffusion_model.", "lora_unet_").replace(".", "_") for key in unet}


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_expects_the_same_of_a_full_size_unet_and_vae(name: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    parts, ours = full_size(name)
    file = {key: torch.empty(shape, device="meta") for key, shape in ours.items()}
    for part, change in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
        module = parts.modules_by_name[part]
        converted = {key: value.shape for key, value in change(dict(file), config=dict(module.config)).items()}
        theirs = {key: value.shape for key, value in module.state_dict().items()}
        assert converted.keys() == theirs.keys()
        assert all(converted[key].numel() == theirs[key].numel() for key in theirs)  # made linear later


@pytest.mark.slow
def test_published_sizes_are_those_of_the_architectures() -> None:
    """Weights, as the models' cards and papers count them."""
    counts = {name: {part: sum(p.numel() for p in full_size(name)[0].modules_by_name[part].parameters())
                     for part in ("unet", "text_encoder")} for name in FAMILIES}
    assert counts["sd15"] == {"unet": 859_520_964, "text_encoder": 123_060_480}
    assert counts["sd21"] == {"unet": 865_910_724, "text_encoder": 340_387_840}
    assert counts["sdxl"]["unet"] == 2_567_463_684


def test_another_architecture_and_damage_are_said(bases: dict[str, Path], tmp_path: Path) -> None:
    file = convert(str(bases["sd15"]), str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="another architecture; type config=DIR"):
        convert(str(file), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        open_model_file(file)
    with pytest.raises(UserError, match="one of in and out"):
        convert("a.ckpt", "b.safetensors")
