"""Colour profiles: training gets sRGB, and the names of runs and cached results follow the pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dreambooth.data import photo_checks
from dreambooth.data.index.file_hashes import conversion_mark, fingerprint
from dreambooth.data.photos import Photo, list_photos, load_photos
from tests.data.icc_profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    cmyk_profile,
    grey_profile,
    rgb_profile,
)
from tests.data.solid_photos import PROMPT, save_solid

P3 = rgb_profile(DISPLAY_P3)
SUFFIXES = [".jpg", ".png", ".webp", ".tiff"]


def load(folder: Path, resolution: int = 8) -> Photo:
    [photo] = load_photos(list_photos(folder), PROMPT, resolution)
    return photo


def save(path: Path, color: object, profile: bytes, mode: str = "RGB") -> None:
    Image.new(mode, (8, 8), color).save(path, icc_profile=profile, quality=100, lossless=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("stored, seen", [((97, 197, 81), (40, 200, 60)), ((211, 61, 52), (230, 40, 40))])
def test_display_p3_is_converted_to_srgb(
        folder: Path, suffix: str, stored: tuple[int, ...], seen: tuple[int, ...]) -> None:
    """Telephones write Display P3. The numbers are those of CSS Color 4, section 17."""
    save(folder / f"a{suffix}", stored, P3)
    photo = load(folder)
    assert np.abs(photo.pixels.astype(int) - seen).max() <= 3 and photo.remarks == ()


def test_transparency_stays_and_is_put_on_white_after_the_conversion(folder: Path) -> None:
    picture = Image.new("RGBA", (8, 8), (97, 197, 81, 255))
    picture.paste((97, 197, 81, 0), (4, 0, 8, 8))
    picture.save(folder / "a.png", icc_profile=P3)
    pixels = load(folder).pixels.astype(int)
    assert np.abs(pixels[:, :4] - (40, 200, 60)).max() <= 3 and (pixels[:, 4:] == 255).all()


def test_palettes_and_grey_photos_with_an_rgb_profile_are_converted(folder: Path) -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 97, 197, 81])
    palette.save(folder / "a.png", icc_profile=P3, transparency=0)
    save(folder / "b.png", 90, P3, "L")  # the tone curve of P3 is that of sRGB
    green, grey = load_photos(list_photos(folder), PROMPT, 8)
    assert np.abs(green.pixels.astype(int) - (40, 200, 60)).max() <= 3
    assert np.abs(grey.pixels.astype(int) - 90).max() <= 1


@pytest.mark.parametrize("dtype, stored", [("uint8", 100), ("uint16", 100 << 8)])
def test_grey_levels_are_converted_by_their_tone_curve(folder: Path, dtype: str, stored: int) -> None:
    """Gamma 1.8: (100 / 255) ** 1.8 is a light of 0.185, which sRGB stores as 120."""
    Image.fromarray(np.full((8, 8), stored, dtype)).save(folder / "a.png", icc_profile=grey_profile(1.8))
    assert np.abs(load(folder).pixels.astype(int) - 120).max() <= 1


@pytest.mark.parametrize("suffix", [".jpg", ".tiff"])
def test_cmyk_is_converted_by_its_own_profile(folder: Path, suffix: str) -> None:
    """One full ink of this printer leaves three quarters of the lightness: L* 75 is grey 185, not cyan."""
    save(folder / f"a{suffix}", (255, 0, 0, 0), cmyk_profile(), "CMYK")
    assert np.abs(load(folder).pixels.astype(int) - 185).max() <= 2


@pytest.mark.parametrize("profile, mode, color, words", [
    (b"not a profile" * 20, "RGB", (97, 197, 81), "damaged"), (P3[:200], "RGB", (97, 197, 81), "damaged"),
    (cmyk_profile(), "RGB", (97, 197, 81), "of CMYK"), (grey_profile(1.8), "RGB", (97, 197, 81), "of GRAY"),
    (P3, "CMYK", (10, 20, 30, 40), "of RGB"),
])
def test_a_profile_that_cannot_be_used_is_a_remark(
        folder: Path, profile: bytes, mode: str, color: tuple[int, ...], words: str) -> None:
    save_solid(folder / "a.tiff", color, mode=mode)
    before, name = load(folder).pixels, fingerprint(folder)
    save(folder / "a.tiff", color, profile, mode)
    photo = load(folder)
    assert (photo.pixels == before).all()
    [remark] = [line for line in photo_checks.warn([photo], 8) if "profile" in line]
    assert remark.startswith("a.tiff has a colour profile") and words in remark and remark.endswith("as sRGB")
    assert len(name) == len(fingerprint(folder))


@pytest.mark.parametrize("profile", [
    rgb_profile(SRGB), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_srgb_under_any_name_changes_no_pixel(folder: Path, profile: bytes) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png", icc_profile=profile)
    assert (load(folder).pixels == noise).all()


@pytest.mark.parametrize("profile, changed", [(P3, True), (rgb_profile(ADOBE_RGB, (2.2,)), True),
                                              (rgb_profile(SRGB), False), (b"acsp" * 40, False)])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_fingerprint_of_a_folder_changes_with_its_pixels(
        folder: Path, monkeypatch: pytest.MonkeyPatch, profile: bytes, changed: bool, suffix: str) -> None:
    """Earlier versions ignored profiles. A run or a score of other pixels must not be continued or reused."""
    save(folder / f"a{suffix}", (97, 197, 81), profile)
    now, as_mask = fingerprint(folder), fingerprint(folder, masks=True)
    assert bool(conversion_mark(folder)) == changed
    monkeypatch.setattr("dreambooth.data.color_profiles.is_converted", lambda content: False)
    assert (now != fingerprint(folder)) == changed
    assert as_mask == fingerprint(folder)  # a mask has no colours: its profile is not used
