"""Data of real projects: several subjects, captions from metadata.jsonl, HEIC, buckets, masks, prompt dropout."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dreambooth.config.compose import load
from dreambooth.config.recipe import Recipe, resolve
from dreambooth.data import aspect_buckets, image_formats, masks, photos, subjects
from dreambooth.data.batches import Batches, Concept
from dreambooth.data.latent_cache import Keep
from dreambooth.data.photos import NO_FINGERPRINT, Photo, cut, fingerprint, list_photos, load_photos
from dreambooth.errors import ConfigError, UserError
from dreambooth.runs.identity import identity
from dreambooth.runtime.engine import Engine
from dreambooth.training.instance_loss import instance_loss
from dreambooth.training.loss import dreambooth_loss
from dreambooth.training.step import Objective, train_step
from tests.support.configs import made
from tests.support.toy_model import Toy, batches, schedule, state, steps

PROMPT = "a photo of a zwx dog"
TWO = ("dataset=concepts", "dataset.concepts.0.instance_dir=A",
       "dataset.concepts.0.instance_prompt=a photo of a zwx dog", "dataset.concepts.0.class_prompt=a photo of a dog",
       "dataset.concepts.1.instance_dir=B",
       "dataset.concepts.1.instance_prompt=a photo of a ohwx dog", "dataset.concepts.1.class_prompt=a photo of a dog",
       "dataset.allow_drawings=true")


def recipe(*overrides: str) -> Recipe:
    return resolve(load(made(*overrides)), Path("runs/x"))


def picture(path: Path, size: tuple[int, int] = (16, 16), seed: int = 0) -> Path:
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def told(folder: Path, **more: object) -> str:
    with pytest.raises(UserError) as raised:
        load_photos(list_photos(folder), PROMPT, 16, **more)  # type: ignore[arg-type]
    return str(raised.value)


# -- captions and HEIC --------------------------------------------------------------------------------------------

def listing(folder: Path, *lines: object) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))


def test_a_caption_stands_in_metadata_jsonl_as_datasets_has_it(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    listing(tmp_path, {"file_name": "a.png", "text": "a zwx dog\n asleep"}, "", {"file_name": "b.png", "text": "two"})
    (tmp_path / "b.txt").write_text("two")
    found = [photo.caption for photo in load_photos(list_photos(tmp_path), PROMPT, 16)]
    assert found == ["a zwx dog asleep", "two", PROMPT]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85"])
def test_a_caption_may_hold_what_python_takes_for_the_end_of_a_line(tmp_path: Path, end: str) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    lines = [json.dumps({"file_name": name, "text": f"one{end}two"}, ensure_ascii=False) for name in ("a.png", "b.png")]
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(lines).encode())
    assert [photo.caption for photo in load_photos(list_photos(tmp_path), PROMPT, 16)] == ["one two"] * 2


@pytest.mark.parametrize("line, words", [
    ("{", "line 1 is not"), ({"file_name": "a.png"}, "line 1 is not"),
    ({"file_name": "a.png", "text": 3}, "line 1 is not"),
    ({"file_name": "a.png", "text": " "}, "empty text"), ({"file_name": "gone.png", "text": "x"}, "which is not there"),
    ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}', "second caption"),
    ({"file_name": "a.png", "text": "another"}, "a caption in a.txt and another in metadata.jsonl"),
])
def test_an_unusable_line_of_metadata_is_named(tmp_path: Path, line: object, words: str) -> None:
    picture(tmp_path / "a.png")
    if "another" in str(line):
        (tmp_path / "a.txt").write_text("mine")
    listing(tmp_path, line)
    assert words in told(tmp_path)


def test_the_fingerprint_knows_metadata(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    before = fingerprint(tmp_path)
    listing(tmp_path, {"file_name": "a.png", "text": "x"})
    assert before != fingerprint(tmp_path) != NO_FINGERPRINT


def test_a_heic_photo_is_a_photo_with_the_extra(tmp_path: Path) -> None:
    assert "HEIF" in image_formats.readable()
    Image.new("RGB", (48, 32), (200, 30, 90)).save(tmp_path / "IMG_1.HEIC", quality=95)
    [photo] = load_photos(list_photos(tmp_path), PROMPT, 32)
    assert photo.pixels.shape == (32, 48, 3)
    assert np.abs(photo.pixels.astype(int) - (200, 30, 90)).max() <= 4


def test_a_heic_photo_without_the_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (48, 32)).save(tmp_path / "IMG_1.HEIC") if image_formats.readable() else None
    monkeypatch.setattr(image_formats, "readable", lambda: image_formats.FORMATS)
    assert "pip install 'dreambooth[heic]'" in told(tmp_path)


# -- buckets ------------------------------------------------------------------------------------------------------

@given(st.integers(200, 4000), st.floats(0.5, 2.0))
def test_at_512_no_photo_from_1_2_to_2_1_loses_more_than_5_percent(width: int, aspect: float) -> None:
    height = min(2 * width, max(-(-width // 2), round(width / aspect)))
    assert aspect_buckets.lost(height, width, aspect_buckets.nearest(height, width, 512)) <= 0.05


def test_the_most_that_is_lost_at_512_is_what_the_documents_say() -> None:
    shapes = [(round(4096 * 2**(i / 2000)), 4096) for i in range(-2000, 2001)]
    assert 0.016 < max(aspect_buckets.lost(h, w, aspect_buckets.nearest(h, w, 512)) for h, w in shapes) <= 0.0165
    assert 0.16 < max(aspect_buckets.lost(h, w, aspect_buckets.nearest(h, w, 64)) for h, w in shapes) < 0.17


@pytest.mark.parametrize("resolution", [64, 512, 768, 1024])
def test_sizes_are_in_steps_of_8_pixels_and_no_larger_than_the_square(resolution: int) -> None:
    found = aspect_buckets.sizes(resolution)
    assert (resolution, resolution) in found
    for height, width in found:
        assert height % 8 == width % 8 == 0 and height * width <= resolution**2
        assert max(height, width) <= 2 * min(height, width) and (width, height) in found
    assert resolution != 512 or {(360, 720), (720, 360)} <= set(found)


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 200), st.floats(0.5, 2.0))
def test_a_loaded_photo_just_covers_its_bucket(width: int, aspect: float) -> None:
    image = Image.new("RGB", (width, max(1, round(width / aspect))))
    size = aspect_buckets.nearest(image.height, image.width, 64)
    pixels = np.array(photos._resize(image, size))
    assert pixels.shape[0] >= size[0] and pixels.shape[1] >= size[1]
    assert pixels.shape[0] == size[0] or pixels.shape[1] == size[1]


SHAPES = [(8, 8), (8, 8), (8, 8), (16, 4), (16, 4), (4, 16)]


def shaped(stream: str = "instance", shapes: list[tuple[int, int]] = SHAPES, **more: object) -> Concept:
    """Photos of several sizes; every fact of one is in its caption's last digit."""
    dice = np.random.default_rng(1)
    found = [Photo(Path(f"{i}.png"), dice.integers(0, 256, (h, w, 3), dtype=np.uint8), f"caption {i}", (h, w))
             for i, (h, w) in enumerate(shapes)]
    return Concept(stream, found, True, False, **more)  # type: ignore[arg-type]


def in_buckets(*cut: int, **more: object) -> Batches:
    return batches(*cut, concepts=[shaped(), shaped("class", [(8, 8)] * 4)], **more)  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 40))
def test_with_buckets_too_a_sample_is_the_same_however_a_step_is_cut(
        batch: int, accumulation: int, world: int, step: int) -> None:
    def rows(parts: list[Batches]) -> list[list[float]]:
        halves = [half for made in parts for micro in made(step) for half in micro.halves()]
        return sorted([float(h.text[i]), *h.latents[i].flatten().tolist(), *h.noise[i].flatten().tolist()]
                      for h in halves for i in range(len(h.timesteps)))

    parts = [in_buckets(batch, accumulation, world, rank) for rank in range(world)]
    assert rows(parts) == rows([in_buckets(batch * accumulation * world)])


def test_a_step_has_one_size_and_every_photo_comes_equally_often() -> None:
    one, seen = shaped(), Counter()
    for step in range(6 * 4):
        views = [one.view(0, step, index, 3) for index in range(3)]
        assert len({one.photos[view.photo].size for view in views}) == 1
        seen.update(view.photo for view in views)
    assert set(seen.values()) == {12}


def test_sizes_come_in_another_order_each_round() -> None:
    one = shaped()
    rounds = [[one.photos[one.view(0, step, 0, 1).photo].size for step in range(r * 6, r * 6 + 6)] for r in range(5)]
    assert all(Counter(found) == Counter(SHAPES) for found in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_accumulation_equals_one_batch_with_buckets_in_fp64() -> None:
    """The bound of test_core's test without buckets: lr x 512 eps / |g|, below 1e-9 a step."""
    whole, cut = Toy(), Toy()
    steps(whole, in_buckets(8), 4)
    steps(cut, in_buckets(1, 8), 4)
    for x, y in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.allclose(x, y, atol=1e-9, rtol=0)


def test_a_step_in_buckets_is_the_same_without_the_steps_before() -> None:
    fresh, used = in_buckets(2), in_buckets(2)
    for step in range(9):
        used(step)
    for a, b in zip(fresh(9)[0].halves(), used(9)[0].halves(), strict=True):
        assert a.latents.equal(b.latents) and a.text.equal(b.text)


@pytest.mark.parametrize("where", ["device", "disk"])
def test_cached_latents_of_buckets_are_the_uncached_ones(where: str, tmp_path: Path) -> None:
    from dreambooth.config.enums import LatentCache

    cached, plain = in_buckets(2), in_buckets(2)
    cached.latents.keep = Keep(LatentCache(where), torch.device("cpu"), tmp_path)
    for item in cached.concepts:
        cached.latents.fill(item, lambda count: None)
    for step in range(8):
        for a, b in zip(cached(step)[0].halves(), plain(step)[0].halves(), strict=True):
            assert a.latents.equal(b.latents)


def test_the_sweeps_objective_takes_photos_of_every_size() -> None:
    model = Toy()
    state(model)
    assert instance_loss(SimpleNamespace(batches=in_buckets(1), objective=Objective(schedule()),  # type: ignore[arg-type]
                                         trained=model)) > 0


def test_photos_of_one_size_keep_their_order_whether_or_not_buckets_are_asked_for() -> None:
    square, asked = batches(concepts=[shaped(shapes=[(8, 8)] * 5)]), batches(concepts=[
        dataclasses.replace(one, photos=[dataclasses.replace(p, size=None) for p in one.photos])
        for one in (shaped(shapes=[(8, 8)] * 5),)])
    plain = [batch.noise for step in range(5) for batch in asked(step)]
    assert all(a.equal(b) for a, b in zip(plain, (x.noise for s in range(5) for x in square(s)), strict=True))


# -- masks --------------------------------------------------------------------------------------------------------

def masked(count: int = 3, stream: str = "instance") -> Concept:
    """Photos of 8 x 12 whose mask is the left part of the picture, without its centre crop's last columns."""
    dice = np.random.default_rng(2)
    found = []
    for i in range(count):
        mask = np.zeros((8, 12), dtype=np.uint8)
        mask[:, :5 + i] = 255
        pixels = dice.integers(0, 256, (8, 12, 3), dtype=np.uint8)
        found.append(Photo(Path(f"{i}.png"), pixels, f"caption {i}", None, mask))
    return Concept(stream, found, True, False)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_gradient_by_the_prediction_is_exactly_zero_outside_the_mask(gamma: float | None) -> None:
    made = batches(3, concepts=[masked(), dataclasses.replace(shaped("class", [(8, 8)] * 4))])(0)[0]
    assert made.mask is not None
    seen: list[torch.Tensor] = []

    def model(latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        seen.append(torch.randn_like(latents).requires_grad_())
        return seen[0]

    Objective(schedule(), 0.5, gamma)(model, made).total.backward()
    gradient = seen[0].grad
    assert gradient is not None
    outside = made.mask.expand_as(gradient) == 0
    assert outside[:3].any() and not outside[3:].any()
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside] != 0).all(), "inside, and over the whole of class images"


@given(st.integers(0, 7), st.integers(1, 8), st.sampled_from([2, 4, 8]))
def test_a_latent_counts_by_its_share_of_the_mask_and_not_at_all_outside(left: int, wide: int, scale: int) -> None:
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, left:left + wide] = 255
    found = masks.at_latents(mask, scale)
    assert found.shape == (16 // scale, 16 // scale)
    assert found.sum() * scale**2 == pytest.approx((mask > 0).sum())
    touched = mask.reshape(16 // scale, scale, 16 // scale, scale).any((1, 3))
    assert ((found > 0) == touched).all()


def test_a_mask_that_is_all_white_is_no_mask() -> None:
    """Means of 64 fp64 terms, summed and then divided in another order: 64 eps of the loss."""
    p, g, w = torch.randn(6, 1, 8, 8).double(), torch.randn(6, 1, 8, 8).double(), torch.rand(6).double()
    plain, white = (dreambooth_loss(p, g, 3, 0.7, w, mask) for mask in (None, torch.ones(6, 1, 8, 8).double()))
    assert float(white.total) == pytest.approx(float(plain.total), rel=64 * 2.3e-16)


def test_a_small_subject_counts_as_much_as_a_large_one() -> None:
    error, mask = torch.ones(2, 4, 8, 8), torch.ones(2, 1, 8, 8)
    mask[1, :, 1:, :] = 0
    found = dreambooth_loss(error, torch.zeros_like(error), 2, 1.0, None, mask)
    assert float(found.total) == 1.0


def test_a_crop_that_misses_the_subject_teaches_nothing_and_breaks_nothing() -> None:
    prediction = torch.randn(2, 1, 4, 4, requires_grad=True)
    dreambooth_loss(prediction, torch.zeros(2, 1, 4, 4), 2, 1.0, None, torch.zeros(2, 1, 4, 4)).total.backward()
    assert prediction.grad is not None and (prediction.grad == 0).all()


def test_a_mask_is_cropped_and_mirrored_with_its_photo() -> None:
    pixels = np.repeat(np.random.default_rng(0).integers(0, 2, (8, 12, 1), dtype=np.uint8) * 255, 3, axis=2)
    one = Concept("instance", [Photo(Path("a.png"), pixels, "caption 0", None, pixels[..., 0])], False, True)
    made = batches(1, concepts=[one], scale=1.0)
    for step in range(12):
        view = one.view(3, step, 0, 1)
        mask = made.mask(one, [view])
        assert mask is not None
        assert ((made.latents.pixels(one, [view])[0, 0] > 0).double() == mask[0, 0]).all()


def test_a_split_prior_pass_computes_the_same_with_masks_in_fp64() -> None:
    """The bound of step.halves: 2 n u times the sum of terms; n below 1000, u = 1.1e-16, gradients below 100."""
    found = []
    for split in (False, True):
        model = Toy()
        made = state(model)
        parts = batches(3, concepts=[masked(), masked(4, "class")])(0)
        train_step(made, parts, Objective(schedule(), 0.5, None, split), Engine(), None)
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-11, rtol=0) for a, b in zip(*found, strict=True))


def test_masks_come_from_a_folder_or_from_transparency(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    picture(tmp_path / "a.jpg", (32, 24))
    mask = Image.new("L", (64, 48))
    mask.paste(255, (0, 0, 32, 48))
    mask.save(tmp_path / "masks" / "a.png")
    [photo] = load_photos(list_photos(tmp_path), PROMPT, 24, mask=str(tmp_path / "masks"))
    assert photo.mask is not None and photo.mask.shape == photo.pixels.shape[:2]
    assert (photo.mask[:, :16] == 255).all() and (photo.mask[:, 16:] == 0).all()
    (tmp_path / "a.jpg").unlink()
    cut_out = Image.new("RGBA", (32, 24), (9, 9, 9, 0))
    cut_out.paste((1, 2, 3, 255), (16, 0, 32, 24))
    cut_out.save(tmp_path / "b.png")
    [photo] = load_photos(list_photos(tmp_path), PROMPT, 24, mask="alpha")
    assert photo.mask is not None and (photo.mask[:, 16:] == 255).all() and (photo.mask[:, :16] == 0).all()


def test_a_photo_without_a_usable_mask_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for name in ("none.png", "black.png", "other.png"):
        picture(tmp_path / name, (32, 24))
    Image.new("L", (32, 24)).save(tmp_path / "m" / "black.png")
    Image.new("L", (24, 32), 255).save(tmp_path / "m" / "other.png")
    sentence = told(tmp_path, mask=str(tmp_path / "m"))
    assert "none.png has no mask: put none.png into" in sentence
    assert "black.png has an empty mask" in sentence
    assert "other.png has 32 x 24 pixels and its mask other.png 24 x 32" in sentence
    assert "none.png has no transparency" in told(tmp_path, mask="alpha")


def test_a_mask_outside_the_centre_crop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    picture(tmp_path / "a.png", (256, 64))
    mask = Image.new("L", (256, 64))
    mask.paste(255, (0, 0, 20, 64))
    mask.save(tmp_path / "m" / "a.png")
    asked = [f"dataset.instance_dir={tmp_path}", f"dataset.mask={tmp_path / 'm'}"]
    with pytest.raises(UserError, match=r"mask of a\.png is outside the centre"):
        subjects.photos(recipe(*asked))


# -- prompt dropout -----------------------------------------------------------------------------------------------

def test_prompts_are_dropped_as_often_as_asked_and_the_same_however_a_step_is_cut() -> None:
    one = shaped(prompt_dropout=0.3)
    untold = [one.view(0, step, index, 4).untold for step in range(300) for index in range(4)]
    assert sum(untold) / len(untold) == pytest.approx(0.3, abs=0.04)  # 3 standard deviations of 1200 draws
    assert untold == [one.view(0, step, index, 4).untold for step in range(300) for index in range(4)]


def test_a_dropped_prompt_is_the_empty_one_and_changes_nothing_else() -> None:
    asked: list[str] = []

    def text(prompt: str) -> torch.Tensor:
        asked.append(prompt)
        return torch.tensor([[0]])

    plain, dropped = (batches(4, concepts=[shaped(prompt_dropout=p)]) for p in (0.0, 0.5))
    dropped.text = text
    for step in range(6):
        a, b = plain(step)[0], dropped(step)[0]
        assert a.latents.equal(b.latents) and a.noise.equal(b.noise) and a.timesteps.equal(b.timesteps)
    assert {"", "caption 0"} <= set(asked)


# -- several subjects ---------------------------------------------------------------------------------------------

def test_each_subject_has_its_own_folder_prompts_and_class() -> None:
    found = recipe(*TWO, "dataset.concepts.1.repeats=3", "dataset.concepts.1.class_dir=C")
    assert [one.instance_prompt for one in found.subjects] == ["a photo of a zwx dog", "a photo of a ohwx dog"]
    assert [one.instance_dir.name for one in found.subjects] == ["A", "B"]
    assert [one.class_dir and one.class_dir.name for one in found.subjects] == [None, "C"]
    assert "a photo of a ohwx dog on the beach" in found.sample_prompts
    assert len(found.classes) == 2


def test_subjects_of_one_class_share_its_images() -> None:
    assert len(recipe(*TWO).classes) == 1
    assert len(recipe(*TWO, "dataset.concepts.1.class_prompt=a photo of a cup").classes) == 2


def test_one_subject_is_the_run_itself() -> None:
    found = recipe()
    assert found.subjects == (found,)


def test_photos_of_all_subjects_come_with_their_own_words_and_repeats(tmp_path: Path) -> None:
    for folder, count in (("A", 3), ("B", 1)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            picture(tmp_path / folder / f"{i}.png", seed=i)
    found, repeats = subjects.photos(recipe(
        *TWO, f"dataset.concepts.0.instance_dir={tmp_path / 'A'}", f"dataset.concepts.1.instance_dir={tmp_path / 'B'}",
        "dataset.concepts.1.repeats=3"))
    assert [photo.caption for photo in found] == ["a photo of a zwx dog"] * 3 + ["a photo of a ohwx dog"]
    assert repeats == [1, 1, 1, 3]
    one = Concept("instance", found, True, False, repeats)
    seen = Counter(one.view(0, step, 0, 1).photo for step in range(12))
    assert seen == {0: 2, 1: 2, 2: 2, 3: 6}


@pytest.mark.parametrize("override, typed", [
    ("dataset.concepts.1.instance_dir=null", "dataset.concepts.1.instance_dir=DIR"),
    ("dataset.concepts.1.instance_prompt=' '", "dataset.concepts.1.instance_prompt="),
    ("dataset.concepts.0.class_prompt=null", "dataset.concepts.0.class_prompt="),
    ("dataset.instance_dir=A", "dataset.instance_dir=null"),
    ("dataset.concepts.1.instance_prompt=a photo of a zwx dog", "type another word"),
    ("memory.optimizer_in_backward=true dataset.buckets=true", "memory.optimizer_in_backward=false"),
    ("train.compile=true dataset.buckets=true", "train.compile=false"),
])
def test_what_is_wrong_with_subjects_is_one_sentence(override: str, typed: str) -> None:
    words = override.split(" d") if override.count("=") > 1 else [override]
    with pytest.raises(ConfigError) as raised:
        recipe(*TWO, *(word if word.startswith(("dataset", "memory", "train")) else f"d{word}" for word in words))
    [sentence] = raised.value.problems
    assert typed in sentence


@pytest.mark.parametrize("override", [
    "dataset.mask=alpha", "dataset.buckets=true", "dataset.prompt_dropout=0.1", "precision=tf32"])
def test_identity_changes_with_the_new_keys(override: str) -> None:
    assert identity(made(override)) != identity(made())


def test_identity_follows_the_content_of_every_subjects_folder(tmp_path: Path) -> None:
    for folder in "AB":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"one")
    asked = [*TWO, f"dataset.concepts.0.instance_dir={tmp_path}/A", f"dataset.concepts.1.instance_dir={tmp_path}/B"]
    before = identity(made(*asked))
    (tmp_path / "B/a.png").write_bytes(b"two")
    assert identity(made(*asked)) != before


def test_settings_name_the_subjects() -> None:
    assert json.loads(recipe(*TWO).settings()["dataset.concepts"])[1]["instance_prompt"] == "a photo of a ohwx dog"


@pytest.mark.parametrize("on", [True, False])
def test_tf32_is_of_matrix_products_and_of_convolutions(on: bool) -> None:
    from dreambooth.config.enums import Dtype
    from dreambooth.runtime.engine import accelerated

    torch.backends.cudnn.allow_tf32 = not on
    accelerated("cpu", Dtype.fp32, on)
    try:
        assert torch.backends.cuda.matmul.allow_tf32 is on
        assert torch.backends.cudnn.allow_tf32 is on
    finally:
        accelerated("cpu", Dtype.fp32)


def test_cut_takes_any_size() -> None:
    assert cut(np.zeros((9, 14, 3), dtype=np.uint8), (8, 12), None, False).shape == (8, 12, 3)


# -- whole runs ---------------------------------------------------------------------------------------------------

def real_project(folder: Path) -> list[str]:
    """Two subjects of two shapes each, one of them cut out, with everything switched on."""
    for name, sizes in (("A", [(64, 64), (80, 48)]), ("B", [(48, 80), (64, 64), (64, 60)])):
        (folder / name).mkdir()
        for i, (width, height) in enumerate(sizes):
            noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(noise)
            if name == "B":
                image = image.convert("RGBA")
                image.putalpha(Image.new("L", image.size, 0))
                image.paste((200, 30, 90, 255), (8, 8, 40, 40))
            image.save(folder / name / f"{i}.png")
    listing(folder / "A", {"file_name": "0.png", "text": "a photo of a zwx toy on the beach"})
    first, second = "dataset.concepts.0", "dataset.concepts.1"
    return ["name=demo", "dataset=concepts", f"{first}.instance_dir={folder}/A", f"{second}.instance_dir={folder}/B",
            f"{first}.instance_prompt=a photo of a zwx toy", f"{first}.class_prompt=a photo of a toy",
            f"{second}.instance_prompt=a photo of a ohwx car", f"{second}.class_prompt=a photo of a car",
            f"{second}.mask=alpha", f"{first}.repeats=2", "dataset.buckets=true", "dataset.prompt_dropout=0.3"]


def test_a_run_with_everything_goes_on_bit_for_bit_and_draws_every_subject(tmp_path: Path) -> None:
    from tests.support.faults import train
    from tests.support.runs import assert_same, the_run

    asked, whole, cut_short = real_project(tmp_path), tmp_path / "whole", tmp_path / "cut"
    assert train(whole, *asked, "train.max_train_steps=6", log=tmp_path / "out.txt") == 0
    assert train(cut_short, *asked, "train.max_train_steps=2") == 0
    assert train(cut_short, *asked, "train.max_train_steps=6") == 0
    assert_same(the_run(cut_short), the_run(whole))
    said = (tmp_path / "out.txt").read_text()
    assert "of 80 x 48" in said and "% of a photo is cropped" in said and "a photo of a ohwx car" in said
    assert "a photo of a zwx toy** or **a photo of a ohwx car" in (the_run(whole) / "model/README.md").read_text()
    assert len(list((whole / "class_images").iterdir())) == 2
