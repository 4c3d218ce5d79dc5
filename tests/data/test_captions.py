"""Captions, the fingerprint of a folder of photos, crops and the range of values that the model gets."""

import hashlib
import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth.data.index.file_hashes import NO_FINGERPRINT, fingerprint
from dreambooth.data.photos import crop_to_square, list_photos, load_photos, to_model_range
from tests.data.solid_photos import BLUE, PROMPT, problem, save_solid

# --- captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, caption", [
    (b"a red dog", "a red dog"),
    (b"\xef\xbb\xbfa dog\r\n", "a dog"),
    ("  a café\nat night \n\n".encode(), "a café at night"),
])
def test_a_caption_file_is_read_as_one_line(folder, content, caption):
    save_solid(folder / "my.dog.png")
    (folder / "my.dog.txt").write_bytes(content)
    [photo] = load_photos(list_photos(folder), PROMPT, 8)
    assert photo.caption == caption and photo.path == folder / "my.dog.png"


def test_only_a_photo_without_a_caption_gets_the_prompt(folder):
    for name in ("a.png", "b.png", "c.PNG"):
        save_solid(folder / name)
    (folder / "b.txt").write_text("mine")
    (folder / "c.TXT").write_text("from Windows")
    assert [photo.caption for photo in load_photos(list_photos(folder), PROMPT, 8)] == [PROMPT, "mine", "from Windows"]


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b" \n", "is empty"), (b"\xef\xbb\xbf", "is empty"), ("café".encode("latin-1"), "UTF-8"),
    ("a dog".encode("utf-16"), "UTF-8"),
])
def test_an_unusable_caption_is_reported(folder, content, words):
    save_solid(folder / "dog.png")
    (folder / "dog.txt").write_bytes(content)
    assert "dog.txt" in problem(folder) and words in problem(folder)


def test_captions_are_read_from_the_files_of_kohyas_trainer_and_of_datasets(folder):
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png"):
        save_solid(folder / name)
    (folder / "a.caption").write_text("from kohya")
    (folder / "b.CAPTION").write_text("the same")
    (folder / "b.txt").write_text("the same")
    (folder / "metadata.csv").write_bytes(
        '\ufefffile_name,ok,text\r\nc.png,1,"two, ""quoted""\r\nlines"\r\nd.png,,café\r\n'.encode())
    captions = [photo.caption for photo in load_photos(list_photos(folder), PROMPT, 8)]
    assert captions == ["from kohya", "the same", 'two, "quoted" lines', "café", PROMPT]


@pytest.mark.parametrize("files, words", [
    ({"dog.txt": "one", "dog.caption": "two"}, "dog.png has a caption in dog.txt and another in dog.caption"),
    ({"dog.caption": "one", "metadata.csv": "file_name,text\ndog.png,two"},
     "dog.png has a caption in dog.caption and another in metadata.csv"),
    ({"dog.caption": " "}, "dog.caption is empty"),
    ({"metadata.csv": "file_name;text\ndog.png;a dog"}, "metadata.csv has the columns file_name;text: name"),
    ({"metadata.csv": "file_name,caption\ndog.png,a dog"}, "metadata.csv has the columns file_name, caption: name"),
    ({"metadata.csv": "file_name,text\ndog.png"}, "metadata.csv line 2 has an empty text"),
    ({"metadata.csv": 'file_name,text\ndog.png,"a dog\ncat.png,a cat'}, "(unexpected end of data): close its quotes"),
    ({"metadata.csv": f'file_name,text\ndog.png,"{"a dog " * 30_000}'}, "field larger than field limit"),
    ({"metadata.csv": "file_name,text\n,a dog"}, "metadata.csv line 2 names no photo"),
    ({"metadata.csv": "file_name,text\ngone.png,a dog"}, "metadata.csv line 2 names gone.png, which does not exist"),
    ({"metadata.csv": "file_name,text\ndog.png,a dog", "metadata.jsonl": '{"file_name": "dog.png", "text": "x"}'},
     "metadata.csv line 2 gives dog.png a second caption"),
])
def test_an_unusable_caption_of_another_trainers_folder_is_named(folder, files, words):
    save_solid(folder / "dog.png")
    for name, content in files.items():
        (folder / name).write_text(content)
    assert words in problem(folder)


def test_a_bad_photo_and_its_bad_caption_are_both_reported(folder):
    (folder / "dog.png").write_text("no photo")
    (folder / "dog.txt").touch()
    assert "dog.png" in problem(folder) and "dog.txt" in problem(folder)


# --- fingerprint ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda folder: save_solid(folder / "a.png", BLUE),
    lambda folder: save_solid(folder / "c.png"),
    lambda folder: (folder / "b.png").unlink(),
    lambda folder: (folder / "b.png").rename(folder / "c.png"),
    lambda folder: (folder / "a.txt").write_text("another"),
    lambda folder: (folder / "a.txt").unlink(),
    lambda folder: (folder / "b.txt").write_text("new"),
    lambda folder: (folder / "a.txt").rename(folder / "b.txt"),
    lambda folder: (folder / "b.caption").write_text("new"),
    lambda folder: (folder / "metadata.csv").write_text("file_name,text"),
], ids=["content", "added", "removed", "renamed", "caption", "caption gone", "caption added", "caption moved",
        "kohya's caption", "table"])
def test_the_fingerprint_changes_when_training_data_changes(folder, change):
    before = fingerprint(two_photos(folder))
    change(folder)
    assert before != fingerprint(folder) != NO_FINGERPRINT


@pytest.mark.parametrize("change", [
    lambda folder: os.utime(folder / "a.png", (1, 1)),
    lambda folder: (folder / ".DS_Store").write_bytes(b"x"),
    lambda folder: (folder / "README.txt").write_text("caption of nothing"),
], ids=["mtime", "desktop file", "stray text"])
def test_the_fingerprint_does_not_change_with_files_that_training_ignores(folder, change):
    before = fingerprint(two_photos(folder))
    change(folder)
    assert fingerprint(folder) == before
    assert len(bytes.fromhex(before)) == hashlib.sha256().digest_size


def test_the_fingerprint_does_not_depend_on_the_folders_path(folder, tmp_path):
    shutil.copytree(two_photos(folder), tmp_path / "elsewhere" / "deep")
    assert fingerprint(tmp_path / "elsewhere" / "deep") == fingerprint(folder) != NO_FINGERPRINT


def test_the_fingerprint_never_raises(folder, tmp_path):
    assert fingerprint(tmp_path / "missing") == fingerprint(folder) == NO_FINGERPRINT
    two_photos(folder)
    (folder / "gone.png").symlink_to("nowhere.png")
    assert fingerprint(folder) == NO_FINGERPRINT
    (folder / "gone.png").unlink()
    os.mkfifo(folder / "pipe.png")
    assert fingerprint(folder) == NO_FINGERPRINT


def two_photos(folder):
    save_solid(folder / "a.png")
    save_solid(folder / "b.png")
    (folder / "a.txt").write_text("a caption")
    return folder


# --- crops and ranges -----------------------------------------------------------------------------------------------

FRACTION = st.floats(0, 1, exclude_max=True)
SIZE = st.integers(1, 40)


def coordinates(height, width):
    """An image whose pixels are (row, column, 7), so that a crop shows where it was taken."""
    rows, columns = np.indices((height, width))
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


@given(SIZE, SIZE, SIZE, st.none() | st.tuples(FRACTION, FRACTION), st.booleans())
def test_a_crop_is_a_contiguous_square_inside_the_image(resolution, more_h, more_w, offset, flip):
    pixels = coordinates(resolution + more_h - 1, resolution + more_w - 1)
    crop = crop_to_square(pixels, resolution, offset, flip)
    assert crop.shape == (resolution, resolution, 3) and crop.dtype == np.uint8 and crop.flags.c_contiguous
    top, left = crop[0, 0, 0], crop[0].min(axis=0)[1]
    expected = pixels[top:top + resolution, left:left + resolution]
    assert (crop == (expected[:, ::-1] if flip else expected)).all()


@given(SIZE, SIZE, SIZE)
def test_flipping_a_crop_twice_gives_the_crop(resolution, more_h, more_w):
    pixels = coordinates(resolution + more_h, resolution + more_w)
    crop = crop_to_square(pixels, resolution, (0.3, 0.9), False)
    flipped = crop_to_square(pixels, resolution, (0.3, 0.9), True)
    assert (crop_to_square(flipped, resolution, None, True) == crop).all()
    assert (flipped[:, 0] == crop[:, -1]).all()


def test_crops_reach_every_position_and_the_first_fraction_is_vertical():
    pixels = coordinates(10, 13)
    tops = {int(crop_to_square(pixels, 8, (u, 0.0), False)[0, 0, 0]) for u in np.arange(0, 1, 0.01)}
    lefts = {int(crop_to_square(pixels, 8, (0.0, v), False)[0, 0, 1]) for v in np.arange(0, 1, 0.01)}
    assert (tops, lefts) == ({0, 1, 2}, {0, 1, 2, 3, 4, 5})
    assert tuple(crop_to_square(pixels, 8, (1 - 2**-53, 1 - 2**-53), False)[0, 0, :2]) == (2, 5)


def test_the_centre_crop_is_centred():
    assert tuple(crop_to_square(coordinates(8, 20), 8, None, False)[0, 0, :2]) == (0, 6)


def test_a_crop_is_a_copy():
    pixels = coordinates(8, 8)
    crop_to_square(pixels, 8, None, False)[:] = 0
    assert (pixels == coordinates(8, 8)).all()


def test_the_model_range_is_minus_one_to_one_channels_first():
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[..., 1] = 255
    pixels[..., 2] = 51
    tensor = to_model_range(pixels)
    assert tensor.shape == (3, 4, 6) and tensor.dtype == np.float32 and tensor.flags.c_contiguous
    assert (tensor[0] == -1).all() and (tensor[1] == 1).all() and tensor[2] == pytest.approx(-0.6)
