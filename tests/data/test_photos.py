"""Loading photos: training gets the pixels that a viewer shows, and unusable files are named."""

import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dreambooth.data import photos
from dreambooth.data.photos import list_photos, load_photos
from dreambooth.errors import UserError
from tests.data.solid_photos import BLUE, GREEN, ORIENTATION, PROMPT, RED, WHITE, pixels_of, problem, save_solid

STORED_AS = {  # orientation -> how a camera stores the upright picture (each is the inverse of what a viewer does)
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def four_corners(size=(16, 24)):
    """An image whose corners all differ, so that every rotation or mirroring changes it."""
    width, height = size
    picture = Image.new("RGB", size, RED)
    picture.paste(GREEN, (width // 2, 0, width, height // 2))
    picture.paste(BLUE, (0, height // 2, width // 2, height))
    picture.paste((255, 255, 0), (width // 2, height // 2, width, height))
    return picture


# --- which files are photos -----------------------------------------------------------------------------------------


def test_photos_are_sorted_by_the_bytes_of_their_names_not_by_directory_order(folder, monkeypatch):
    names = ["b.png", "é.png", "a10.png", "Z.png", "a2.png", "a.png"]
    for name in names:
        save_solid(folder / name)
    on_disk = [folder / name for name in names]
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(on_disk))
    assert [path.name for path in list_photos(folder)] == ["Z.png", "a.png", "a10.png", "a2.png", "b.png", "é.png"]


def test_files_that_desktops_create_are_ignored(folder):
    for name in (".DS_Store", "._x.jpg", ".hidden.png", "Thumbs.db", "thumbs.db", "Desktop.ini", "x.txt", "m.JSON"):
        (folder / name).write_bytes(b"junk")
    (folder / "__MACOSX").mkdir()
    (folder / "more.png").mkdir()
    save_solid(folder / "x.JPG")
    assert [path.name for path in list_photos(folder)] == ["x.JPG"]
    assert len(load_photos(list_photos(folder), PROMPT, 8)) == 1


def test_a_link_to_a_photo_is_a_photo(folder, tmp_path):
    (folder / "link.png").symlink_to(save_solid(tmp_path / "real.png"))
    assert tuple(pixels_of(folder, 8)[0, 0]) == RED


@pytest.mark.parametrize("make, words", [
    (lambda path: None, "does not exist"),
    (lambda path: path.write_bytes(b"x"), "is a file"),
    (lambda path: path.mkdir(), "holds no photo"),
])
def test_a_folder_without_photos_is_an_error_that_says_what_to_type(tmp_path, make, words):
    path = tmp_path / "dog"
    make(path)
    with pytest.raises(UserError, match=words) as raised:
        list_photos(path)
    assert str(path) in str(raised.value) and "dataset.instance_dir=" in str(raised.value)


# --- unusable files -------------------------------------------------------------------------------------------------


def test_all_bad_files_are_listed_together_each_with_its_reason(folder):
    save_solid(folder / "good.png")
    (folder / "text.jpg").write_text("this is not a photo")
    (folder / "notes.docx").write_bytes(b"PK\x03\x04")
    (folder / "empty.png").touch()
    (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (folder / "renamed.jpg").write_bytes(b"\0\0\0\x18ftypmif1" + bytes(64))
    (folder / "live.mov").write_bytes(b"\0\0\0\x18ftypqt  " + bytes(64))
    shutil.copy(folder / "good.png", folder / "raw.nef")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "bomb.png").write_bytes(png_header(20_000, 20_000))
    (folder / "good.txt").touch()
    lines = {line.split()[0]: line for line in problem(folder).splitlines()[1:]}
    expected = {
        "text.jpg": "not a readable image", "notes.docx": "not a readable image", "empty.png": "0 bytes",
        "IMG_1.HEIC": "export it as JPEG", "renamed.jpg": "HEIC", "live.mov": "video", "raw.nef": "camera raw",
        "gone.png": "link", "bomb.png": "too large", "good.txt": "is empty",
    }
    assert set(lines) == set(expected)
    assert {name: why for name, why in expected.items() if why not in lines[name]} == {}
    assert problem(folder).startswith(f"{len(expected)} files in {folder} cannot be used")


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""
    bodies = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND"
    chunks = (struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in bodies)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".bmp", ".tiff"])
def test_a_truncated_photo_is_unusable(folder, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = folder / f"half{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert path.name in problem(folder)


def test_a_truncated_jpeg_is_reported_even_if_it_is_decoded_downscaled(folder):
    path = folder / "half.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    assert "half.jpg is damaged or truncated" in problem(folder, 16)


def test_a_narrow_photo_whose_resized_version_would_be_huge_is_reported(folder):
    save_solid(folder / "strip.png", size=(60_000, 1))
    assert "strip.png is too narrow (60000 x 1 pixels)" in problem(folder, 512)


# --- colours and orientation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_exif_orientation_is_applied(folder, orientation, suffix):
    upright = four_corners()
    stored = upright if STORED_AS[orientation] is None else upright.transpose(STORED_AS[orientation])
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(folder / f"photo{suffix}", exif=exif, quality=100)
    loaded = pixels_of(folder, 16)
    assert loaded.shape == (24, 16, 3)
    for row, column in ((3, 3), (3, 12), (20, 3), (20, 12)):
        expected = upright.getpixel((column, row))
        assert np.abs(loaded[row, column].astype(int) - expected).max() <= 12, (row, column)


def test_a_photo_with_broken_exif_data_is_loaded(folder):
    Image.new("RGB", (8, 8), RED).save(folder / "a.jpg", exif=b"Exif\0\0garbage", quality=100)
    assert np.abs(pixels_of(folder, 8).astype(int) - RED).max() <= 3


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff"])
def test_transparent_pixels_become_white(folder, suffix):
    picture = Image.new("RGBA", (8, 8), (*RED, 0))
    picture.paste((*BLUE, 255), (0, 0, 4, 8))
    picture.save(folder / f"cut-out{suffix}", lossless=True, exact=True)
    loaded = pixels_of(folder, 8)
    assert (loaded[:, :4] == BLUE).all() and (loaded[:, 4:] == WHITE).all()


def test_half_transparent_pixels_are_blended_with_white(folder):
    save_solid(folder / "glass.png", (255, 0, 0, 128), mode="RGBA")
    assert (pixels_of(folder, 8) == (255, 127, 127)).all()


@pytest.mark.parametrize("resolution", [8, 100])
def test_colours_of_transparent_pixels_do_not_bleed_into_edges_when_resized(folder, resolution):
    picture = Image.new("RGBA", (30, 30), (0, 255, 0, 0))  # hidden green around white: nothing may look green
    picture.paste((*WHITE, 255), (7, 7, 22, 22))
    picture.save(folder / "a.png")
    assert (pixels_of(folder, resolution) == 255).all()


@pytest.mark.parametrize("mode, color, hidden", [("L", 60, 60), ("RGB", RED, RED), ("P", 0, 0), ("1", 0, 0)])
def test_a_colour_that_is_declared_transparent_becomes_white(folder, mode, color, hidden):
    picture = Image.new(mode, (8, 8), color)
    if mode == "P":
        picture.putpalette([10, 200, 30, 0, 0, 255])
    picture.paste({"L": 200, "RGB": BLUE, "P": 1, "1": 1}[mode], (0, 0, 4, 8))
    picture.save(folder / "a.png", transparency=hidden)
    left, right = pixels_of(folder, 8)[0, 1], pixels_of(folder, 8)[0, 6]
    assert tuple(right) == WHITE
    assert tuple(left) == {"L": (200,) * 3, "RGB": BLUE, "P": BLUE, "1": WHITE}[mode]


def test_palette_with_several_alphas_and_grey_with_alpha_are_put_on_white(folder):
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(1, (4, 0, 8, 8))
    picture.save(folder / "palette.png", transparency=bytes([0, 255]))
    save_solid(folder / "grey.png", (0, 0), mode="LA")
    grey, palette = (photo.pixels for photo in load_photos(list_photos(folder), PROMPT, 8))
    assert (palette[:, :4] == WHITE).all() and (palette[:, 4:] == BLUE).all()
    assert (grey == 255).all()


@pytest.mark.parametrize("mode, color, seen", [
    ("P", 5, (5, 6, 7)), ("1", 1, WHITE), ("L", 90, (90, 90, 90)),
])
def test_palette_one_bit_and_grey_become_rgb(folder, mode, color, seen):
    picture = Image.new(mode, (8, 8), color)
    if mode == "P":
        picture.putpalette([value for index in range(256) for value in (index, (index + 1) % 256, (index + 2) % 256)])
    picture.save(folder / "a.png")
    assert (pixels_of(folder, 8) == seen).all()


@pytest.mark.parametrize("suffix", [".jpg", ".tiff"])
@pytest.mark.parametrize("color", [(200, 30, 90), (20, 160, 220), (250, 250, 250), (5, 5, 5)])
def test_cmyk_is_converted_with_the_right_colours(folder, suffix, color):
    Image.new("RGB", (16, 16), color).convert("CMYK").save(folder / f"print{suffix}")
    assert np.abs(pixels_of(folder, 16).astype(int) - color).max() <= 4


@pytest.mark.parametrize("suffix, dtype", [(".png", "uint16"), (".tiff", "uint16"), (".tiff", "int32")])
def test_sixteen_bit_grey_is_scaled_not_clipped(folder, suffix, dtype):
    deep = np.tile(np.linspace(0, 65535, 64).astype(dtype), (64, 1))
    Image.fromarray(deep).save(folder / f"deep{suffix}")
    assert (pixels_of(folder, 64)[..., 1] == deep >> 8).all()


def test_big_endian_sixteen_bit_tiff_reads_the_right_byte(folder):
    Image.fromarray(np.full((8, 8), 0x40FF, dtype=">u2")).save(folder / "deep.tiff")
    assert (pixels_of(folder, 8) == 0x40).all()


def test_the_transparent_level_of_a_sixteen_bit_photo_becomes_white(folder):
    deep = np.full((8, 8), 0x2000, dtype=np.uint16)
    deep[:, 4:] = 0x2001  # the same high byte: only the full value tells them apart
    Image.fromarray(deep).save(folder / "deep.png", transparency=0x2001)
    loaded = pixels_of(folder, 8)
    assert (loaded[:, :4] == 0x20).all() and (loaded[:, 4:] == 255).all()


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float_tiff_is_scaled_by_its_range(folder, white):
    ramp = np.tile(np.linspace(0, white, 8, dtype=np.float32), (8, 1))
    Image.fromarray(ramp).save(folder / "float.tiff")
    assert np.abs(pixels_of(folder, 8)[0, :, 0] - np.linspace(0, 255, 8)).max() <= 1


def test_the_first_frame_of_an_animation_is_used(folder):
    first, *others = [Image.new("RGB", (8, 8), color) for color in (BLUE, RED, GREEN)]
    for name in ("a.gif", "b.png", "c.webp"):
        first.save(folder / name, save_all=True, append_images=others, duration=40, lossless=True)
    assert [tuple(photo.pixels[4, 4]) for photo in load_photos(list_photos(folder), PROMPT, 8)] == [BLUE] * 3


def test_a_transparent_gif_is_put_on_white(folder):
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([1, 2, 3, 255, 0, 0])
    picture.paste(1, (0, 0, 4, 8))
    picture.save(folder / "a.gif", transparency=0)
    loaded = pixels_of(folder, 8)
    assert (loaded[:, :4] == RED).all() and (loaded[:, 4:] == 255).all()


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, resolution, shape", [
    ((3, 5), 64, (107, 64)), ((2000, 10), 16, (16, 3200)), ((10, 2000), 16, (3200, 16)), ((1, 1), 8, (8, 8)),
    ((640, 480), 512, (512, 683)), ((101, 100), 8, (8, 8)),
])
def test_the_short_side_becomes_the_resolution_and_the_aspect_ratio_stays(folder, size, resolution, shape):
    save_solid(folder / "a.png", size=size)
    assert pixels_of(folder, resolution).shape == (*shape, 3)


def test_downscaling_is_antialiased(folder):
    checks = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(folder / "checks.png")
    assert np.abs(pixels_of(folder, 32).astype(int) - 127).max() <= 8


def test_a_photo_of_the_right_size_is_unchanged(folder):
    noise = np.random.default_rng(1).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    loaded = pixels_of(folder, 16)
    assert (loaded == noise).all()
    assert loaded.flags.writeable and loaded.flags.c_contiguous


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_108_megapixel_photo_works_without_a_warning(folder, suffix):
    picture = Image.linear_gradient("L").resize((12_000, 9_000), Image.Resampling.NEAREST)
    picture.save(folder / f"huge{suffix}", compress_level=1)
    loaded = pixels_of(folder, 32)
    assert loaded.shape == (32, 43, 3)
    assert loaded[0].max() < 12 and loaded[-1].min() > 243


@pytest.mark.parametrize("size, resolution", [((1600, 1200), 64), ((1600, 1200), 300), ((1600, 1200), 600)])
def test_a_jpeg_is_decoded_downscaled_to_at_least_twice_the_resolution(folder, monkeypatch, size, resolution):
    seen = []
    flatten = photos._flatten
    monkeypatch.setattr(photos, "_flatten", lambda image, *more: seen.append(image.size) or flatten(image, *more))
    save_solid(folder / "a.jpg", size=size)
    pixels_of(folder, resolution)
    short = min(seen[0])
    assert short >= min(2 * resolution, min(size))
    assert short < 4 * resolution


def test_each_photo_is_decoded_once(folder, monkeypatch):
    opened = []
    opener = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **kw: opened.append(path.name) or opener(path, **kw))
    for name in ("a.png", "b.png"):
        save_solid(folder / name)
    load_photos(list_photos(folder), PROMPT, 8)
    assert sorted(opened) == ["a.png", "b.png"]  # threads may open them in another order


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(8, 48),
       st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]))
def test_any_size_and_mode_becomes_rgb_with_the_short_side_at_the_resolution(width, height, resolution, mode):
    with tempfile.TemporaryDirectory() as folder:
        Image.new(mode, (width, height)).save(Path(folder) / ("a.tiff" if mode in ("CMYK", "I", "F") else "a.png"))
        loaded = pixels_of(Path(folder), resolution)
    assert loaded.dtype == np.uint8 and loaded.ndim == 3 and loaded.shape[2] == 3
    assert min(loaded.shape[:2]) == resolution
    assert (width >= height) == (loaded.shape[1] >= loaded.shape[0]) or loaded.shape[0] == loaded.shape[1]


def test_importing_photos_does_not_import_torch_numpy_pillow_or_hydra():
    code = ("import sys, dreambooth.data.photos; "
            "print({'torch', 'numpy', 'PIL', 'hydra', 'omegaconf'} & set(sys.modules))")
    completed = subprocess.run([sys.executable, "-c", code], cwd=Path(photos.__file__).parents[2],
                               capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "set()"
