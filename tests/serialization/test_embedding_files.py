"""Embeddings of new tokens beside an adapter: diffusers draws with them what the run draws, merged or not."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dreambooth.config.enums import MethodKind
from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.models import families, loading
from dreambooth.models.components import Components
from dreambooth.models.new_tokens.attach import attach
from dreambooth.models.pipeline import Sampler, build_pipeline, generate_images
from dreambooth.serialization import embedding_files, export
from dreambooth.serialization.convert import convert
from dreambooth.serialization.export_layout import ADAPTER
from dreambooth.utils.assets import resolve_asset
from tests.models.test_new_tokens import CPU, recipe_of, replace_method
from tests.support.tiny_models import FAMILIES

WORD = "embeddings/zwx.safetensors"
PROMPTS = "a photo of a zwx toy", "a toy on the beach"


def taught(family: str, folder: Path, run: Path, **method: Any) -> tuple[Recipe, Components]:
    """A base with an adapter and new tokens that change its pictures."""
    loading.import_libraries()
    recipe = recipe_of(family, folder, replace_method(**method), train__train_text_encoder=True)
    recipe = replace(recipe, run_dir=run)
    parts = loading.load(recipe, CPU)
    attach(parts, recipe)
    model = loading.prepare(parts, recipe)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lokr_w" in name:
                parameter += 0.02 * torch.randn_like(parameter)
        for rows in model.new_rows.values():
            rows += 0.1 * torch.randn_like(rows)
    return recipe, parts


def draw(pipeline: Any, side: int = 16, prompts: tuple[str, ...] = PROMPTS) -> np.ndarray:
    """Pictures of prompts as diffusers itself draws them, before they are rounded to bytes."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipeline(list(prompts), num_inference_steps=3, guidance_scale=3.0, output_type="np", height=side,
                        width=side, generator=[torch.Generator().manual_seed(4) for _ in prompts]).images


@pytest.mark.parametrize("family", [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "sdxl")) for name in ("tiny", *FAMILIES[1:])])
def test_diffusers_draws_with_the_lines_of_the_card_what_the_run_draws(
        family: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(resolve_asset("package:tiny-sd")) if family == "tiny" else bases[family]
    side = 64 if family == "tiny" else 16
    recipe, parts = taught(family, base, tmp_path)
    export.export(parts, recipe, 1, tmp_path / "none.png")
    monkeypatch.chdir(tmp_path)
    code = (tmp_path / "model/README.md").read_text().split("```")[1].removeprefix("python\n")
    known: dict[str, Any] = {}
    exec(code.partition("pipeline(p")[0], known)
    theirs, ours = known["pipeline"].to(torch.float32), build_pipeline(parts)
    for module in ours.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    theirs.scheduler = ours.scheduler
    expected = draw(ours, side)
    assert np.abs(draw(theirs, side) - expected).max() < (1 / 255 if family == "tiny" else 1e-4)
    with parts.new_tokens.unread(ours, parts.family.tokenizers):  # type: ignore[union-attr]
        assert np.abs(draw(ours, side)[0] - expected[0]).max() > 0.005, "the new tokens change nothing"
    words = [{name: rows.shape for name, rows in load_file(tmp_path / "model" / WORD).items()}]
    assert [set(word) for word in words] == [{"clip_l", "clip_g"} if family == "sdxl" else {"emb_params"}]
    with safe_open(tmp_path / "model" / ADAPTER, "pt") as file:
        assert "zwx" in file.metadata()[embedding_files.WORDS_KEY]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_merged_pipeline_and_its_single_file_have_them_in_their_way(
        family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """The pipeline in its tokenizers and tables; the file, whose table other programs know, in files beside it."""
    from diffusers import DiffusionPipeline

    recipe, parts = taught(family, bases[family], tmp_path, merge=True)
    folder = export.export(parts, recipe, 1, tmp_path / "none.png")
    ours, merged = build_pipeline(parts), DiffusionPipeline.from_pretrained(folder)
    for part in parts.modules:
        part.eval()
    merged.scheduler = ours.scheduler
    with_a_longer_word = *PROMPTS, "a zwxy toy"
    assert np.abs(draw(merged, 16, with_a_longer_word) - draw(ours, 16, with_a_longer_word)).max() < 2e-4
    sampler = Sampler(2, 3.0, 16)
    pictures = [np.asarray(next(generate_images(pipeline, ["A ZWX toy"], [3], sampler, 1))[0], int)
                for pipeline in (merged, ours)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    first, base = (load_file(next((place / "text_encoder").glob("*.safetensors"))) for place in (folder, bases[family]))
    [table] = [name for name in base if "token_embedding" in name]
    assert first[table][:1803].equal(base[table]) and len(first[table]) == 1805
    (tmp_path / "out").mkdir()
    file = convert(str(folder), str(tmp_path / "out/toy.safetensors"))
    assert {len(tensor) for key, tensor in load_file(file).items() if "token_embedding" in key} == {1803}
    written, exported = (load_file(place / WORD) for place in (tmp_path / "out", folder))
    assert all(written[key].equal(rows) for key, rows in exported.items()) and written.keys() == exported.keys()
    with pytest.raises(UserError, match=r"embeddings/zwx\.safetensors is there already"):
        convert(str(folder), str(tmp_path / "out/other.safetensors"))


@pytest.mark.parametrize("kind", [MethodKind.lora, MethodKind.lokr])
def test_convert_merges_them_with_their_adapter(
        kind: MethodKind, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card of a LoKr, which diffusers cannot open on this base, has this command and opens what it writes."""
    from diffusers import DiffusionPipeline

    recipe, parts = taught("sd15", bases["sd15"], tmp_path, kind=kind)
    export.export(parts, recipe, 1, tmp_path / "none.png")
    ours = build_pipeline(parts)
    for part in parts.modules:
        part.eval()
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "model/README.md").read_text()
    for words in ("python -m dreambooth.convert in=model out=merged\n", 'DiffusionPipeline.from_pretrained("merged")'):
        assert (words in card) == (kind is MethodKind.lokr)
    convert("model", "merged")
    merged = DiffusionPipeline.from_pretrained("merged")
    merged.scheduler = ours.scheduler
    assert np.abs(draw(merged) - draw(ours)).max() < 2e-4
    (tmp_path / "out").mkdir()
    convert(str(tmp_path), str(tmp_path / "out/toy.safetensors"))
    written, exported = (load_file(place / WORD) for place in (tmp_path / "out", tmp_path / "model"))
    assert written["emb_params"].equal(exported["emb_params"])


def test_an_adapter_is_not_used_without_its_embeddings_or_with_those_of_another(
        bases: dict[str, Path], tmp_path: Path) -> None:
    recipe, parts = taught("sd15", bases["sd15"], tmp_path)
    folder = export.export(parts, recipe, 1, tmp_path / "none.png")
    [kohya] = (folder / "webui").iterdir()
    assert embedding_files.find(folder / ADAPTER) == embedding_files.find(kohya) == {"zwx": folder / WORD}
    rows = {"zwx": {name: rows + 1 for name, rows in parts.new_tokens.by_word()["zwx"].items()}}  # type: ignore
    embedding_files.write(folder, rows, parts.family, {})
    with pytest.raises(UserError, match=re.escape(f"{folder / WORD} is that of another: put the file {WORD}")):
        embedding_files.find(folder / ADAPTER)
    (folder / WORD).unlink()
    with pytest.raises(UserError, match=re.escape(f"embeddings/zwx.safetensors: put the file {WORD} of its run")):
        embedding_files.find(kohya)
    embedding_files.write(folder, rows, parts.family, {})
    with pytest.raises(UserError, match="has clip_l, clip_g: type base=DIR"):
        embedding_files.read(folder / WORD, families.of_architecture("sdxl"))
