"""The command `convert`: metadata, options, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreambooth.errors import UserError
from dreambooth.serialization.convert import convert
from dreambooth.serialization.detect_format import detect, open_model_file
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.utils import atomic_files
from tests.support.configs import small_recipe
from tests.support.weights import same


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


@pytest.mark.parametrize("name", [ADAPTER, "pytorch_lora_weights.safetensors"])  # the second: of earlier runs
def test_a_broken_adapter_is_not_merged(name: str, tmp_path: Path) -> None:
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model" / name).touch()
    with pytest.raises(UserError, match=r"the LoRA .* cannot be read .*repeat the command of the run"):
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
