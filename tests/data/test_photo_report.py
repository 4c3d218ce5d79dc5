"""The report on the photos of a run: how many are used, what is left out and why, and what is warned of."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dreambooth.config.recipe import Recipe
from dreambooth.data import photo_checks, photo_report
from dreambooth.data.photos import list_photos, load_photos
from dreambooth.data.subjects import load_subject_photos
from dreambooth.errors import UserError
from tests.data.noise_photos import PROMPT, TWO, recipe, save_noise

DEMO = cache(recipe)  # composing takes half a second


def report(folder: Path | None = None, demo: Recipe | None = None, **dataset: object) -> list[str]:
    demo = demo or DEMO()
    one = replace(demo, dataset=demo.dataset.copy_with(**dataset), instance_dir=folder or demo.instance_dir)
    return photo_report.describe_photos(one, load_subject_photos(one)[0]).split("\n")


def warnings_of(folder: Path, resolution: int = 64, **more: bool) -> list[str]:
    return photo_checks.warn(load_photos(list_photos(folder), PROMPT, resolution, **more), resolution)


def smooth(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Return a picture with large shapes and sharp edges, as photos have them."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.NEAREST)


def test_the_demo_has_five_photos_and_no_warning() -> None:
    [line] = report()
    assert line.startswith("5 photos in ") and "left out" not in line


def test_the_report_counts_photos_and_says_what_is_left_out(folder: Path) -> None:
    save_noise(folder / "a.png", (64, 64))
    for name in ("a.txt", "gone.caption", "tags.json", ".hidden.txt", "Thumbs.db", "metadata.jsonl"):
        (folder / name).write_text("a zwx" if name == "a.txt" else "")
    for name, photo in (("more/deep", "b.JPG"), ("masks", "a.png"), (".cache", "c.png"), ("notes", "x.md")):
        (folder / name).mkdir(parents=True)
        save_noise(folder / name / "x.png").rename(folder / name / photo)
    [first, *others] = report(folder, mask=f"{folder}/masks")
    assert first == f"1 photo in {folder}; left out:"
    assert others == [
        f"  more/deep/ has 1 photo, and subfolders are not searched: move them into {folder}, or type "
        f"dataset.instance_dir={folder}/more/deep",
        "  gone.caption: no photo has this name, and the caption of photo.jpg is in photo.txt or photo.caption",
        "  tags.json: captions are read from text files, and from metadata.jsonl or metadata.csv with file_name and "
        "text"]


def test_each_subject_has_its_line(tmp_path: Path) -> None:
    for name in "AB":
        (tmp_path / name).mkdir()
        for number in range(2 if name == "A" else 1):
            save_noise(tmp_path / name / f"{number}.png", (64, 64), 2 * ord(name) + number)
    folders = (f"dataset.concepts.0.instance_dir={tmp_path}/A", f"dataset.concepts.1.instance_dir={tmp_path}/B")
    assert report(demo=recipe(*TWO, *folders)) == [f"2 photos in {tmp_path}/A", f"1 photo in {tmp_path}/B"]


@pytest.mark.parametrize("subfolders, typed", [
    (["10_zwx dog"], 'type dataset.instance_dir="{}/10_zwx dog"'),
    (["train/a", "train/b"], "type dataset.instance_dir={0}/train/a for one of them, or dataset=concepts "
                             "dataset.concepts.0.instance_dir={0}/train/a dataset.concepts.1.instance_dir={0}/train/b"),
])
def test_a_folder_whose_photos_are_in_subfolders_is_an_error_that_names_them(
        folder: Path, subfolders: list[str], typed: str) -> None:
    """kohya's trainer and Hugging Face's imagefolder keep photos in subfolders."""
    for name in subfolders:
        (folder / name).mkdir(parents=True)
        save_noise(folder / name / "0.png")
    with pytest.raises(UserError, match="holds no photo itself, but its subfolders do") as raised:
        list_photos(folder)
    assert typed.format(folder) in str(raised.value)


# --- warnings -------------------------------------------------------------------------------------------------------


def test_small_and_narrow_photos_are_warned_of(folder: Path) -> None:
    for name, size in (("good", (300, 200)), ("dot", (1, 200)), ("panorama", (2000, 10)), ("tall", (64, 160))):
        save_noise(folder / f"{name}.png", size)
    assert warnings_of(folder) == [
        "dot.png (1 x 200 pixels) is enlarged 64 times to 64 x 64: use the original photo in its full size",
        "dot.png (1 x 200 pixels) loses 99.5% of its area when it is cropped to 64 x 64: crop it around the subject, "
        "or type dataset.buckets=true",
        "panorama.png (2000 x 10 pixels) is enlarged 6 times to 64 x 64: use the original photo in its full size",
        "panorama.png (2000 x 10 pixels) loses 99.5% of its area when it is cropped to 64 x 64: crop it around the "
        "subject, or type dataset.buckets=true",
        "tall.png (64 x 160 pixels) loses 60.0% of its area when it is cropped to 64 x 64: crop it around the subject, "
        "or type dataset.buckets=true"]
    assert not any("buckets=true" in line or "tall" in line for line in warnings_of(folder, bucketed=True))


def test_a_jpeg_that_is_decoded_downscaled_has_its_full_size(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    smooth(0, (640, 480)).save(folder / "a.jpg", exif=exif)
    [photo] = load_photos(list_photos(folder), PROMPT, 64)
    assert photo.original_size == (640, 480) and photo.pixels.shape[:2] == (85, 64)


def test_copies_of_a_photo_look_alike(folder: Path) -> None:
    for seed in range(3):
        smooth(seed, (300, 200)).save(folder / f"{seed}.png")
    assert warnings_of(folder) == []
    smooth(1, (300, 200)).resize((150, 100)).save(folder / "copy.jpg", quality=40)
    assert warnings_of(folder) == [
        "1.png, copy.jpg look alike: keep one of them, because a photo that is used more often is memorised"]


def test_a_blurred_photo_is_named(folder: Path) -> None:
    smooth(0, (128, 128)).save(folder / "sharp.png")
    smooth(1, (128, 128)).filter(ImageFilter.GaussianBlur(12)).save(folder / "blurred.png")
    Image.new("RGB", (128, 128), "grey").save(folder / "plain.png")
    assert warnings_of(folder, 128) == [
        "plain.png has almost no contrast: take another one, because nothing can be seen in it",
        "blurred.png is blurred: take a sharp one, because blur is learned too"]


@pytest.mark.parametrize("dtype, top, becomes", [
    ("int32", 255, "dark"), ("uint16", 4095, "dark"), ("uint16", 16383, "dark"), ("uint16", 65535, None),
    ("int32", 65535, None), ("int32", 10**6, "white where it exceeds 65535")])
def test_a_deep_photo_that_does_not_use_sixteen_bits_is_named(
        folder: Path, dtype: str, top: int, becomes: str | None) -> None:
    """8 bits in 32 become black, 12 or 14 bits in 16 almost black, and 20 bits in 32 white."""
    grey = np.asarray(smooth(0).convert("L"), dtype=np.float64)
    Image.fromarray(((grey - grey.min()) / np.ptp(grey) * top).round().astype(dtype)).save(folder / "a.tiff")
    found = [line for line in warnings_of(folder) if "bits" in line]
    assert found == ([f"a.tiff has values up to {top}, while white is 65535, and becomes {becomes}: save it with 8 "
                      "bits per channel"] if becomes else [])


@pytest.mark.parametrize("suffix, more", [(".gif", {}), (".webp", {"lossless": True}), (".png", {}), (".tiff", {})])
def test_a_photo_with_several_frames_is_named(folder: Path, suffix: str, more: dict[str, bool]) -> None:
    first, *others = [smooth(seed) for seed in range(3)]
    first.save(folder / f"a{suffix}", save_all=True, append_images=others, **more)
    smooth(7).save(folder / f"still{suffix}", **more)
    assert warnings_of(folder) == [
        f"a{suffix} has 3 frames, and only the first is used: save the others that you need as files of their own"]


def test_the_previews_in_a_jpeg_are_no_frames(folder: Path) -> None:
    """Telephones write JPEG files with further pictures, such as a depth map (format MPO)."""
    smooth(0).save(folder / "a.jpg", format="MPO", save_all=True, append_images=[smooth(1)])
    assert warnings_of(folder) == []


@pytest.mark.parametrize("instance_prompt, caption, words", [
    ("a photo of a dog, a toy", None, "has only words of the class prompt"),
    ("a photo of a zwx dog", "a dog on grass", "a.png: the caption does not name the subject: write zwx into it"),
    ("a photo of a zwx dog", "a ZWX dog on grass", None),
])
def test_a_text_that_does_not_name_the_subject_is_warned_of(
        folder: Path, instance_prompt: str, caption: str | None, words: str | None) -> None:
    save_noise(folder / "a.png", (64, 64))
    if caption:
        (folder / "a.txt").write_text(caption)
    lines = report(folder, instance_prompt=instance_prompt, class_prompt="a photo of a toy dog")
    assert len(lines) == (3 if words else 1) and (words or "") in lines[-1]
