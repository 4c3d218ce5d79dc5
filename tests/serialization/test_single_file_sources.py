"""Runs whose model or VAE is a single file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.config.compose import load
from dreambooth.config.recipe import resolve
from dreambooth.config.schema import Config, Model
from dreambooth.models import families
from dreambooth.models.vae import planned_configuration
from dreambooth.run import execute
from dreambooth.serialization import single_file_sources
from dreambooth.serialization.convert import convert
from dreambooth.train import convert_single_files
from dreambooth.utils import atomic_files
from dreambooth.utils.assets import resolve_asset
from dreambooth.utils.hardware import detect_machine
from dreambooth.utils.signals import StopRequest
from tests.support.configs import compose_config
from tests.support.faults import FAST, call, train
from tests.support.tiny_models import FAMILIES
from tests.support.weights import same, weights

FAMILY = {name: families.of_architecture(name) for name in FAMILIES}


def trained(root: Path, source: str) -> dict[str, torch.Tensor]:
    """The weights of two steps, in this process. Without class images: their seeds know the base's name."""
    asked = [*FAST, f"run_root={root}", f"model.source={source}", "dataset.allow_drawings=true",
             "train.max_train_steps=2", "prior.with_prior_preservation=false", "sample.every=null"]
    execute(resolve(convert_single_files(load(compose_config(*asked))), root / "run", detect_machine()), StopRequest())
    return weights(root / "run/model")


@pytest.mark.slow
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
