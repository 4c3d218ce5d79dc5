"""Downloads emoji art from the npm registry, and renders it to square RGBA sprites.

The base model is trained only on art under MIT and Apache-2.0 (TRAINED_ON).
"""

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

SIDE = 96  # pixels of a sprite

Renderer = Callable[[str, str], Image.Image | None]  # (concept, code points) -> drawing; None: the package has none


@dataclass(frozen=True)
class Package:
    """One version of an npm package, with the licence that it declares."""

    name: str
    version: str
    style: str  # word for the style of its drawings in captions
    licence: str

    @property
    def folder(self) -> str:
        return self.name.lstrip("@").replace("/", "-")


NAMES = Package("unicode-emoji-json", "0.9.0", "", "MIT")
TRAINED_ON = (
    Package("@lobehub/fluent-emoji-3d", "1.1.0", "3d render", "MIT"),
    Package("@iconify-json/fluent-emoji-flat", "1.2.6", "flat drawing", "MIT"),
    Package("@iconify-json/noto", "1.2.9", "cartoon", "Apache-2.0"),
    Package("@iconify-json/noto-v1", "1.2.5", "cartoon", "Apache-2.0"),
    Package("@iconify-json/fxemoji", "1.2.2", "flat drawing", "Apache-2.0"),
)
HELD_OUT = (  # never trained on and never shipped; the classifier of judge.py learns the classes from them
    Package("@iconify-json/twemoji", "1.2.5", "", "CC-BY-4.0"),
    Package("@iconify-json/emojione", "1.2.3", "", "CC-BY-4.0"),
    Package("@iconify-json/fluent-emoji", "1.2.7", "", "MIT"),
    Package("@iconify-json/streamline-emojis", "1.2.4", "", "CC-BY-4.0"),
)


@dataclass(frozen=True)
class Sprite:
    """A drawing of a concept, cut out on a transparent background."""

    concept: str
    style: str
    pixels: NDArray[np.uint8]  # (SIDE, SIDE, 4)


@cache
def concepts() -> dict[str, list[str]]:
    """Return a dictionary: concept -> the everyday classes that it belongs to."""
    classes: dict[str, list[str]] = {}
    for name, members in vocabulary()["classes"].items():
        for concept in members:
            classes.setdefault(concept, []).append(name)
    return classes


@cache
def vocabulary() -> dict[str, dict[str, list[str]]]:
    """Return the contents of concepts.yaml."""
    loaded: dict[str, dict[str, list[str]]] = yaml.safe_load(Path(__file__).with_name("concepts.yaml").read_text())
    return loaded


def fetch(packages: tuple[Package, ...], folder: Path) -> None:
    """Download and unpack missing packages with npm.

    Raises:
        SystemExit: npm is not installed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("the emoji art is downloaded from the npm registry: install npm")
    for package in packages:
        target = folder / package.folder
        if target.is_dir():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        process = subprocess.run([npm, "pack", "--silent", f"{package.name}@{package.version}"], cwd=folder, check=True,
                             capture_output=True, text=True)
        archive = folder / process.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(folder / f"{package.folder}.new", filter="data")
        (folder / f"{package.folder}.new" / "package").rename(target)
        shutil.rmtree(folder / f"{package.folder}.new")
        archive.unlink()


def sprites(packages: tuple[Package, ...], folder: Path) -> list[Sprite]:
    """Render a sprite of every concept from every package that contains the concept."""
    data = json.loads((folder / NAMES.folder / "data-by-emoji.json").read_text())
    emoji = {entry["name"]: characters for characters, entry in data.items()}  # concept -> its characters
    rendered = []
    for package in packages:
        render = _webp(package, folder) if (folder / package.folder / "assets").is_dir() else _svg(package, folder)
        for concept in sorted(concepts()):
            drawing = render(concept, "-".join(f"{ord(c):04x}" for c in emoji[concept]))
            if drawing is not None and (squared := _square(drawing)) is not None:
                rendered.append(Sprite(concept, package.style, squared))
    return rendered


def _webp(package: Package, folder: Path) -> Renderer:
    """Return a renderer for a package with one WebP file per emoji."""
    def render(concept: str, points: str) -> Image.Image | None:
        paths = [folder / package.folder / "assets" / f"{name}.webp" for name in _spellings(points)]
        return next((Image.open(path).convert("RGBA") for path in paths if path.is_file()), None)

    return render


def _svg(package: Package, folder: Path) -> Renderer:
    """Return a renderer for an Iconify package, whose icons.json contains all drawings as SVG."""
    import resvg_py

    package_folder = folder / package.folder
    icons = json.loads((package_folder / "icons.json").read_text())
    chars = json.loads((package_folder / "chars.json").read_text()) if (package_folder / "chars.json").is_file() else {}

    def render(concept: str, points: str) -> Image.Image | None:
        slug = re.sub(r"[^a-z0-9]+", "-", concept.lower().replace("’", "").replace("ñ", "n")).strip("-")
        names = [chars[p] for p in _spellings(points) if p in chars] + [slug, slug.replace("-", "")]
        icon = next((icons["icons"][name] for name in names if name in icons["icons"]), None)
        if icon is None:
            return None
        width, height = (icon.get(key, icons.get(key, 32)) for key in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="128" '
               f'height="128" viewBox="{box}">{icon["body"]}</svg>')
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")

    return render


def _spellings(points: str) -> list[str]:
    """Return the code points with and without the variation selector, because packages differ in its use."""
    without = points.replace("-fe0f", "")
    return [points, without, f"{without}-fe0f"]


def _square(drawing: Image.Image) -> NDArray[np.uint8] | None:
    """Crop a drawing to its visible part, and centre it on a square of SIDE pixels; None: nothing is visible."""
    box = drawing.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    if box is None:
        return None
    cut = drawing.crop(box)
    side = max(cut.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
