"""What a single file is: its family, what it predicts, its size; pickles and other files are refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.errors import UserError
from dreambooth.models import families
from dreambooth.serialization.convert import convert
from dreambooth.serialization.detect_format import detect, open_model_file
from tests.support.tiny_models import FAMILIES
from tests.support.weights import same, weights

FAMILY = {name: families.of_architecture(name) for name in FAMILIES}


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
    (["model.diffusion_model.input_blocks.0.0.weight"], "of no model that is known here")])
def test_what_is_no_model_is_said(names: list[str], words: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=words):
        detect(open_model_file(tmp_path / "x.safetensors"))


def test_a_model_of_edms_noise_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    file = convert(str(bases["sdxl"]), str(tmp_path / "x.safetensors"))
    save_file({**load_file(file), "edm_vpred.sigma_max": torch.ones(1)}, tmp_path / "cos.safetensors")
    with pytest.raises(UserError, match=r"EDM, .*type another file"):
        convert(str(tmp_path / "cos.safetensors"), str(tmp_path / "out"), config=str(bases["sdxl"]))
