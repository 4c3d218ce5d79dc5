"""Tiny models of the architecture of each family through the real door: they train, resume and sample as sd15 does."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreambooth.models import families
from dreambooth.models.loading import load, trained_model
from dreambooth.planner.rehearsal import predict, rehearse
from dreambooth.planner.skeleton_models import count_trained_weights
from dreambooth.serialization.export_layout import ADAPTER
from tests.support.configs import small_recipe
from tests.support.faults import call, train
from tests.support.runs import assert_same, the_run
from tests.support.tiny_models import SECOND, make

NEW = ("sd21", "sdxl")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make(family, tmp_path_factory.mktemp("bases") / family) for family in NEW}


def words(family: str, folder: Path, *more: str) -> list[str]:
    return [f"model={family}", f"model.source={folder}", "model.offline=true", "model.resolution=16",
            "dataset.allow_drawings=true", "train.max_train_steps=4", "train.train_text_encoder=true",
            "train.learning_rate=1e-3", "name=demo-x", *more]


@pytest.mark.parametrize("family", [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "sdxl")) for name in NEW])  # SDXL differs most
def test_it_trains_resumes_bit_for_bit_and_samples(family: str, base: dict[str, Path], tmp_path: Path) -> None:
    ask = words(family, base[family])
    assert train(tmp_path / "straight", *ask) == 0
    assert train(tmp_path / "killed", *ask, fault="checkpoint_rename") == -9
    assert train(tmp_path / "killed", *ask) == 0
    straight = the_run(tmp_path / "straight")
    assert_same(the_run(tmp_path / "killed"), straight)
    assert len(list((straight / "samples/step-000004").glob("prompt-*.png"))) == 3
    parts = ["unet", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])]
    for part in parts:
        ours, theirs = (load_file(next((folder / part).glob("*.safetensors"))) for folder in (
            straight / "model", base[family]))
        moved = [name for name in theirs if not ours[name].equal(theirs[name])]
        assert len(moved) > 0.6 * len(theirs), f"{part} was left out of training"
    kept = json.loads((straight / "model/scheduler/scheduler_config.json").read_text())
    assert kept["prediction_type"] == ("v_prediction" if family == "sd21" else "epsilon")
    ask = [f"run={straight}", "prompt=a toy", "num_images=1", "num_inference_steps=2"]
    assert call("generate", ask) == 0


@pytest.mark.slow
def test_a_frozen_text_encoder_says_the_same_cached_or_not(base: dict[str, Path], tmp_path: Path) -> None:
    ask = words("sdxl", base["sdxl"], "train.train_text_encoder=false")
    found = []
    for cached in ("true", "false"):
        assert train(tmp_path / cached, *ask, f"memory.cache_text={cached}", "memory=low") == 0
        found.append(load_file(the_run(tmp_path / cached) / "model/unet/diffusion_pytorch_model.safetensors"))
    assert all(found[0][name].equal(found[1][name]) for name in found[1])


def test_sdxls_unet_is_told_what_its_pipeline_tells_it(base: dict[str, Path]) -> None:
    """Prompt states, pooled state and time ids of a training step are those of StableDiffusionXLPipeline."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(base["sdxl"])
    encoders, seen = [pipeline.text_encoder, pipeline.text_encoder_2], {}
    family = families.of_architecture("sdxl")
    plain = pipeline.unet.forward

    def look(*args: object, **kwargs: object) -> object:
        seen.update(kwargs, text=kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None))
        return plain(*args, **kwargs)

    pipeline.unet.forward = look
    with torch.no_grad():
        pipeline("a photo of a toy", num_inference_steps=1, height=16, width=16, guidance_scale=1.0,
                 output_type="latent")
        theirs = dict(seen)
        text = family.text(encoders, family.tokens([pipeline.tokenizer] * 2, "a photo of a toy"))
        family.predict(pipeline.unet, torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long), text,
                       pipeline.vae_scale_factor)
    assert text.shape == (1, 17, 32 + SECOND)
    assert seen["text"].equal(theirs["text"])
    for name in ("text_embeds", "time_ids"):
        assert seen["added_cond_kwargs"][name].equal(theirs["added_cond_kwargs"][name]), name


def test_sdxls_unet_gets_the_original_size_and_crop_of_each_photo(base: dict[str, Path]) -> None:
    """Podell et al. 2023, section 2.2. The numbers of an uncropped photo of the training size are as before."""
    recipe = small_recipe(model__source=str(base["sdxl"]), model__name="sdxl", model__resolution=16)
    parts, seen = load(recipe, torch.device("cpu")), []
    plain = parts.denoiser.forward
    parts.denoiser.forward = lambda *args, **kwargs: (
        seen.append(kwargs["added_cond_kwargs"]["time_ids"]), plain(*args, **kwargs))[1]
    model, text = trained_model(parts, recipe), parts.frozen_text("a toy")
    inputs = torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.long), text
    side = 8 * parts.vae_scale
    uncropped = torch.tensor([[side, side, 0, 0, side, side]] * 2, dtype=torch.float32)
    cropped = torch.tensor([[3000, 4000, 0, 2, side, side], [90, 90, 0, 0, side, side]], dtype=torch.float32)
    with torch.no_grad():
        pictures = [model(*inputs), model(*inputs, uncropped), model(*inputs, cropped)]
    assert seen[0].equal(uncropped) and seen[0].dtype is seen[1].dtype and seen[2].equal(cropped)
    assert pictures[0].equal(pictures[1]) and not pictures[0].equal(pictures[2])


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("family", NEW)
def test_the_planner_records_the_very_step_of_a_family(family: str, text: bool, base: dict[str, Path]) -> None:
    """The same storages and the same work on tensors without data and on real ones; these VAEs have attention."""
    ask = small_recipe(model__source=str(base[family]), model__name=family, model__resolution=16,
                train__train_text_encoder=text, memory__gradient_checkpointing=True)
    fake, real = predict(ask), rehearse(ask)
    assert fake.trace.events == real.trace.events
    assert fake.trace.category == real.trace.category
    assert fake.trace.flops == real.trace.flops
    live = trained_model(load(ask, torch.device("cpu")), ask).requires_grad_(True)
    idle = live.family.untrainable(live.unet, [live.text_encoder]) if text else []
    frozen = sum(p.numel() for module in idle for p in module.parameters())
    assert fake.trained_parameters == sum(p.numel() for p in live.parameters()) - frozen == count_trained_weights(ask)


def test_sdxls_vae_computes_in_fp32_under_half_autocast(base: dict[str, Path]) -> None:
    from dreambooth.models.components import disable_vae_autocast

    parts = load(small_recipe(model__source=str(base["sdxl"])), torch.device("cpu"))
    pixels, seen = torch.randn(1, 3, 16, 16), []
    parts.vae.encoder.conv_in.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        parts.encode(pixels)
    assert seen == [torch.float32]
    fixed = load(small_recipe(model__source=str(base["sdxl"])), torch.device("cpu"))
    del fixed.vae.encode
    fixed.vae.register_to_config(force_upcast=False)
    disable_vae_autocast(fixed)
    assert "encode" not in vars(fixed.vae)


@pytest.mark.parametrize("channels", [9, 8])  # a masked picture and its mask; a picture to edit
def test_a_base_for_inpainting_or_editing_is_refused_by_every_door(
        channels: int, base: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "inpainting"
    shutil.copytree(base["sd21"], folder)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"in_channels": channels}))
    [file] = (folder / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_in.weight"] = torch.zeros(16, channels, 3, 3)
    save_file(weights, file, {"format": "pt"})
    asked = f"this model reads {channels} channels where its VAE makes 4"
    doors = {"train": words("sd21", folder, f"run_root={tmp_path}", "tracking=none"),
             "plan": words("sd21", folder, "hardware=g4dn"),
             "generate": [f"base={folder}", "prompt=a toy", f"out={tmp_path / 'out'}"]}
    for door, typed in doors.items():
        assert call(door, typed, log=tmp_path / door) == 1
        text = (tmp_path / door).read_text()
        assert asked in text and "a model that draws from text alone" in text and "Traceback" not in text, text


def test_a_vae_that_cannot_be_loaded_is_named_and_not_the_base(base: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(base["sd21"] / "vae", tmp_path / "broken")
    next((tmp_path / "broken").glob("*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1\n")
    for vae in (tmp_path / "nowhere", base["sd21"] / "unet", tmp_path / "broken"):
        assert train(tmp_path, *words("sd21", base["sd21"], f"model.vae={vae}"), log=tmp_path / "log") == 1
        text = (tmp_path / "log").read_text()
        assert f"the VAE {vae} could not be loaded" in text and "model.vae=null" in text, text
        assert "base model" not in text and "Traceback" not in text, text


def test_zero_terminal_snr_trains_at_pure_noise_and_is_kept(base: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    ask = words("sd21", base["sd21"], "model.zero_terminal_snr=true", "train.max_train_steps=2")
    assert train(tmp_path, *ask) == 0
    kept = json.loads((the_run(tmp_path) / "model/scheduler/scheduler_config.json").read_text())
    assert (kept["rescale_betas_zero_snr"], kept["timestep_spacing"]) == (True, "trailing")
    assert DDPMScheduler.from_config(kept).alphas_cumprod[-1] == 0


def other(what: str, folder: Path, place: Path) -> tuple[Path, list[str]]:
    """The base in another form, and what is typed for it."""
    shutil.copytree(folder, place)
    if what == "variant":
        for file in place.rglob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
        return place, ["model.variant=fp16"]
    if what == "zero terminal SNR":
        return place, ["model.zero_terminal_snr=true"]
    [file] = (place / "vae").glob("*.safetensors")
    save_file({name: 1.3 * weight for name, weight in load_file(file).items()}, file, {"format": "pt"})
    return folder, [f"model.vae={place / 'vae'}"]


@pytest.mark.parametrize("what", [*(pytest.param(what, marks=pytest.mark.slow) for what in ("variant", "vae")),
                                  "zero terminal SNR"])
def test_an_adapter_is_drawn_with_as_it_was_trained(
        what: str, base: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By generate, and by the lines of its card: the same files of the base, VAE and noise schedule."""
    folder, more = other(what, base["sd21"], tmp_path / "base")
    ask = words("sd21", folder, "method=lora", "sample.prompts=[a toy]", "sample.num_inference_steps=4", *more)
    assert train(tmp_path, *ask, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    run = the_run(tmp_path)
    ask = [f"run={run}", "prompt=a toy", "num_images=1", "num_inference_steps=4"]
    assert call("generate", ask, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    drawn, sampled = (np.asarray(Image.open(run / name)).astype(int) for name in (
        "generated/a-toy-seed0.png", "samples/step-000004/prompt-0-0.png"))
    assert np.abs(drawn - sampled).max() <= 2
    monkeypatch.chdir(run)
    code = (run / "model/README.md").read_text().split("```")[1].removeprefix("python\n").partition("pipeline(p")[0]
    known: dict[str, Any] = {}
    exec(code, known)
    pipeline = known["pipeline"]
    rescaled = [pipeline.scheduler.config.get(key) for key in ("rescale_betas_zero_snr", "timestep_spacing")]
    assert (rescaled == [True, "trailing"]) == (what == "zero terminal SNR")
    vae = load_file(next((Path(more[0].partition("=")[2]) if what == "vae" else folder / "vae").glob("*.safetensors")))
    assert pipeline.vae.decoder.conv_in.weight.equal(vae["decoder.conv_in.weight"])
    with safe_open(run / f"model/{ADAPTER}", "pt") as file:
        said = {"variant": "fp16", "vae": more[0].partition("=")[2], "zero terminal SNR": "true"}[what]
        assert file.metadata()[f"base_model_{what.replace(' ', '_').lower()}"] == said


@pytest.mark.slow
def test_a_schedule_for_v_is_refused_where_noise_is_predicted(base: dict[str, Path], tmp_path: Path) -> None:
    ask = words("sd21", base["sd21"], "method=lora", "model.zero_terminal_snr=true", "sample.every=null")
    assert train(tmp_path, *ask) == 0
    ask = [f"run={the_run(tmp_path)}", f"base={base['sdxl']}", "prompt=a toy"]
    assert call("generate", ask, log=tmp_path / "log") == 1
    assert "predicts noise: type base=DIR, a model that predicts v" in (tmp_path / "log").read_text()


def test_zero_terminal_snr_is_refused_where_noise_is_predicted(base: dict[str, Path], tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    ask = words("sdxl", base["sdxl"], "model.zero_terminal_snr=true")
    assert train(tmp_path, *ask, log=log) == 1
    assert "type model.zero_terminal_snr=false" in log.read_text()


def test_clips_tokenizer_ships_with_the_package() -> None:
    from dreambooth.models.families import clip_tokenizer

    tokenizer = clip_tokenizer.build()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49408
    assert clip_tokenizer.build("!")("a", padding="max_length").input_ids == [49406, 320, 49407, *[0] * 74]
