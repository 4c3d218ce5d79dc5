"""Batches: captions, HEIC, aspect-ratio buckets, masks, prompt dropout, several subjects, and a whole run with all."""

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
from dreambooth.data.batches import Batches, PhotoSet
from dreambooth.data.latent_cache import LatentStore
from dreambooth.data.photos import NO_FINGERPRINT, Photo, crop_to_size, fingerprint, list_photos, load_photos
from dreambooth.errors import ConfigError, UserError
from dreambooth.runs.identity import identity
from dreambooth.runtime.engine import Engine
from dreambooth.training.instance_loss import instance_loss
from dreambooth.training.loss import dreambooth_loss
from dreambooth.training.step import Objective, train_step
from tests.support.configs import compose_config
from tests.support.toy_model import ToyModel, make_batches, make_schedule, make_state, train_steps

PROMPT = "a photo of a zwx dog"
TWO = ("dataset=concepts", "dataset.concepts.0.instance_dir=A",
       "dataset.concepts.0.instance_prompt=a photo of a zwx dog", "dataset.concepts.0.class_prompt=a photo of a dog",
       "dataset.concepts.1.instance_dir=B",
       "dataset.concepts.1.instance_prompt=a photo of a ohwx dog", "dataset.concepts.1.class_prompt=a photo of a dog",
       "dataset.allow_drawings=true")


def recipe(*overrides: str) -> Recipe:
    return resolve(load(compose_config(*overrides)), Path("runs/x"))


def save_noise(path: Path, size: tuple[int, int] = (16, 16), seed: int = 0) -> Path:
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def loading_error(folder: Path, **more: object) -> str:
    with pytest.raises(UserError) as raised:
        load_photos(list_photos(folder), PROMPT, 16, **more)  # type: ignore[arg-type]
    return str(raised.value)


# -- captions and HEIC --------------------------------------------------------------------------------------------

def write_metadata(folder: Path, *lines: object) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))


def test_captions_are_read_from_metadata_jsonl_as_in_datasets(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save_noise(tmp_path / name)
    write_metadata(
        tmp_path, {"file_name": "a.png", "text": "a zwx dog\n asleep"}, "", {"file_name": "b.png", "text": "two"})
    (tmp_path / "b.txt").write_text("two")
    captions = [photo.caption for photo in load_photos(list_photos(tmp_path), PROMPT, 16)]
    assert captions == ["a zwx dog asleep", "two", PROMPT]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85"])
def test_a_caption_in_metadata_may_contain_other_line_separators(tmp_path: Path, end: str) -> None:
    for name in ("a.png", "b.png"):
        save_noise(tmp_path / name)
    lines = [json.dumps({"file_name": name, "text": f"one{end}two"}, ensure_ascii=False) for name in ("a.png", "b.png")]
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(lines).encode())
    assert [photo.caption for photo in load_photos(list_photos(tmp_path), PROMPT, 16)] == ["one two"] * 2


@pytest.mark.parametrize("line, words", [
    ("{", "line 1 is not"), ({"file_name": "a.png"}, "line 1 is not"),
    ({"file_name": "a.png", "text": 3}, "line 1 is not"),
    ({"file_name": "a.png", "text": " "}, "empty text"),
    ({"file_name": "gone.png", "text": "x"}, "which does not exist"),
    ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}', "second caption"),
    ({"file_name": "a.png", "text": "another"}, "a caption in a.txt and another in metadata.jsonl"),
])
def test_an_unusable_line_of_metadata_is_named(tmp_path: Path, line: object, words: str) -> None:
    save_noise(tmp_path / "a.png")
    if "another" in str(line):
        (tmp_path / "a.txt").write_text("mine")
    write_metadata(tmp_path, line)
    assert words in loading_error(tmp_path)


def test_the_fingerprint_includes_metadata(tmp_path: Path) -> None:
    save_noise(tmp_path / "a.png")
    before = fingerprint(tmp_path)
    write_metadata(tmp_path, {"file_name": "a.png", "text": "x"})
    assert before != fingerprint(tmp_path) != NO_FINGERPRINT


def test_a_heic_photo_is_read_if_the_extra_is_installed(tmp_path: Path) -> None:
    assert "HEIF" in image_formats.readable_formats()
    Image.new("RGB", (48, 32), (200, 30, 90)).save(tmp_path / "IMG_1.HEIC", quality=95)
    [photo] = load_photos(list_photos(tmp_path), PROMPT, 32)
    assert photo.pixels.shape == (32, 48, 3)
    assert np.abs(photo.pixels.astype(int) - (200, 30, 90)).max() <= 4


def test_a_heic_photo_without_the_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (48, 32)).save(tmp_path / "IMG_1.HEIC") if image_formats.readable_formats() else None
    monkeypatch.setattr(image_formats, "readable_formats", lambda: image_formats.FORMATS)
    assert "pip install 'dreambooth[heic]'" in loading_error(tmp_path)


# -- buckets ------------------------------------------------------------------------------------------------------

@given(st.integers(200, 4000), st.floats(0.5, 2.0))
def test_at_512_no_photo_from_1_2_to_2_1_loses_more_than_5_percent(width: int, aspect: float) -> None:
    height = min(2 * width, max(-(-width // 2), round(width / aspect)))
    assert aspect_buckets.cropped_fraction(height, width, aspect_buckets.nearest_bucket(height, width, 512)) <= 0.05


def test_the_largest_cropped_fraction_is_what_the_docs_say() -> None:
    shapes = [(round(4096 * 2**(i / 2000)), 4096) for i in range(-2000, 2001)]

    def largest(resolution: int) -> float:
        return max(aspect_buckets.cropped_fraction(height, width, aspect_buckets.nearest_bucket(
            height, width, resolution)) for height, width in shapes)

    assert 0.016 < largest(512) <= 0.0165
    assert 0.16 < largest(64) < 0.17


@pytest.mark.parametrize("resolution", [64, 512, 768, 1024])
def test_sizes_are_in_steps_of_8_pixels_and_no_larger_than_the_square(resolution: int) -> None:
    sizes = aspect_buckets.bucket_sizes(resolution)
    assert (resolution, resolution) in sizes
    for height, width in sizes:
        assert height % 8 == width % 8 == 0 and height * width <= resolution**2
        assert max(height, width) <= 2 * min(height, width) and (width, height) in sizes
    assert resolution != 512 or {(360, 720), (720, 360)} <= set(sizes)


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 200), st.floats(0.5, 2.0))
def test_a_loaded_photo_just_covers_its_bucket(width: int, aspect: float) -> None:
    image = Image.new("RGB", (width, max(1, round(width / aspect))))
    size = aspect_buckets.nearest_bucket(image.height, image.width, 64)
    pixels = np.array(photos._resize(image, size))
    assert pixels.shape[0] >= size[0] and pixels.shape[1] >= size[1]
    assert pixels.shape[0] == size[0] or pixels.shape[1] == size[1]


SHAPES = [(8, 8), (8, 8), (8, 8), (16, 4), (16, 4), (4, 16)]


def bucketed_set(name: str = "instance", shapes: list[tuple[int, int]] = SHAPES, **more: object) -> PhotoSet:
    """Photos of several sizes; the last digit of a caption is the photo's number."""
    generator = np.random.default_rng(1)
    photos = [Photo(Path(f"{i}.png"), generator.integers(0, 256, (h, w, 3), dtype=np.uint8), f"caption {i}", (h, w))
              for i, (h, w) in enumerate(shapes)]
    return PhotoSet(name, photos, True, False, **more)  # type: ignore[arg-type]


def bucketed_batches(*split: int, **more: object) -> Batches:
    """Batches with buckets; `split` is batch size, accumulation, number of processes and rank."""
    photo_sets = [bucketed_set(), bucketed_set("class", [(8, 8)] * 4)]
    return make_batches(*split, photo_sets=photo_sets, **more)  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 40))
def test_with_buckets_a_sample_does_not_depend_on_how_a_step_is_split(
        batch: int, accumulation: int, world: int, step: int) -> None:
    def rows(parts: list[Batches]) -> list[list[float]]:
        halves = [half for batches in parts for micro in batches(step) for half in micro.halves()]
        return sorted([float(h.text[i]), *h.latents[i].flatten().tolist(), *h.noise[i].flatten().tolist()]
                      for h in halves for i in range(len(h.timesteps)))

    parts = [bucketed_batches(batch, accumulation, world, rank) for rank in range(world)]
    assert rows(parts) == rows([bucketed_batches(batch * accumulation * world)])


def test_a_step_has_one_size_and_every_photo_comes_equally_often() -> None:
    photo_set, seen = bucketed_set(), Counter()
    for step in range(6 * 4):
        views = [photo_set.view(0, step, index, 3) for index in range(3)]
        assert len({photo_set.photos[view.photo].size for view in views}) == 1
        seen.update(view.photo for view in views)
    assert set(seen.values()) == {12}


def test_sizes_have_another_order_in_each_round() -> None:
    photo_set = bucketed_set()
    rounds = [[photo_set.photos[photo_set.view(0, step, 0, 1).photo].size for step in range(r * 6, r * 6 + 6)]
              for r in range(5)]
    assert all(Counter(sizes) == Counter(SHAPES) for sizes in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_accumulation_equals_one_batch_with_buckets_in_fp64() -> None:
    """The bound of the test without buckets in tests/training/test_step.py: lr x 512 eps / |g|, below 1e-9 per step."""
    whole, accumulated = ToyModel(), ToyModel()
    train_steps(whole, bucketed_batches(8), 4)
    train_steps(accumulated, bucketed_batches(1, 8), 4)
    for x, y in zip(whole.parameters(), accumulated.parameters(), strict=True):
        assert torch.allclose(x, y, atol=1e-9, rtol=0)


def test_a_step_with_buckets_does_not_depend_on_earlier_calls() -> None:
    fresh, used = bucketed_batches(2), bucketed_batches(2)
    for step in range(9):
        used(step)
    for a, b in zip(fresh(9)[0].halves(), used(9)[0].halves(), strict=True):
        assert a.latents.equal(b.latents) and a.text.equal(b.text)


@pytest.mark.parametrize("where", ["device", "disk"])
def test_cached_latents_of_buckets_equal_uncached_ones(where: str, tmp_path: Path) -> None:
    from dreambooth.config.enums import LatentCache

    cached, plain = bucketed_batches(2), bucketed_batches(2)
    cached.latents.store = LatentStore(LatentCache(where), torch.device("cpu"), tmp_path)
    for photo_set in cached.photo_sets:
        cached.latents.fill(photo_set, lambda count: None)
    for step in range(8):
        for a, b in zip(cached(step)[0].halves(), plain(step)[0].halves(), strict=True):
            assert a.latents.equal(b.latents)


def test_instance_loss_accepts_photos_of_every_size() -> None:
    model = ToyModel()
    make_state(model)
    assert instance_loss(SimpleNamespace(batches=bucketed_batches(1), objective=Objective(make_schedule()),  # type: ignore[arg-type]
                                         trained=model)) > 0


def test_with_one_bucket_batches_equal_those_without_buckets() -> None:
    one_bucket = bucketed_set(shapes=[(8, 8)] * 5)
    without = dataclasses.replace(one_bucket, photos=[dataclasses.replace(p, size=None) for p in one_bucket.photos])
    plain, bucketed = ([batch.noise for step in range(5) for batch in make_batches(photo_sets=[photo_set])(step)]
                       for photo_set in (without, one_bucket))
    assert all(a.equal(b) for a, b in zip(plain, bucketed, strict=True))


# -- masks --------------------------------------------------------------------------------------------------------

def masked_set(count: int = 3, name: str = "instance") -> PhotoSet:
    """Photos of 8 x 12 whose mask is the left part of the image, without the last columns of its centre crop."""
    generator = np.random.default_rng(2)
    photos = []
    for i in range(count):
        mask = np.zeros((8, 12), dtype=np.uint8)
        mask[:, :5 + i] = 255
        pixels = generator.integers(0, 256, (8, 12, 3), dtype=np.uint8)
        photos.append(Photo(Path(f"{i}.png"), pixels, f"caption {i}", None, mask))
    return PhotoSet(name, photos, True, False)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_gradient_of_the_prediction_is_exactly_zero_outside_the_mask(gamma: float | None) -> None:
    batch = make_batches(3, photo_sets=[masked_set(), bucketed_set("class", [(8, 8)] * 4)])(0)[0]
    assert batch.mask is not None
    seen: list[torch.Tensor] = []

    def model(latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        seen.append(torch.randn_like(latents).requires_grad_())
        return seen[0]

    Objective(make_schedule(), 0.5, gamma)(model, batch).total.backward()
    gradient = seen[0].grad
    assert gradient is not None
    outside = batch.mask.expand_as(gradient) == 0
    assert outside[:3].any() and not outside[3:].any()
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside] != 0).all(), "zero inside a mask, or in class images, which have none"


@given(st.integers(0, 7), st.integers(1, 8), st.sampled_from([2, 4, 8]))
def test_a_latents_weight_is_its_share_of_the_mask_and_zero_outside(left: int, wide: int, scale: int) -> None:
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, left:left + wide] = 255
    weights = masks.downscale_to_latents(mask, scale)
    assert weights.shape == (16 // scale, 16 // scale)
    assert weights.sum() * scale**2 == pytest.approx((mask > 0).sum())
    touched = mask.reshape(16 // scale, scale, 16 // scale, scale).any((1, 3))
    assert ((weights > 0) == touched).all()


def test_a_white_mask_equals_no_mask() -> None:
    """Means of 64 fp64 terms, summed and divided in another order: a relative error of 64 eps."""
    p, g, w = torch.randn(6, 1, 8, 8).double(), torch.randn(6, 1, 8, 8).double(), torch.rand(6).double()
    plain, white = (dreambooth_loss(p, g, 3, 0.7, w, mask) for mask in (None, torch.ones(6, 1, 8, 8).double()))
    assert float(white.total) == pytest.approx(float(plain.total), rel=64 * 2.3e-16)


def test_a_small_masked_area_weighs_as_much_as_a_large_one() -> None:
    error, mask = torch.ones(2, 4, 8, 8), torch.ones(2, 1, 8, 8)
    mask[1, :, 1:, :] = 0
    losses = dreambooth_loss(error, torch.zeros_like(error), 2, 1.0, None, mask)
    assert float(losses.total) == 1.0


def test_a_crop_outside_the_mask_has_a_zero_gradient_and_no_nan() -> None:
    prediction = torch.randn(2, 1, 4, 4, requires_grad=True)
    dreambooth_loss(prediction, torch.zeros(2, 1, 4, 4), 2, 1.0, None, torch.zeros(2, 1, 4, 4)).total.backward()
    assert prediction.grad is not None and (prediction.grad == 0).all()


def test_a_mask_is_cropped_and_mirrored_with_its_photo() -> None:
    pixels = np.repeat(np.random.default_rng(0).integers(0, 2, (8, 12, 1), dtype=np.uint8) * 255, 3, axis=2)
    photo_set = PhotoSet("instance", [Photo(Path("a.png"), pixels, "caption 0", None, pixels[..., 0])], False, True)
    batches = make_batches(1, photo_sets=[photo_set], scale=1.0)
    for step in range(12):
        view = photo_set.view(3, step, 0, 1)
        mask = batches.loss_mask(photo_set, [view])
        assert mask is not None
        assert ((batches.latents.pixels(photo_set, [view])[0, 0] > 0).double() == mask[0, 0]).all()


def test_a_split_prior_pass_computes_the_same_with_masks_in_fp64() -> None:
    """The bound of step._halves: 2 n u times the sum of terms; n below 1000, u = 1.1e-16, gradients below 100."""
    weights = []
    for split in (False, True):
        model = ToyModel()
        state = make_state(model)
        parts = make_batches(3, photo_sets=[masked_set(), masked_set(4, "class")])(0)
        train_step(state, parts, Objective(make_schedule(), 0.5, None, split), Engine(), None)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-11, rtol=0) for a, b in zip(*weights, strict=True))


def test_masks_are_read_from_a_folder_or_from_transparency(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    save_noise(tmp_path / "a.jpg", (32, 24))
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
        save_noise(tmp_path / name, (32, 24))
    Image.new("L", (32, 24)).save(tmp_path / "m" / "black.png")
    Image.new("L", (24, 32), 255).save(tmp_path / "m" / "other.png")
    sentence = loading_error(tmp_path, mask=str(tmp_path / "m"))
    assert "none.png has no mask: put none.png into" in sentence
    assert "black.png has an empty mask" in sentence
    assert "other.png has 32 x 24 pixels and its mask other.png 24 x 32" in sentence
    assert "none.png has no transparency" in loading_error(tmp_path, mask="alpha")


def test_a_mask_outside_the_centre_crop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_noise(tmp_path / "a.png", (256, 64))
    mask = Image.new("L", (256, 64))
    mask.paste(255, (0, 0, 20, 64))
    mask.save(tmp_path / "m" / "a.png")
    overrides = [f"dataset.instance_dir={tmp_path}", f"dataset.mask={tmp_path / 'm'}"]
    with pytest.raises(UserError, match=r"mask of a\.png is outside the centre"):
        subjects.load_subject_photos(recipe(*overrides))


# -- prompt dropout -----------------------------------------------------------------------------------------------

def test_prompts_are_dropped_with_the_given_probability_and_reproducibly() -> None:
    photo_set = bucketed_set(prompt_dropout=0.3)
    dropped = [photo_set.view(0, step, index, 4).drop_prompt for step in range(300) for index in range(4)]
    assert sum(dropped) / len(dropped) == pytest.approx(0.3, abs=0.04)  # 3 standard deviations of 1200 draws
    assert dropped == [photo_set.view(0, step, index, 4).drop_prompt for step in range(300) for index in range(4)]


def test_a_dropped_prompt_is_empty_and_changes_nothing_else() -> None:
    prompts: list[str] = []

    def encode_prompt(prompt: str) -> torch.Tensor:
        prompts.append(prompt)
        return torch.tensor([[0]])

    plain, dropped = (make_batches(4, photo_sets=[bucketed_set(prompt_dropout=p)]) for p in (0.0, 0.5))
    dropped.encode_prompt = encode_prompt
    for step in range(6):
        a, b = plain(step)[0], dropped(step)[0]
        assert a.latents.equal(b.latents) and a.noise.equal(b.noise) and a.timesteps.equal(b.timesteps)
    assert {"", "caption 0"} <= set(prompts)


# -- several subjects ---------------------------------------------------------------------------------------------

def test_each_subject_has_its_own_folder_prompts_and_class() -> None:
    resolved = recipe(*TWO, "dataset.concepts.1.repeats=3", "dataset.concepts.1.class_dir=C")
    first, second = resolved.subject_recipes
    assert [first.instance_prompt, second.instance_prompt] == ["a photo of a zwx dog", "a photo of a ohwx dog"]
    assert [first.instance_dir.name, second.instance_dir.name] == ["A", "B"]
    assert first.class_dir is None and second.class_dir is not None and second.class_dir.name == "C"
    assert "a photo of a ohwx dog on the beach" in resolved.sample_prompts
    assert len(resolved.class_recipes) == 2


def test_subjects_of_one_class_share_its_images() -> None:
    assert len(recipe(*TWO).class_recipes) == 1
    assert len(recipe(*TWO, "dataset.concepts.1.class_prompt=a photo of a cup").class_recipes) == 2


def test_with_one_subject_its_recipe_is_that_of_the_run() -> None:
    resolved = recipe()
    assert resolved.subject_recipes == (resolved,)


def test_photos_of_all_subjects_have_their_own_captions_and_repeats(tmp_path: Path) -> None:
    for folder, count in (("A", 3), ("B", 1)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            save_noise(tmp_path / folder / f"{i}.png", seed=i)
    loaded, repeats = subjects.load_subject_photos(recipe(
        *TWO, f"dataset.concepts.0.instance_dir={tmp_path / 'A'}", f"dataset.concepts.1.instance_dir={tmp_path / 'B'}",
        "dataset.concepts.1.repeats=3"))
    assert [photo.caption for photo in loaded] == ["a photo of a zwx dog"] * 3 + ["a photo of a ohwx dog"]
    assert repeats == [1, 1, 1, 3]
    photo_set = PhotoSet("instance", loaded, True, False, repeats)
    seen = Counter(photo_set.view(0, step, 0, 1).photo for step in range(12))
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
def test_an_error_in_a_subject_is_one_sentence_that_says_what_to_type(override: str, typed: str) -> None:
    words = override.split(" d") if override.count("=") > 1 else [override]
    with pytest.raises(ConfigError) as raised:
        recipe(*TWO, *(word if word.startswith(("dataset", "memory", "train")) else f"d{word}" for word in words))
    [sentence] = raised.value.problems
    assert typed in sentence


@pytest.mark.parametrize("override", [
    "dataset.mask=alpha", "dataset.buckets=true", "dataset.prompt_dropout=0.1", "precision=tf32"])
def test_identity_changes_with_later_keys(override: str) -> None:
    assert identity(compose_config(override)) != identity(compose_config())


def test_identity_follows_the_content_of_every_subjects_folder(tmp_path: Path) -> None:
    for folder in "AB":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"one")
    overrides = [*TWO, f"dataset.concepts.0.instance_dir={tmp_path}/A",
                 f"dataset.concepts.1.instance_dir={tmp_path}/B"]
    before = identity(compose_config(*overrides))
    (tmp_path / "B/a.png").write_bytes(b"two")
    assert identity(compose_config(*overrides)) != before


def test_settings_contain_the_subjects() -> None:
    assert json.loads(recipe(*TWO).settings()["dataset.concepts"])[1]["instance_prompt"] == "a photo of a ohwx dog"


@pytest.mark.parametrize("on", [True, False])
def test_tf32_applies_to_matrix_products_and_convolutions(on: bool) -> None:
    from dreambooth.config.enums import Dtype
    from dreambooth.runtime.engine import create_engine

    torch.backends.cudnn.allow_tf32 = not on
    create_engine("cpu", Dtype.fp32, on)
    try:
        assert torch.backends.cuda.matmul.allow_tf32 is on
        assert torch.backends.cudnn.allow_tf32 is on
    finally:
        create_engine("cpu", Dtype.fp32)


def test_photos_can_be_cropped_to_any_size() -> None:
    assert crop_to_size(np.zeros((9, 14, 3), dtype=np.uint8), (8, 12), None, False).shape == (8, 12, 3)


# -- whole runs ---------------------------------------------------------------------------------------------------

def write_full_project(folder: Path) -> list[str]:
    """Write photos of two subjects in several shapes, one subject with transparency.

    Returns the overrides of a run that uses them with every data option on."""
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
    write_metadata(folder / "A", {"file_name": "0.png", "text": "a photo of a zwx toy on the beach"})
    first, second = "dataset.concepts.0", "dataset.concepts.1"
    return ["name=demo", "dataset=concepts", f"{first}.instance_dir={folder}/A", f"{second}.instance_dir={folder}/B",
            f"{first}.instance_prompt=a photo of a zwx toy", f"{first}.class_prompt=a photo of a toy",
            f"{second}.instance_prompt=a photo of a ohwx car", f"{second}.class_prompt=a photo of a car",
            f"{second}.mask=alpha", f"{first}.repeats=2", "dataset.buckets=true", "dataset.prompt_dropout=0.3"]


def test_a_run_with_every_data_option_resumes_bit_for_bit(tmp_path: Path) -> None:
    from tests.support.faults import train
    from tests.support.runs import assert_same, the_run

    overrides, whole, resumed = write_full_project(tmp_path), tmp_path / "whole", tmp_path / "resumed"
    assert train(whole, *overrides, "train.max_train_steps=6", log=tmp_path / "out.txt") == 0
    assert train(resumed, *overrides, "train.max_train_steps=2") == 0
    assert train(resumed, *overrides, "train.max_train_steps=6") == 0
    assert_same(the_run(resumed), the_run(whole))
    output = (tmp_path / "out.txt").read_text()
    assert "of 80 x 48" in output and "% of a photo is cropped" in output and "a photo of a ohwx car" in output
    assert "a photo of a zwx toy** or **a photo of a ohwx car" in (the_run(whole) / "model/README.md").read_text()
    assert len(list((whole / "class_images").iterdir())) == 2
