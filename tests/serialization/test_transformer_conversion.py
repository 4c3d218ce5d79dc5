"""Single files that contain a transformer alone: written, read with the other parts of a folder, and trained from."""

import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.config.schema import Config, Model
from dreambooth.errors import UserError
from dreambooth.models import families, hub
from dreambooth.serialization import load_parts, single_file_sources
from dreambooth.serialization.convert import convert
from dreambooth.storage import folders
from tests.support.tiny_models import FEWER_FAST, FLOW_FAMILIES
from tests.support.weights import same, weights


@pytest.fixture(scope="module")
def files(flow_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of the architecture -> its transformer as a single file."""
    folder = tmp_path_factory.mktemp("files")
    return {name: convert(str(base), str(folder / f"{name}.safetensors")) for name, base in flow_bases.items()}


def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "unresolved", lambda: "no network")


@pytest.mark.parametrize("name", FLOW_FAMILIES)
def test_a_folder_becomes_a_file_and_a_folder_again(
    name: str, files: dict[str, Path], flow_bases: dict[str, Path], tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    folder = convert(str(files[name]), str(tmp_path / "out"), config=str(flow_bases[name]))
    base = weights(flow_bases[name])
    assert same(weights(folder), base)
    stored = load_file(files[name])
    count = sum(value.numel() for key, value in base.items() if key.startswith("transformer."))
    assert sum(value.numel() for value in stored.values()) == count  # the transformer alone
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    wanted = DiffusionPipeline.from_pretrained(flow_bases[name], local_files_only=True)
    assert type(pipeline) is type(wanted) and pipeline.scheduler.config == wanted.scheduler.config


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("name", FEWER_FAST)
def test_files_with_a_prefix_and_with_other_parts_are_read(
    name: str, prefix: str, files: dict[str, Path], flow_bases: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str]
) -> None:
    bare = {key.removeprefix("model.diffusion_model."): value for key, value in load_file(files[name]).items()}
    if name == "flux2_klein":  # as ComfyUI saves it
        bare = {key.replace("_norm.scale", "_norm.weight"): value for key, value in bare.items()}
    others = {"vae.decoder.conv_in.weight": torch.zeros(2), "text_encoders.qwen3.model.norm.weight": torch.zeros(2)}
    save_file({prefix + key: value for key, value in bare.items()} | others, tmp_path / "x.safetensors")
    folder = convert(str(tmp_path / "x.safetensors"), str(tmp_path / "out"), config=str(flow_bases[name]))
    assert same(weights(folder), weights(flow_bases[name]))
    assert "left out" not in capsys.readouterr().out


def test_a_file_as_source_takes_the_other_parts_of_the_published_model(
    files: dict[str, Path], flow_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(flow_bases["z_image"], tmp_path / "base")
    monkeypatch.setattr(type(families.of_architecture("z_image")), "hub_ids", (str(base),))
    config = Config(run_root=str(tmp_path), model=Model("z_image", str(files["z_image"])))
    found = single_file_sources.as_folders(config).model.source
    assert same(weights(Path(found)), weights(base))
    shutil.rmtree(found)
    shutil.rmtree(base / "tokenizer")
    with pytest.raises(UserError, match=r"contains no tokenizer, .*: type python .* then model\.source=DIR, another"):
        single_file_sources.as_folders(config)


@pytest.mark.parametrize(("offline", "words"), [
    (True, r"out=DIR config=DIR, then model\.source=DIR, .* or model\.offline=false to download them$"),
    (False, r"Z-Image could not be loaded \(no network\): type .* config=DIR, then model\.source=DIR, .* model$")])
def test_without_the_published_model_a_sentence_says_what_to_type(
    offline: bool, words: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_network(monkeypatch)
    config = Config(run_root=str(tmp_path), model=Model("z_image", str(files["z_image"]), offline=offline))
    with pytest.raises(UserError, match=words):
        single_file_sources.as_folders(config)
    with pytest.raises(UserError, match=r"contains the transformer of Z-Image alone, .* config=Tongyi-MAI/Z-Image to"):
        convert(str(files["z_image"]), str(tmp_path / "out"))


@pytest.mark.parametrize("options", [{"with_vae": False}, {"vae": "s3://bucket/y.safetensors"}])
def test_options_of_whole_files_are_refused_before_weights_are_read(
    options: dict[str, Any], flow_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in (load_parts._load_weights, folders.download):
        monkeypatch.setattr(inspect.getmodule(function), function.__name__, None)
    with pytest.raises(UserError, match="contains the transformer alone: leave vae and with_vae out"):
        convert(str(flow_bases["z_image"]), str(tmp_path / "x.safetensors"), **options)


def test_a_vae_of_a_transformer_is_refused_before_it_is_downloaded(
    files: dict[str, Path], flow_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "download", None)
    with pytest.raises(UserError, match="vae, prediction_type and resolution would change nothing for Z-Image"):
        convert(str(files["z_image"]), str(tmp_path / "out"), config=str(flow_bases["z_image"]), vae="s3://b/y.ckpt")


def test_parts_of_another_family_are_refused_before_they_are_downloaded(
    files: dict[str, Path], flow_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = files["z_image"], str(tmp_path / "out")
    words = r"{} is a model of FLUX\.2 klein, and \S*z_image.safetensors of Z-Image: type config=DIR, a"
    with pytest.raises(UserError, match=words.format(flow_bases["flux2_klein"])):
        convert(str(file), out, config=str(flow_bases["flux2_klein"]))
    family = families.of_architecture("flux2_klein")
    monkeypatch.setattr(hub, "local_files_only", lambda source, offline: False)
    monkeypatch.setattr(families, "of_source", lambda source, **options: (family, None))
    monkeypatch.setattr(hub, "download", None)
    with pytest.raises(UserError, match=words.format("someone/klein")):
        convert(str(file), out, config="someone/klein")


def test_what_a_transformer_file_does_not_say_is_refused(
    files: dict[str, Path], flow_bases: dict[str, Path], tmp_path: Path
) -> None:
    file, base, out = files["z_image"], str(flow_bases["z_image"]), str(tmp_path / "out")
    with pytest.raises(UserError, match="prediction_type and resolution would change nothing for Z-Image"):
        convert(str(file), out, config=base, prediction_type="epsilon")
    eight = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(file).items()}
    save_file(eight, tmp_path / "eight.safetensors")
    with pytest.raises(UserError, match=r"is in 8 bits \(.* is float8_e4m3fn\): type a file of the same model in bf16"):
        convert(str(tmp_path / "eight.safetensors"), out, config=base)
    with pytest.raises(UserError, match=r"there is no folder .*nothing: type config=DIR, another folder"):
        convert(str(file), out, config=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"x_pad_token is \(2, 48\) and not \(1, 48\): .* type config=DIR"):
        other = {key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in load_file(file).items()}
        save_file(other, tmp_path / "other.safetensors")
        convert(str(tmp_path / "other.safetensors"), out, config=base)


def test_bf16_is_written(flow_bases: dict[str, Path], tmp_path: Path) -> None:
    file = convert(str(flow_bases["z_image"]), str(tmp_path / "x.safetensors"), dtype="bf16")
    assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}
