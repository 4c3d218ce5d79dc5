"""The review of a prepared folder: a contact sheet (PNG), a page for a browser (HTML), and a report (JSON)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dreambooth.data import photo_checks, photos
from dreambooth.preparation import crop
from dreambooth.preparation.annotation import PreparedPhoto, scale_box
from dreambooth.preparation.inspection import Inspection
from dreambooth.utils import atomic_files
from dreambooth.utils.assets import render_page
from dreambooth.utils.image_grid import data_url, labelled_grid
from dreambooth.utils.plurals import counted

REPORT, SHEET, PAGE = "report.json", "contact-sheet.png", "contact-sheet.html"
SIDE = 224  # pixels: longest side of a photo on the page and on the sheet
COLUMNS, LINES, WIDTH = 6, 5, 32  # of the sheet: photos per row, lines of text per photo, characters per line
OUTSIDE = (226, 87, 76)  # colour over what is outside the mask
FACE = (0, 114, 178)  # colour of the boxes of faces


def write_review(folder: Path, inspection: Inspection, prepared: Sequence[PreparedPhoto],
                 left_out: Sequence[tuple[str, str]], summary: dict[str, Any]) -> None:
    """Write the three files to `folder`.

    Args:
        left_out: pairs of a file's name and a sentence that says why the file has no copy.
        summary: further content of the report, and of the head of the page: command, remarks, unused files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tiles = [(one, draw_photo(one)) for one in prepared]
    texts = [[printable(text) for text in describe(one)] for one in prepared]
    with atomic_files.write_file(folder / SHEET) as temporary:
        sheet = labelled_grid([(image, _lines(text)) for (_, image), text in zip(tiles, texts, strict=True)],
                              min(COLUMNS, max(1, math.ceil(math.sqrt(len(tiles))))), SIDE)
        sheet.save(temporary, format="PNG", compress_level=3)
    cards = [{"image": data_url(image), "name": text[0], "caption": printable(one.caption or ""), "remarks": text[2:]}
             for (one, image), text in zip(tiles, texts, strict=True)]
    page = render_page(
        "prepare.html", cards=cards, title=f"{counted(len(prepared), 'photo')} prepared",
        command=printable(summary["command"]),
        left_out=[printable(sentence) for _, sentence in left_out],
        remarks=[printable(remark) for remark in summary["remarks"]])
    with atomic_files.write_file(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    atomic_files.write_json(folder / REPORT, summary | {
        "resolution": inspection.resolution, "variety": inspection.variety,
        "left_out": [{"file": printable(name), "reason": printable(sentence)} for name, sentence in left_out],
        "photos": [_facts(one, inspection.resolution) for one in prepared]})


def describe(one: PreparedPhoto) -> list[str]:
    """Return the name and the caption of a photo, then its remarks and notes, without the name at their start."""
    name = one.file.path.name
    remarks = [remark.removeprefix(f"{name} ").removeprefix(f"{one.path.name} ")
               for remark in (*one.file.remarks, *one.remarks)]
    return [one.path.name, one.caption or "(the instance prompt)", *remarks, *one.file.notes]


def draw_photo(one: PreparedPhoto) -> Image.Image:
    """Return a small picture of a photo. What is outside its mask is tinted, and faces have boxes."""
    picture = Image.fromarray(photos.load_image(one.path, SIDE))
    picture.thumbnail((SIDE, SIDE))
    if one.mask is not None:
        with Image.open(one.mask) as opened:
            mask = np.asarray(opened.convert("L").resize(picture.size, Image.Resampling.BOX))[..., None] / 255
        pixels = np.asarray(picture)
        tinted = 0.45 * pixels + 0.55 * np.array(OUTSIDE)
        picture = Image.fromarray((mask * pixels + (1 - mask) * tinted).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for face in one.faces or ():
        draw.rectangle(scale_box(face, one.size, picture.size), outline=FACE, width=2)
    return picture


def printable(text: str) -> str:
    """Return a text in which characters that cannot be shown, such as control characters, are escape sequences."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape", "surrogatepass").decode()
                   for sign in text)


def _lines(texts: Sequence[str]) -> list[str]:
    """Return at most LINES lines: the name in one line, the other texts wrapped."""
    lines = [*texts[:1]] + [line for text in texts[1:] for line in wrap(text, WIDTH)]
    return lines if len(lines) <= LINES else [*lines[:LINES - 1], f"{lines[LINES - 1][:WIDTH - 2]} …"]


def _facts(one: PreparedPhoto, resolution: int) -> dict[str, Any]:
    """Return what the report says about a photo."""
    file, (width, height) = one.file, one.size
    assert file.photo is not None
    return {
        "file": printable(one.path.name), "source": printable(file.path.name), "sha256": file.digest,
        "format": file.file_format, "mode": file.mode, "width": width, "height": height,
        "enlargement": round(photo_checks.enlargement(file.photo), 3), "detail": file.detail,
        "orientation": file.orientation, "profile": file.profile,
        "crop": list(crop.suggest_square(width, height, one.subject)),
        "smaller_than_model": min(width, height) < resolution, "edited": one.edited, "caption": one.caption,
        "mask": one.mask.name if one.mask else None, "faces": one.faces,
        "remarks": [printable(remark) for remark in (*file.remarks, *one.remarks)], "notes": file.notes}
