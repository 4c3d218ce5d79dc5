"""Batches: captions of metadata.jsonl, HEIC, aspect-ratio buckets, original size and crop."""

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

from dreambooth.data import aspect_buckets, image_formats, photos
from dreambooth.data.batches import Batches, encode_batch_size
from dreambooth.data.index.file_hashes import NO_FINGERPRINT, fingerprint
from dreambooth.data.latent_cache import LatentStore
from dreambooth.data.photo_set import PhotoSet
from dreambooth.data.photos import Photo, crop_to_size, list_photos, load_photos
from dreambooth.training.instance_loss import instance_loss
from dreambooth.training.step import Objective
from tests.data.noise_photos import PROMPT, SHAPES, bucketed_set, loading_error, save_noise, write_metadata
from tests.support.toy_model import ToyModel, make_batches, make_schedule, make_state, train_steps


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
        cached.latents.fill(photo_set, lambda count: None, 16)
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


# -- original size and crop ---------------------------------------------------------------------------------------

def test_size_and_crop_describe_the_pixels_of_each_sample() -> None:
    generator = np.random.default_rng(0)
    loaded = [Photo(Path(f"{i}.png"), generator.integers(0, 256, (8 + i, 12, 3), dtype=np.uint8), f"caption {i}",
                    original=(80 + i, 120)) for i in range(4)]
    batches = make_batches(4, photo_sets=[PhotoSet("instance", loaded, False, True)], with_size_and_crop=True)
    for step in range(3):
        [[samples]] = batches.draw(step)
        assert {view.flip for view in samples.views} == {False, True}
        for view, pixels, row in zip(samples.views, samples.pixels, samples.size_and_crop.int(), strict=True):
            photo = loaded[view.photo]
            height, width, top, left, rows, columns = row.tolist()
            assert (height, width) == photo.original and (rows, columns) == (8, 8)
            mirrored = photo.pixels[:, ::-1] if view.flip else photo.pixels
            assert (photos.to_model_range(mirrored[top:top + rows, left:left + columns]) == pixels.numpy()).all()


def test_the_halves_of_a_batch_keep_their_size_and_crop() -> None:
    [batch] = make_batches(2, with_size_and_crop=True)(1)
    [plain] = make_batches(2)(1)
    halves = batch.halves()
    assert batch.size_and_crop.shape == (4, 6) and plain.size_and_crop is None
    assert batch.size_and_crop.equal(torch.cat([half.size_and_crop for half in halves]))
    [bucketed] = bucketed_batches(2, with_size_and_crop=True)(1)
    assert [half.size_and_crop.shape for half in bucketed.halves()] == [(2, 6), (2, 6)]


def test_the_loss_gives_the_model_size_and_crop_if_it_uses_them() -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    class Recording(ToyModel):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs[3:])
            return super().forward(*inputs[:3])

    model = Recording()
    make_state(model)
    for used in (True, False):
        batches, objective = make_batches(2, with_size_and_crop=used), Objective(make_schedule())
        [batch] = batches(1)
        objective(model, batch)
        instance_loss(SimpleNamespace(batches=batches, objective=objective, trained=model))  # type: ignore[arg-type]
        assert all(len(more) == used for more in seen)
        if used:
            assert seen[0][0].equal(batch.size_and_crop)
            assert seen[1][0].equal(torch.tensor([[8.0, 12, 0, 2, 8, 8]] * 8)), "the centre crop of the first photo"
        seen.clear()


def test_photos_can_be_cropped_to_any_size() -> None:
    assert crop_to_size(np.zeros((9, 14, 3), dtype=np.uint8), (8, 12), None, False).shape == (8, 12, 3)


@pytest.mark.parametrize("resolution, device, photos", [
    (64, "cpu", 16), (96, "cpu", 4), (256, "cpu", 1), (512, "cpu", 1), (64, "cuda", 16), (256, "cuda", 16),
    (512, "cuda", 4), (1024, "cuda", 1)])
def test_the_vae_encodes_as_many_photos_at_a_time_as_help(resolution: int, device: str, photos: int) -> None:
    assert encode_batch_size(resolution, device) == photos


def test_a_cache_file_of_a_gpu_holds_whole_batches_of_a_cpu() -> None:
    for resolution in range(8, 2049, 8):
        assert encode_batch_size(resolution, "cuda") % encode_batch_size(resolution, "cpu") == 0
