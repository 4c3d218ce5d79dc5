"""One file in the original layout: in, out and in again; what other programs make of it; what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreambooth.config.compose import load
from dreambooth.config.recipe import resolve
from dreambooth.config.schema import Config, Model
from dreambooth.errors import UserError
from dreambooth.models import families
from dreambooth.models.families import ldm_keys
from dreambooth.models.families.latent_unet import RESCALABLE_SCHEDULERS
from dreambooth.models.families.ldm_keys import EDM, IGNORED
from dreambooth.models.vae import planned_configuration
from dreambooth.run import execute
from dreambooth.serialization import single_file, single_file_sources
from dreambooth.serialization.convert import convert
from dreambooth.serialization.detect_format import DetectedModel, detect, open_model_file
from dreambooth.serialization.load_parts import build_parts, load_parts
from dreambooth.train import convert_single_files
from dreambooth.utils import atomic_files
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.hardware import detect_machine
from dreambooth.utils.signals import StopRequest
from tests.support.configs import compose_config, small_recipe
from tests.support.faults import FAST, call, train
from tests.support.tiny_models import FAMILIES, make

LAYOUTS = Path(__file__).parents[1] / "support/layouts"
FAMILY = {name: families.of_architecture(name) for name in FAMILIES}
FOUND = {name: DetectedModel(FAMILY[name], "epsilon", 512, False, "a test") for name in FAMILIES}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make(family, tmp_path_factory.mktemp("bases") / family) for family in FAMILIES}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path.parent.name}.{name}": value for path in sorted(folder.rglob("*.safetensors"))
            for name, value in load_file(path).items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype is theirs[name].dtype and ours[name].equal(theirs[name]) for name in theirs)


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
    assert load_parts(inside).noise_schedule().alphas_cumprod[-1].eq(0) == zero
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
    _, ours = full_size(name)
    last = r"cond_stage_model\.model\.transformer\.resblocks\.23\..*"  # 2.x: a layer that it does not look at
    theirs = {key: shape for key, shape in published(name).items()  # sd-mecha's list is of CosXL too
              if not IGNORED.fullmatch(key) and not re.fullmatch(last, key) and not key.startswith(EDM)}
    assert ours == theirs
    assert len(ours) > 1000


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


def test_published_sizes_are_those_of_the_architectures() -> None:
    """Weights, as the models' cards and papers count them."""
    counts = {name: {part: sum(p.numel() for p in full_size(name)[0].modules_by_name[part].parameters())
                     for part in ("unet", "text_encoder")} for name in FAMILIES}
    assert counts["sd15"] == {"unet": 859_520_964, "text_encoder": 123_060_480}
    assert counts["sd21"] == {"unet": 865_910_724, "text_encoder": 340_387_840}
    assert counts["sdxl"]["unet"] == 2_567_463_684


# -- what a file is -------------------------------------------------------------------------------------------------

def checkpoint(base: Path, path: Path, **more: object) -> Path:
    """A .ckpt as training tools leave it: no metadata, no marks."""
    file = convert(str(base), str(path.with_suffix(".safetensors")))
    torch.save({"state_dict": {name: value for name, value in load_file(file).items() if "." in name}, **more}, path)
    return path


@pytest.mark.parametrize(("stem", "more", "kind", "side"), [
    ("768-v-ema", {}, "v_prediction", 768), ("512-base-ema", {}, "epsilon", 512),
    ("mine", {"global_step": 875000}, "epsilon", 512), ("mine", {"global_step": 110000}, "v_prediction", 768),
    ("mine", {}, "v_prediction", 768)])
def test_a_checkpoint_of_2x_is_known_by_steps_name_or_custom(
    stem: str, more: dict[str, object], kind: str, side: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    path = checkpoint(bases["sd21"], tmp_path / f"{stem}.ckpt", **more)
    found = detect(open_model_file(path))
    assert (found.family, found.prediction_type, found.resolution) == (FAMILY["sd21"], kind, side)
    folder = convert(str(path), str(tmp_path / "out"), config=str(bases["sd21"]))
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["prediction_type"] == kind
    assert json.loads((folder / "unet/config.json").read_text())["sample_size"] == side // 2  # of this tiny VAE
    assert same(weights(folder), weights(bases["sd21"]))


@pytest.mark.parametrize(("stem", "typed", "kind", "side", "sized"), [
    ("mine", {"prediction_type": "epsilon"}, "epsilon", 512, "what it predicts"),
    ("768-mine", {"prediction_type": "epsilon"}, "epsilon", 768, "its name"),
    ("mine", {"prediction_type": "epsilon", "resolution": 640}, "epsilon", 640, "what you typed"),
    ("mine", {"resolution": 512}, "v_prediction", 512, "what you typed")])
def test_what_was_typed_overrules_and_the_rest_follows(
    stem: str, typed: dict[str, object], kind: str, side: int, sized: str, bases: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(bases["sd21"], tmp_path / f"{stem}.ckpt")
    folder = convert(str(path), str(tmp_path / "out"), config=str(bases["sd21"]), **typed)  # type: ignore[arg-type]
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["prediction_type"] == kind
    assert json.loads((folder / "unet/config.json").read_text())["sample_size"] == side // 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"{side} px, by {sized}" in said
    assert (f"{kind}, by what you typed" in said) == ("prediction_type" in typed)


def finished(folder: Path, base: Path, **settings: str) -> Path:
    """What a finished run leaves, as far as a conversion looks."""
    shutil.copytree(base, folder / "model")
    (folder / "run.json").write_text(json.dumps({"settings": {
        "name": "toy", **{key.replace("__", "."): value for key, value in settings.items()}}}))
    return folder


def test_a_run_says_its_prompt_and_its_pixels(bases: dict[str, Path], tmp_path: Path) -> None:
    one = finished(tmp_path / "one", bases["sd15"], dataset__instance_prompt="a zwx toy", dataset__concepts="[]",
                   model__resolution="640")
    concepts = json.dumps([{"instance_prompt": prompt} for prompt in ("a zwx toy", "a qvy cup")])
    two = finished(tmp_path / "two", bases["sd15"], dataset__instance_prompt="null", dataset__concepts=concepts)
    none = finished(tmp_path / "none", bases["sd15"], dataset__instance_prompt="null")
    facts = {run.name: open_model_file(convert(str(run), str(tmp_path / f"{run.name}.safetensors"))).metadata
             for run in (one, two, none)}
    assert [found.get("modelspec.trigger_phrase") for found in facts.values()] == ["a zwx toy", "a zwx toy", None]
    assert [found["modelspec.resolution"] for found in facts.values()] == ["640x640", "16x16", "16x16"]
    assert detect(open_model_file(tmp_path / "one.safetensors")).resolution == 640


def test_the_file_says_itself_what_it_is(bases: dict[str, Path], tmp_path: Path) -> None:
    file = convert(str(bases["sd21"]), str(tmp_path / "512.safetensors"), title="A toy", dtype="fp16")
    with safe_open(file, "pt") as handle:
        facts = handle.metadata()
    assert facts["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert (facts["modelspec.prediction_type"], facts["modelspec.title"]) == ("v", "A toy")
    assert facts["modelspec.resolution"] == "16x16"
    assert detect(open_model_file(file)).prediction_type == "v_prediction"  # more than its name
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}


def test_the_vae_stays_out_if_asked_and_another_comes_in(bases: dict[str, Path], tmp_path: Path) -> None:
    without = load_file(convert(str(bases["sd15"]), str(tmp_path / "a.safetensors"), with_vae=False))
    assert not [name for name in without if name.startswith("first_stage_model.")]
    other = tmp_path / "vae.safetensors"
    own = load_file(bases["sd15"] / "vae/diffusion_pytorch_model.safetensors")
    save_file({name: value + 1 for name, value in own.items()}, other)
    whole = convert(str(bases["sd15"]), str(tmp_path / "b.safetensors"), vae=str(other))
    folder = convert(str(whole), str(tmp_path / "c"), config=str(bases["sd15"]))
    assert same(load_file(folder / "vae/diffusion_pytorch_model.safetensors"), load_file(other))


# -- what is refused ------------------------------------------------------------------------------------------------

class Malice:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.witness),)


def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path) -> None:
    path, witness = tmp_path / "evil.ckpt", tmp_path / "witness"
    weight = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}
    torch.save({"state_dict": weight, "more": Malice(witness)}, path)
    with pytest.raises(UserError, match="nothing of it was run: type a"):
        open_model_file(path)
    assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists(), "it was harmless: the test shows nothing"


def test_a_damaged_checkpoint_is_not_called_malicious(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    for content in (b"", b"PK\x03\x04 and no more", b"<html>not found</html>", b"\x80\x02"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            open_model_file(path)


@pytest.mark.parametrize(("names", "words"), [
    (["lora_unet_down.weight"], "a LoRA"), (["a"], "something else"),
    (["model.diffusion_model.input_blocks.0.0.weight"], "no text encoder")])
def test_what_is_no_model_is_said(names: list[str], words: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=words):
        detect(open_model_file(tmp_path / "x.safetensors"))


def test_a_model_of_edms_noise_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    file = convert(str(bases["sdxl"]), str(tmp_path / "x.safetensors"))
    save_file({**load_file(file), "edm_vpred.sigma_max": torch.ones(1)}, tmp_path / "cos.safetensors")
    with pytest.raises(UserError, match=r"EDM, .*type another file"):
        convert(str(tmp_path / "cos.safetensors"), str(tmp_path / "out"), config=str(bases["sdxl"]))


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


@pytest.mark.parametrize("way", ["in", "out"])
def test_what_is_there_is_never_replaced(
    way: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    file = convert(str(bases["sd15"]), str(models / "x.safetensors"))
    (models / "mine.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in models.iterdir()}
    monkeypatch.chdir(models)
    source, outs = (file, [models, ".", "mine.txt"]) if way == "in" else (bases["sd15"], [file])
    for out in outs:
        with pytest.raises(UserError, match=r"holds other things: type out=DIR|is there already: type out="):
            convert(str(source), str(out), config=str(bases["sd15"]) if way == "in" else None)
    assert {path.name: path.read_bytes() for path in models.iterdir()} == before


def test_an_empty_folder_is_filled_unless_somebody_was_faster(bases: dict[str, Path], tmp_path: Path) -> None:
    file = convert(str(bases["sd15"]), str(tmp_path / "x.safetensors"))
    (tmp_path / "out").mkdir()
    folder = convert(str(file), str(tmp_path / "out"), config=str(bases["sd15"]))
    assert (folder / "model_index.json").is_file()
    with pytest.raises(OSError, match="not empty"), atomic_files.write_folder(folder, fresh=True) as aside:
        (aside / "x").touch()
    assert (folder / "model_index.json").is_file()


@pytest.mark.parametrize(("source", "out"), [("nothing.safetensors", "s3://b/x"), ("nothing", "s3://b/x.safetensors")])
def test_a_place_in_s3_is_refused_before_anything_is_read(source: str, out: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is in S3, .*type out=DIR"):
        convert(source, out)
    assert not Path("s3:").exists()


@pytest.mark.parametrize(("source", "out", "typed", "words"), [
    ("DIR", "x.safetensors", {"prediction_type": "epsilon", "resolution": 512}, "prediction_type and resolution would"),
    ("DIR", "x.safetensors", {"config": "DIR"}, "config would change nothing where a folder becomes a file"),
    ("x.ckpt", "DIR", {"with_vae": False}, "with_vae would change nothing where a file becomes a folder: leave"),
    ("x.ckpt", "DIR", {"title": "A toy"}, "title would"),
    ("DIR", "x.safetensors", {"with_vae": False, "vae": "y.ckpt"}, "with_vae=false leaves out what vae names")])
def test_a_key_that_would_do_nothing_is_refused(
    source: str, out: str, typed: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        convert(source, str(tmp_path / out), **typed)  # type: ignore[arg-type]


def test_an_adapter_is_no_model_yet(tmp_path: Path) -> None:
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/pytorch_lora_weights.safetensors").touch()
    with pytest.raises(UserError, match=r"holds an adapter .*repeat the command of its run with method\.merge=true"):
        convert(str(tmp_path / "run"), str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_note_of_git_lfs_is_no_weights(part: str, bases: dict[str, Path], tmp_path: Path) -> None:
    from dreambooth.models import loading

    base = shutil.copytree(bases["sd15"], tmp_path / "base")
    [weights_file] = (base / part).glob("*.safetensors")
    weights_file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3438167540\n")
    with pytest.raises(UserError, match=r"damaged, or one of Git LFS's notes .*type git lfs pull"):
        convert(str(base), str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match="could not be loaded"):
        loading.load(small_recipe(model__source=str(base)), torch.device("cpu"))


# -- a run ----------------------------------------------------------------------------------------------------------

def trained(root: Path, source: str) -> dict[str, torch.Tensor]:
    """The weights of two steps, in this process. Without class images: their seeds know the base's name."""
    asked = [*FAST, f"run_root={root}", f"model.source={source}", "dataset.allow_drawings=true",
             "train.max_train_steps=2", "prior.with_prior_preservation=false", "sample.every=null"]
    execute(resolve(convert_single_files(load(compose_config(*asked))), root / "run", detect_machine()), StopRequest())
    return weights(root / "run/model")


def test_trained_from_a_file_is_trained_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = resolve_asset("package:tiny-sd")
    monkeypatch.setattr(type(FAMILY["sd15"]), "architecture", tiny)
    file = convert(tiny, str(tmp_path / "tiny.safetensors"))
    ours, theirs = trained(tmp_path / "file", str(file)), trained(tmp_path / "folder", "package:tiny-sd")
    assert same(ours, theirs)
    base = weights(Path(tiny))
    assert sum(not ours[name].equal(base[name].float()) for name in base if name in ours) > 100, "nothing was trained"


def test_the_door_takes_a_file_and_a_run_of_unknown_shapes_says_what_to_type(tmp_path: Path) -> None:
    tiny = resolve_asset("package:tiny-sd")
    assert call("convert", [f"in={tiny}", f"out={tmp_path / 'tiny.safetensors'}", "dtype=fp32"]) == 0
    assert call("convert", [f"in={tmp_path / 'tiny.safetensors'}", f"out={tmp_path / 'tiny'}", f"config={tiny}"]) == 0
    assert (tmp_path / "tiny/model_index.json").is_file()
    log = tmp_path / "log.txt"
    assert train(tmp_path / "runs", f"model.source={tmp_path / 'tiny.safetensors'}", "dataset.allow_drawings=true",
                 log=log) == 1
    assert "python -m dreambooth.convert" in log.read_text()


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_a_file_as_source_becomes_a_folder_once(
    family: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(FAMILY[family]), "architecture", str(bases[family]))
    file = convert(str(bases[family]), str(tmp_path / "a model.safetensors"))
    vae = tmp_path / "vae-fp16.ckpt"
    torch.save({"state_dict": load_file(bases[family] / "vae/diffusion_pytorch_model.safetensors")}, vae)
    config = Config(run_root=str(tmp_path / "runs"), model=Model(family, str(file), vae=str(vae)))
    found = single_file_sources.as_folders(config).model
    assert same(weights(Path(found.source)), weights(bases[family]))
    assert same(weights(Path(found.vae or "")), {name: value for name, value in weights(bases[family]).items()
                                                 if name.startswith("vae.")})
    before = Path(found.source, "model_index.json").stat().st_mtime_ns
    assert single_file_sources.as_folders(config).model.source == found.source
    assert Path(found.source, "model_index.json").stat().st_mtime_ns == before
    Path(found.source, "model_index.json").unlink()
    single_file_sources.as_folders(config)
    assert same(weights(Path(found.source)), weights(bases[family]))


def vae_folder(base: Path, file: Path, root: Path) -> tuple[Path, dict[str, object]]:
    config = Config(run_root=str(root), model=Model("sdxl", str(base), vae=str(file)))
    found = single_file_sources.as_folders(config).model
    return Path(found.vae or ""), json.loads(Path(found.vae or "", "vae/config.json").read_text())


@pytest.mark.parametrize(("stem", "whole"), [
    ("sdxl_vae.fp16", True), ("prefixed-fp16", True), ("sdxl-vae-fp16-fix", False), ("sdxl_VAE_FP16fix", False),
    ("sdxl_vae_fp16_fix", False)])
def test_only_the_fix_computes_in_half(stem: str, whole: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / f"{stem}.safetensors"
    shutil.copy(bases["sdxl"] / "vae/diffusion_pytorch_model.safetensors", file)
    folder, facts = vae_folder(bases["sdxl"], file, tmp_path)
    assert FAMILY["sdxl"].half_overflows(facts) == whole
    for vae in (file, folder):
        assert planned_configuration(str(vae), FAMILY["sdxl"], {})["force_upcast"] == whole


def test_a_vae_file_has_the_facts_of_the_base_beside_it(bases: dict[str, Path], tmp_path: Path) -> None:
    file = Path(shutil.copy(bases["sdxl"] / "vae/diffusion_pytorch_model.safetensors", tmp_path / "vae.safetensors"))
    other = shutil.copytree(bases["sdxl"], tmp_path / "other")
    config = other / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    factors = [vae_folder(base, file, tmp_path)[1]["scaling_factor"] for base in (bases["sdxl"], other)]
    assert factors == [0.13025, 0.5]
    assert vae_folder(bases["sdxl"], file, tmp_path)[0] == vae_folder(bases["sdxl"], file, tmp_path)[0]


def test_files_alike_at_both_ends_are_told_apart(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_files, "END_BYTES", 64)
    monkeypatch.setattr(type(FAMILY["sd15"]), "architecture", str(bases["sd15"]))
    file, found = convert(str(bases["sd15"]), str(tmp_path / "merge.safetensors")), []
    tensors = load_file(file)
    for value in (0.0, 1.0):
        tensors["model.diffusion_model.out.0.weight"].fill_(value)
        save_file(tensors, file)
        config = Config(run_root=str(tmp_path), model=Model("sd15", str(file)))
        source = single_file_sources.as_folders(config).model.source
        found.append(weights(Path(source))["unet.conv_norm_out.weight"].max().item())
    assert found == [0.0, 1.0]


def test_clips_tokenizer_ships_with_the_package() -> None:
    from dreambooth.models.families import clip_tokenizer

    tokenizer = clip_tokenizer.build()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49408
    assert clip_tokenizer.build("!")("a", padding="max_length").input_ids == [49406, 320, 49407, *[0] * 74]


def test_families_are_imported_without_torch() -> None:
    """The container asks them about hub ids in the small process before a run."""
    code = "import sys, dreambooth.models.families; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
