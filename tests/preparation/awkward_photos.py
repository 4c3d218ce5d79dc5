"""A folder of 40 awkward photos, built from numbers: what users' folders hold, and what decoders stumble over."""

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, PngImagePlugin

from tests.data.icc_profiles import DISPLAY_P3, cmyk_profile, rgb_profile

SIDE = 128  # resolution at which the photos are judged
HIDDEN_OR_UNUSED = [".hidden.jpg", "notes.txt", "Thumbs.db", "tags.json"]
RAW = b"caf\xe9.png"  # not UTF-8


def scene(seed: int, size: tuple[int, int] = (192, 192)) -> Image.Image:
    """Return a picture of its own for each seed: coarse shapes, sharp edges and fine grain, as photos have them."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(30, 226, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    blocks = Image.fromarray(random.integers(0, 256, (7, 7), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)
    grain = random.normal(0, 6, (size[1], size[0], 1))
    mixed = 0.6 * np.asarray(coarse, float) + 0.4 * np.asarray(blocks, float)[..., None] + grain
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def make_awkward_photos(folder: Path, outside: Path) -> None:
    """Fill a new folder. `outside` is another new folder, to which a link leads.

    40 files count as photos: 10 of them cannot be used and 3 are copies of others.
    """
    folder.mkdir(parents=True)
    outside.mkdir(parents=True)

    def save(name: str, image: Image.Image, **options: object) -> Path:
        image.save(folder / name, **options)
        return folder / name

    # -- 27 that can be used -----------------------------------------------------------------------------------------
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    save("rotated.jpg", scene(1, (256, 160)), exif=exif, quality=92)
    save("p3.jpg", scene(2), icc_profile=rgb_profile(DISPLAY_P3), quality=92)
    save("cmyk.jpg", scene(3).convert("CMYK"), icc_profile=cmyk_profile(), quality=92)
    save("grey.png", scene(4).convert("L"))
    alpha = scene(5).convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tri(192, dtype=np.uint8) * 255))
    save("alpha.png", alpha)
    save("palette.gif", scene(6).convert("P"))
    Image.fromarray(np.asarray(scene(7).convert("L"), np.uint16) * 257).save(folder / "sixteen bits.png")
    frames = [scene(seed).convert("P") for seed in (8, 9, 10)]
    save("animated.gif", frames[0], save_all=True, append_images=frames[1:])
    save("animated.webp", scene(11), save_all=True, append_images=[scene(12)], lossless=True)
    save("tiny.png", scene(13, (24, 24)))
    save("panorama.jpg", scene(14, (640, 128)), quality=92)
    waves = 128 + 110 * np.cos(np.arange(192) / 30)[:, None] * np.cos(np.arange(192) / 37)
    save("blurred.jpg", Image.fromarray(waves.round().astype(np.uint8)).convert("RGB"), quality=95)
    save("soft.jpg", scene(16).filter(ImageFilter.GaussianBlur(1.4)), quality=92)
    for name, seed, factor, offset in (("dark.jpg", 17, 0.24, 0), ("blown out.jpg", 18, 0.3, 190)):
        levels = np.asarray(scene(seed)) * factor + offset
        save(name, Image.fromarray(levels.clip(0, 255).astype(np.uint8)), quality=92)
    save("flat.png", Image.new("RGB", (192, 192), (90, 120, 150)))
    save("same stem.png", scene(19))
    save("same stem.webp", scene(20), lossless=True)
    save("größe 猫 🧸.png", scene(21))
    save("<img src=x onerror=alert(1)>.png", scene(22))
    Path(os.fsdecode(os.fsencode(folder) + b"/" + RAW)).write_bytes(save("x.png", scene(23)).read_bytes())
    (folder / "x.png").unlink()
    scene(24).save(outside / "elsewhere.png")
    (folder / "link out.png").symlink_to(outside / "elsewhere.png")
    save("read only.png", scene(25)).chmod(0o444)
    original = scene(26, (256, 256))
    save("original.png", original)
    original.save(folder / "reencoded.jpg", quality=70)
    original.resize((160, 160), Image.Resampling.LANCZOS).save(folder / "resized.png")
    save("near but other.png", Image.fromarray(np.roll(np.asarray(original), 60, axis=1)))  # from another side
    # -- 3 copies ----------------------------------------------------------------------------------------------------
    (folder / "z copy.png").write_bytes((folder / "original.png").read_bytes())
    original.save(folder / "z same pixels.png", compress_level=1)
    (folder / "z link inside.png").symlink_to("original.png")
    # -- 10 that cannot be used --------------------------------------------------------------------------------------
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "truncated.jpg").write_bytes((folder / "reencoded.jpg").read_bytes()[:900])
    png = (folder / "original.png").read_bytes()
    (folder / "truncated.png").write_bytes(png[:len(png) // 2])
    (folder / "camera.dng").write_bytes(b"II*\0 raw")
    (folder / "video.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(64))
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (folder / "broken link.png").symlink_to("gone.png")
    (folder / "bomb.png").write_bytes(_huge_png(30_000, 30_000))
    save("line.png", Image.new("RGB", (60_000, 1)))
    # -- not photos --------------------------------------------------------------------------------------------------
    for name in HIDDEN_OR_UNUSED:
        (folder / name).write_bytes(b"not used")
    (folder / "grey.txt").write_text("a grey toy\n")
    (folder / "nested" / "deep").mkdir(parents=True)
    scene(28).save(folder / "nested" / "deep" / "a.png")
    (folder / "link to a folder").symlink_to(outside)
    for path in folder.iterdir():
        os.utime(path, ns=(10**18, 10**18), follow_symlinks=False)


def _huge_png(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size, without the pixels."""
    from io import BytesIO
    from struct import pack
    from zlib import crc32

    buffer = BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG", pnginfo=PngImagePlugin.PngInfo())
    png = bytearray(buffer.getvalue())
    png[16:24] = pack(">II", width, height)
    png[29:33] = pack(">I", crc32(png[12:29]))
    return bytes(png)


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return what must not change: names, types, modes, modification times, link targets and bytes."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        info = path.lstat()
        content = str(path.readlink()) if path.is_symlink() else (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        found[os.fsencode(path).decode(errors="backslashreplace")] = info.st_mode, info.st_mtime_ns, content
    return found


