"""One renderer draws what generate draws: many adapters on one base, batches, steps, sizes, and what it refuses."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dreambooth.config.enums import BaseWeights
from dreambooth.config.generate import Generate
from dreambooth.errors import Interrupted, UserError
from dreambooth.inference.model_sources import find_source
from dreambooth.inference.picture_request import Limits, PictureRequest, batch_key, parse
from dreambooth.inference.renderer import Renderer
from dreambooth.models.inference_memory import InferenceMemory
from dreambooth.serialization.export_layout import ADAPTER

BASE = "package:tiny-sd"
RED = PictureRequest("a red toy", seed=3, num_inference_steps=2, width=32, height=32)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three LoRAs: of the denoiser, of the text encoder, and of both."""
    layers = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v": {"one", "three"},
              "text_encoder.text_model.encoder.layers.0.self_attn.v_proj": {"two", "three"}}
    found = {}
    for number, name in enumerate(("one", "two", "three")):
        torch.manual_seed(number)
        found[name] = tmp_path_factory.mktemp(name)
        save_file({f"{layer}.lora_{side}.weight": torch.randn((4, 128) if side == "A" else (128, 4))
                   for layer, names in layers.items() if name in names for side in "AB"}, found[name] / ADAPTER)
    return found


@pytest.fixture(scope="module")
def renderer(adapters: dict[str, Path]) -> Iterator[Renderer]:
    yield Renderer(find_source(Generate(base=BASE)), "cpu", adapters, max_adapters=2)


def attached(renderer: Renderer) -> set[str]:
    return {name for names in renderer._pipeline.get_list_adapters().values() for name in names}


def test_adapters_take_turns_and_the_least_recently_used_is_released(
        renderer: Renderer, adapters: dict[str, Path]) -> None:
    plain = renderer.draw([RED])
    first = {name: renderer.draw([replace(RED, adapter=name)]) for name in adapters}
    assert len({png[0] for png in [plain, *first.values()]}) == 4, "an adapter did not change the picture"
    assert attached(renderer) == {"lora1", "lora2"}, "not the two that were used last"
    again = {name: renderer.draw([replace(RED, adapter=name)]) for name in reversed(adapters)}
    assert again == first and renderer.draw([RED]) == plain
    assert attached(renderer) == {"lora1", "lora3"}, "three, which was used before two, had to go for one"
    alone = Renderer(find_source(Generate(base=BASE)), "cpu", {"two": adapters["two"]})
    assert alone.draw([replace(RED, adapter="two")]) == first["two"]


@pytest.mark.slow
def test_adapters_take_turns_on_a_base_of_eight_bits(renderer: Renderer, adapters: dict[str, Path]) -> None:
    quantised = Renderer(find_source(Generate(base=BASE)), "cpu", adapters, max_adapters=1,
                         memory=InferenceMemory(base_weights=BaseWeights.int8))
    requests = [RED, *(replace(RED, adapter=name) for name in adapters), RED]
    plain, rounded = ([np.asarray(one.pictures([request])[0], int) for request in requests]
                      for one in (renderer, quantised))
    assert np.array_equal(rounded[0], rounded[-1])
    for exact, near in zip(plain, rounded, strict=True):
        assert np.abs(exact - near).mean() < 4 < np.abs(plain[1] - plain[0]).mean()


def test_a_batch_reports_its_steps_and_can_be_stopped(renderer: Renderer) -> None:
    batch, steps = [RED, replace(RED, seed=4, prompt="a blue toy")], []
    pngs = renderer.draw(batch, lambda done, total: bool(steps.append((done, total))) or True)
    assert steps == [(1, 2), (2, 2)] and len(set(pngs)) == 2
    assert [json.loads(Image.open(io.BytesIO(png)).text["dreambooth"])["seed"] for png in pngs] == [3, 4]  # type: ignore[attr-defined]
    with pytest.raises(Interrupted, match="after 1 of 2 steps"):
        renderer.draw(batch, lambda done, total: False)
    with pytest.raises(ValueError, match="may differ in prompt and seed"):
        renderer.draw([RED, replace(RED, num_inference_steps=3)])


def test_offloaded_parts_leave_the_gpu_after_an_error(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a batch for which memory ran out would leave no room for any later one."""
    calls: list[str] = []

    def fail(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dreambooth.inference.renderer.generate_images", fail)
    monkeypatch.setattr(renderer._pipeline, "maybe_free_model_hooks", lambda: calls.append("freed"))
    with pytest.raises(torch.OutOfMemoryError):
        renderer.draw([RED])
    assert calls == ["freed"]


def test_a_picture_has_the_size_of_its_request(renderer: Renderer) -> None:
    request = replace(RED, width=24, height=40)
    assert Image.open(io.BytesIO(renderer.draw([request])[0])).size == (24, 40)


REFUSED: dict[str, dict[str, Any]] = {
    "and 20x32 is not: the nearest sizes are 16x32 and 24x32": {"width": 20},
    "adapter_scale is of an adapter": {"adapter_scale": 0.5},
    "there is no adapter 'four': the adapters of this model are one, two, three": {"adapter": "four"},
    "tokens and the prompt has": {"prompt": "toy " * 80},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_request_that_the_model_cannot_draw_is_a_sentence(sentence: str, renderer: Renderer) -> None:
    with pytest.raises(UserError, match=sentence):
        renderer.check(replace(RED, **REFUSED[sentence]))


def test_an_adapter_that_was_trained_again_is_opened_again(
        renderer: Renderer, adapters: dict[str, Path], tmp_path: Path) -> None:
    renderer._paths["again"] = tmp_path
    pictures = []
    for name in ("one", "two"):
        (tmp_path / ADAPTER).write_bytes((adapters[name] / ADAPTER).read_bytes())
        renderer.check(replace(RED, adapter="again"))
        pictures.append(renderer.draw([replace(RED, adapter="again")]))
    assert pictures == [renderer.draw([replace(RED, adapter=name)]) for name in ("one", "two")]
    (tmp_path / ADAPTER).unlink()
    renderer.check(replace(RED, adapter="again"))  # of an adapter that is in memory


def test_an_adapter_that_does_not_fit_leaves_the_others(renderer: Renderer, adapters: dict[str, Path], tmp_path: Path
                                                        ) -> None:
    before = renderer.draw([replace(RED, adapter="one")])
    wrong = load_file(adapters["three"] / ADAPTER)
    save_file({key: torch.zeros(4, 64) if "unet" in key and "_A" in key else value for key, value in wrong.items()},
              tmp_path / ADAPTER)
    renderer._paths["wrong"] = tmp_path
    with pytest.raises(UserError, match="does not fit this base"):
        renderer.draw([replace(RED, adapter="wrong")])
    assert renderer.draw([replace(RED, adapter="one")]) == before


PARSED = Limits(max_side=64, max_steps=50, max_images=4)
INVALID: dict[str, dict[str, Any]] = {
    "there is no field 'promt': the fields are prompt, negative_prompt": {"promt": "x"},
    "prompt is missing": {"seed": 1}, "prompt must be a text, not 3": {"prompt": 3},
    "seed must be a whole number from 0 to 9223372036854775807, not True": {"prompt": "x", "seed": True},
    "num_inference_steps must be a whole number from 1 to 50, not 51": {"prompt": "x", "num_inference_steps": 51},
    "num_images must be a whole number from 1 to 4, not 5": {"prompt": "x", "num_images": 5},
    "guidance_scale must be a number from 0 to 100, not nan": {"prompt": "x", "guidance_scale": float("nan")},
    "guidance_scale must be a number from 0 to 100, not 10000": {"prompt": "x", "guidance_scale": 10**400},
    "adapter_scale must be a number from -10 to 10, not '1'": {"prompt": "x", "adapter_scale": "1"},
    "size must be width x height in pixels, such as 512x768, not '64'": {"prompt": "x", "size": "64"},
    "width must be a whole number from 1 to 64, not 128": {"prompt": "x", "size": "128x64"},
    "size must be absent if width or height is given": {"prompt": "x", "size": "64x64", "width": 64},
    "prompt must have at most 10000 characters": {"prompt": "x" * 10_001},
}


@pytest.mark.parametrize("sentence", INVALID)
def test_a_field_out_of_its_bounds_is_a_sentence(sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(INVALID[sentence], PARSED)
    assert sentence in str(caught.value)


def test_each_picture_of_a_request_has_its_own_seed() -> None:
    one, two = parse({"prompt": "a toy", "size": "48x64", "num_images": 2, "seed": 7, "adapter": None,
                      "guidance_scale": 4}, PARSED)
    assert one == PictureRequest("a toy", seed=7, guidance_scale=4.0, width=48, height=64)
    assert two == replace(one, seed=8) and batch_key(one) == batch_key(two) != batch_key(replace(one, width=64))


def test_a_flow_base_draws_its_own_size() -> None:
    renderer = Renderer(find_source(Generate(base="package:tiny-flow")), "cpu")
    assert renderer.info.resolution == 64
