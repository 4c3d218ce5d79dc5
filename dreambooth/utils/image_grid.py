"""Image grids, and the contact sheet that shows the samples of a whole run in one image."""

import base64
import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dreambooth.utils import atomic_files

log = logging.getLogger(__name__)
INK, PAPER = "#222222", "white"  # colours of text and background
GAP, TITLE = 6, 22  # pixels: space between cells, height of a line of text
LINE = 16  # pixels: height of one of several lines of text
MAX_COLUMNS = 8  # steps shown on a contact sheet
SHEET_PHOTOS = 8  # photos shown on a contact sheet


def grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Arrange images of equal size in one image, left to right, top to bottom.

    Args:
        columns: number of columns.
        gap: pixels between images.
    """
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), PAPER)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def contact_sheet(
    photos: Sequence[Image.Image], samples: Mapping[int, Sequence[Sequence[Image.Image]]], prompts: Sequence[str]
) -> Image.Image:
    """Draw a contact sheet: the training photos in the top row; below, one row per prompt and one column per step.

    Args:
        photos: the subject's training photos, square.
        samples: by step, one list of images for each prompt.
        prompts: the prompt of each row, printed as its title.
    """
    steps = _spread(sorted(samples))
    cell = _cell_size(samples[steps[0]][0])
    width = max(len(steps) * (cell + GAP) + GAP, 4 * (cell + GAP))
    thumb = min(cell, (width - GAP) // max(1, min(len(photos), SHEET_PHOTOS)) - GAP)
    top = TITLE + thumb + GAP
    sheet = Image.new("RGB", (width, top + len(prompts) * (TITLE + cell + GAP) + TITLE), PAPER)
    draw = ImageDraw.Draw(sheet)
    _label(draw, (GAP, 4), "the photos", width)
    for number, photo in enumerate(photos[:SHEET_PHOTOS]):
        sheet.paste(_fit(photo, thumb), (GAP + number * (thumb + GAP), TITLE))
    for row, prompt in enumerate(prompts):
        y = top + row * (TITLE + cell + GAP)
        _label(draw, (GAP, y + 3), prompt, width)
        for column, step in enumerate(steps):
            pictures = samples[step][row]
            tile = grid(pictures, square_columns(len(pictures)))
            sheet.paste(_fit(tile, cell), (GAP + column * (cell + GAP), y + TITLE))
    for column, step in enumerate(steps):
        _label(draw, (GAP + column * (cell + GAP), sheet.height - TITLE + 3), f"step {step}", cell)
    return sheet


def labelled_grid(tiles: Sequence[tuple[Image.Image, Sequence[str]]], columns: int, side: int) -> Image.Image:
    """Arrange images in one image, each with lines of text below it.

    Args:
        tiles: pairs of an image and its lines. All tiles get the height of the longest list of lines.
        columns: number of columns.
        side: width and height in pixels of the square into which each image is scaled.
    """
    lines = max((len(texts) for _, texts in tiles), default=0)
    cells = []
    for image, texts in tiles:
        cell = Image.new("RGB", (side, side + GAP + lines * LINE), PAPER)
        cell.paste(_fit(image, side), (0, 0))
        draw = ImageDraw.Draw(cell)
        for number, text in enumerate(texts):
            _label(draw, (0, side + 2 + number * LINE), text, side)
        cells.append(cell)
    return grid(cells, columns, GAP)


def data_url(image: Image.Image) -> str:
    """Return an image as a data URL (WebP), for HTML pages without files of their own."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_samples(folder: Path, prompts: int) -> dict[int, list[list[Image.Image]]]:
    """Read sample images from files such as `step-000100/prompt-0-1.png`. Return the images by step and prompt.

    Args:
        prompts: number of prompts. A step is left out if it has no image of one of the prompts, or a damaged image.
    """
    samples = {}
    for entry in sorted(folder.glob("step-*"), key=atomic_files.trailing_number):
        if damaged := [path for path in sorted(entry.glob("prompt-*.png")) if not is_intact_png(path)]:
            log.warning("the sample %s is damaged: its step is not on the contact sheet", damaged[0])
            continue
        rows = [[_open(path) for path in sorted(entry.glob(f"prompt-{number}-*.png"))] for number in range(prompts)]
        if rows and all(rows):
            samples[int(entry.name.removeprefix("step-"))] = rows
    return samples


def is_intact_png(path: Path) -> bool:
    """Return whether a file is a complete PNG image with correct checksums. Each chunk of a PNG file has a CRC-32.

    Raises:
        PermissionError: this user may not read the file, which may well be intact.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    except PermissionError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True


def _open(path: Path) -> Image.Image:
    with Image.open(path, formats=("PNG",)) as image:
        return image.convert("RGB")


def _spread(steps: Sequence[int]) -> list[int]:
    """Return at most MAX_COLUMNS of the steps, evenly spaced, including the first and the last step."""
    if len(steps) <= MAX_COLUMNS:
        return list(steps)
    picks = {round(i * (len(steps) - 1) / (MAX_COLUMNS - 1)) for i in range(MAX_COLUMNS)}
    return [steps[i] for i in sorted(picks)]


def square_columns(count: int) -> int:
    """Return the number of columns with which a grid of `count` images is about square."""
    return math.ceil(math.sqrt(count))


def _cell_size(pictures: Sequence[Image.Image]) -> int:
    """Return the side of a cell of the contact sheet in pixels, from 192 to 256.

    A cell shows the images of one prompt and one step as a grid, which is scaled to the size of the cell.

    Args:
        pictures: the images of one cell. Their number and width determine the size of all cells.
    """
    side = square_columns(len(pictures)) * pictures[0].width
    return 256 if side >= 256 else max(side, 192)


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Scale an image to fit into a square of `side` pixels."""
    scale = side / max(image.size)
    kind = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), kind)
    tile = Image.new("RGB", (side, side), PAPER)
    tile.paste(small, (0, 0))
    return tile


def _label(draw: ImageDraw.ImageDraw, where: tuple[int, int], text: str, width: int) -> None:
    """Draw one line of text. Shorten a line that is wider than `width` pixels, and append an ellipsis."""
    font = ImageFont.load_default(13)
    while text and draw.textlength(text, font=font) > width - 2 * GAP:
        text = text[:-2].rstrip(".… ") + "…" if len(text) > 2 else ""
    draw.text(where, text, fill=INK, font=font)
