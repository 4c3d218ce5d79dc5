"""Adapters with new tokens take turns on one base: each picture is read with those of its adapter, and no others."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dreambooth.config.generate import Generate
from dreambooth.errors import UserError
from dreambooth.inference.loras import find_loras
from dreambooth.inference.model_sources import find_source
from dreambooth.inference.picture_request import InvalidRequest, PictureRequest
from dreambooth.inference.renderer import Renderer
from dreambooth.models import families
from dreambooth.models.new_tokens.prompts import new_words
from dreambooth.serialization import embedding_files
from dreambooth.serialization.export_layout import ADAPTER

BASE = "package:tiny-sd"
FAMILY = families.of_architecture("sd15")
ZWX = PictureRequest("a red ZWX toy", seed=3, num_inference_steps=2, width=32, height=32)
LONG = replace(ZWX, prompt="a zwx toy a a a a a a a a a a")  # 15 tokens and those of the word; the model reads 16


def make(folder: Path, seed: int, word: str = "zwx", count: int = 3) -> Path:
    """An adapter that changes little, with embeddings that change much."""
    torch.manual_seed(seed)
    words = {word: {"text_encoder": 0.3 * torch.randn(count, 128)}}
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    tensors = {f"{layer}.lora_{side}.weight": 0.01 * torch.ones((4, 128) if side == "A" else (128, 4)) for side in "AB"}
    folder.mkdir()
    save_file(tensors, folder / ADAPTER, embedding_files.adapter_metadata(words, FAMILY))
    embedding_files.write(folder, words, FAMILY, {})
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make(root / name, seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture(scope="module")
def renderer(adapters: dict[str, Path]) -> Iterator[Renderer]:
    yield Renderer(find_source(Generate(base=BASE)), "cpu", adapters, max_adapters=1)


def test_each_picture_is_drawn_with_the_tokens_of_its_adapter_alone(
        renderer: Renderer, adapters: dict[str, Path]) -> None:
    plain = renderer.draw([ZWX])
    first = {name: renderer.draw([replace(ZWX, adapter=name)]) for name in adapters}
    assert len({png[0] for png in [plain, *first.values()]}) == 3
    assert renderer.draw([ZWX]) == plain, "an adapter's tokens are left behind"
    alone = Renderer(find_source(Generate(base=BASE)), "cpu", {"one": adapters["one"]})
    assert alone.draw([replace(ZWX, adapter="one")]) == first["one"]
    small = replace(ZWX, prompt="a red zwx toy", adapter="two")
    assert renderer.pictures([small])[0].tobytes() == renderer.pictures([replace(ZWX, adapter="two")])[0].tobytes()
    with_zero = replace(ZWX, adapter="two", adapter_scale=0.0)
    assert renderer.pictures([with_zero])[0].tobytes() == renderer.pictures([ZWX])[0].tobytes()


def test_a_prompt_is_counted_with_the_tokens_of_its_adapter(renderer: Renderer) -> None:
    renderer.check(LONG)
    with pytest.raises(InvalidRequest, match="this model reads 16 tokens and the prompt has 17"):
        renderer.check(replace(LONG, adapter="one"))
    renderer.check(LONG)


def test_two_loras_with_the_same_word_cannot_draw_together(adapters: dict[str, Path], tmp_path: Path) -> None:
    source = find_source(Generate(base=BASE))
    both = find_loras([str(adapters["one"]), str(adapters["two"])], [1.0, 1.0])
    with pytest.raises(UserError, match="for the same word zwx: draw with one of them at a time"):
        Renderer(source, "cpu", used_loras=both)
    other = find_loras([str(adapters["one"]), str(make(tmp_path / "other", 2, "sks"))], [1.0, 1.0])
    tokenizer = Renderer(source, "cpu", used_loras=other)._pipeline.tokenizer
    assert new_words(tokenizer) == {"zwx": 3, "sks": 3}
    changed = replace(other[0], embeddings=((*other[0].embeddings[0][:2], (0, 0)),))
    assert changed.has_changed and not other[0].has_changed
