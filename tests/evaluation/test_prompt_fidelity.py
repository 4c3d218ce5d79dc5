"""Prompt fidelity: a picture whose surroundings are not those of its prompt is recognised, whatever the subject is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.errors import UserError
from dreambooth.evaluation.encoders import open_encoder
from dreambooth.evaluation.scene_borders import SceneBorders, border_mask
from dreambooth.evaluation.scoring import mask_subject, score
from dreambooth.utils.assets import resolve_asset
from tools.tiny_base import pictures
from tools.tiny_base.scenes import PHRASES

CLASS_PROMPT = "a photo of a toy"
PROMPTS = {"white": CLASS_PROMPT} | {
    name: f"{CLASS_PROMPT} {PHRASES[name]}" for name in ("beach", "snow", "grass", "night", "red")}


def picture(scene: str, subject: tuple[int, int, int], seed: int = 0) -> Image.Image:
    """A coloured square in a drawn scene."""
    canvas = pictures._background(scene, np.random.default_rng(seed)).clip(0, 255).astype(np.uint8)
    canvas[16:58, 12:52] = subject
    return Image.fromarray(canvas)


def borders() -> SceneBorders:
    found = SceneBorders.read(Path(resolve_asset("package:tiny-sd")))
    assert found is not None
    return found


@pytest.mark.parametrize("scene", PHRASES)
def test_the_shipped_base_describes_the_border_of_every_scene(scene: str) -> None:
    described = borders()
    for seed, subject in enumerate(((255, 255, 255), (40, 200, 200), (30, 30, 30))):
        assert described.scene_of(picture(scene, subject, seed)) == scene
    assert described.scene_of(picture(scene, (40, 200, 200)).resize((128, 128))) == scene
    assert described.named_in(f"a photo of a zwx toy {PHRASES[scene]}, today") == scene
    assert described.named_in("a photo of a zwx toy") is None


def test_the_border_is_at_the_top_and_at_both_sides() -> None:
    assert border_mask(4, 1).tolist() == [[True] * 4] + 3 * [[True, False, False, True]]


def test_only_prompts_that_name_a_scene_are_counted() -> None:
    beach, white = picture("beach", (40, 200, 200)), picture("white", (40, 200, 200))
    assert borders().fidelity({CLASS_PROMPT: [beach], PROMPTS["beach"]: [beach, beach, white]}) == 2 / 3
    assert borders().fidelity({CLASS_PROMPT: [white]}) is None


@pytest.mark.parametrize("content", ["{", '{"side": 64}', '{"side": 2, "width": 1, "scenes": []}',
                                     '{"side": 2, "width": 1, "scenes": {"a": {"rows": [1]}}}'])
def test_a_damaged_description_is_a_user_error(content: str, tmp_path: Path) -> None:
    assert SceneBorders.read(tmp_path) is None
    (tmp_path / "scene_borders.json").write_text(content)
    with pytest.raises(UserError, match=r"scene_borders\.json is damaged .*: copy it"):
        SceneBorders.read(tmp_path)


def test_the_description_is_small_and_readable() -> None:
    path = Path(resolve_asset("package:tiny-sd")) / "scene_borders.json"
    assert path.stat().st_size < 12_000
    assert set(json.loads(path.read_text())["scenes"]) == set(PHRASES)


def test_the_subject_is_masked_and_the_outer_region_is_not() -> None:
    pixels = torch.rand(1, 3, 16, 32)
    masked = mask_subject(pixels)
    assert (masked[:, :, 2:, 4:28] == 0.5).all()
    for region in (np.s_[:, :, :2], np.s_[:, :, :, :4], np.s_[:, :, :, 28:]):
        assert masked[region].equal(pixels[region])


def test_a_run_that_keeps_its_scenes_scores_high_and_one_that_lost_them_low() -> None:
    """The base draws a red toy, the runs a turquoise one. The run that lost its scenes draws it on white everywhere."""
    base = {prompt: [picture(scene, (200, 40, 40), 1)] for scene, prompt in PROMPTS.items()}
    kept = {prompt: [picture(scene, (40, 200, 200), 2)] for scene, prompt in PROMPTS.items()}
    lost = {prompt: [picture("white", (40, 200, 200), 2)] for prompt in PROMPTS.values()}
    encoder, photos = open_encoder("efficientnet_lite0"), [picture("white", (40, 200, 200))]

    def scores(generated: dict[str, list[Image.Image]]) -> dict[str, float]:
        found = score(photos, generated, [encoder], base_images=base, class_prompt=CLASS_PROMPT, borders=borders())
        return {name: value for name, value in found.items() if name.startswith(("prompt", "subject"))}

    high, low = scores(kept), scores(lost)
    assert low["subject_similarity_efficientnet_lite0"] > high["subject_similarity_efficientnet_lite0"]
    assert (high["prompt_fidelity_border"], low["prompt_fidelity_border"]) == (1, 0)
    assert high["prompt_fidelity_efficientnet_lite0"] == 1 and low["prompt_fidelity_efficientnet_lite0"] == 0
