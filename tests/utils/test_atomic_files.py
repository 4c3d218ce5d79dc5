"""Digests of model weights, and JSON files: strict when written, forgiving when read."""

import json
import math
from pathlib import Path

import pytest

from dreambooth.utils import atomic_files


def digest(folder: Path, **files: str) -> str | None:
    for name, content in files.items():
        path = folder / name.replace("__", ".").replace("_of_", "-of-").replace("_in_", "/")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(content)
    return atomic_files.weights_digest(folder)


def test_bin_weights_changed_in_place_have_another_digest(tmp_path: Path) -> None:
    digests = {digest(tmp_path, **{name: content}) for name in (
        "unet_in_diffusion_pytorch_model__bin", "text_encoder_in_pytorch_model__bin") for content in ("one", "two")}
    assert len(digests) == 4


def test_bin_files_beside_safetensors_do_not_count(tmp_path: Path) -> None:
    """The digest of such a model is part of the names of earlier run folders. diffusers loads the .safetensors file."""
    before = digest(tmp_path, unet_in_diffusion_pytorch_model__safetensors="one")
    assert before == "95aa143a536a80486deeca317db4123217cb7a0e92ae9fe455fb30b24b868c41"
    assert digest(tmp_path, unet_in_diffusion_pytorch_model__bin="two", unet_in_optimizer__bin="x") == before
    assert digest(tmp_path, vae_in_optimizer__bin="x") == before
    assert digest(tmp_path, unet_in_diffusion_pytorch_model__fp16__bin="other variant") != before


def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    content = {"a": math.nan, "b": [1.5, math.inf, {"c": -math.inf}], "d": (True, "NaN", None)}
    atomic_files.write_json(tmp_path / "a.json", content)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse) == {
        "a": None, "b": [1.5, None, {"c": None}], "d": [True, "NaN", None]}


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"3", b"\xff\xfe", b"[" * 100_000])
def test_a_file_without_an_object_is_none(content: bytes, tmp_path: Path) -> None:
    assert atomic_files.read_object(tmp_path / "a.json") is None
    (tmp_path / "a.json").write_bytes(content)
    assert atomic_files.read_object(tmp_path / "a.json") is None
