"""Writes captions and masks beside the copies of photos, and finds faces, each with a model if one is given.

Every output is written and recorded as soon as it is made (progress.py), so that a repeated command continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreambooth.data import captions, masks, photos
from dreambooth.data.image_formats import UnusablePhoto
from dreambooth.preparation.inspection import SourcePhoto
from dreambooth.preparation.options import Prepare
from dreambooth.preparation.progress import Entry, Progress, digest, file_digest, is_due
from dreambooth.preparation.trigger import insert_trigger
from dreambooth.utils import atomic_files
from dreambooth.utils.console import Console

INPUT_SIDE = 768  # pixels: short side of the picture that models receive, before they scale it
MAX_INPUT = 1024  # pixels: its longest side
FROM_SOURCE = "source"  # settings of a caption that was in the source folder

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass
class PreparedPhoto:
    """A photo in the output folder."""

    file: SourcePhoto
    path: Path  # the copy
    digest: str  # SHA-256 of the copy
    size: tuple[int, int]  # width and height of the upright copy in pixels
    edited: bool = False  # whether the user has edited the copy
    caption: str | None = None
    mask: Path | None = None
    subject: Box | None = None  # what the mask or the largest face covers, in pixels of the upright photo
    faces: list[Box] | None = None  # in pixels of the upright photo; None: nobody looked for faces
    remarks: list[str] = field(default_factory=list)  # sentences that start with the file's name


class Annotator:
    """Describes the photos of an output folder. Models are loaded when the first photo needs them."""

    def __init__(self, config: Prepare, progress: Progress, console: Console) -> None:
        self.config, self.progress, self.console = config, progress, console
        self.folder = Path(config.out or "") / "masks"

    def write_captions(self, prepared: Sequence[PreparedPhoto], source: Path, remarks: list[str]) -> None:
        """Write a caption beside each photo: the one of the source folder, or one of the model, if there is a model.

        Args:
            remarks: receives a sentence for each caption that cannot be used.

        Raises:
            UserError: the model cannot be used.
        """
        options = self.config.captions
        metadata = captions.read_metadata(source, remarks)
        own = {one.path: captions.read_caption(one.file.path, "", metadata, remarks) for one in prepared}
        settings = str([options.model, options.revision, options.prompt, options.max_tokens, self.config.trigger,
                        self.config.class_word])
        due: list[PreparedPhoto] = []
        for one in prepared:
            existing = captions.read_caption(one.path, "", {}, remarks)
            entry = self.progress.find("caption", one.path.name)
            one.caption = existing or None
            current = digest(existing.encode()) if existing else None
            if existing is None:  # unreadable: the user has to look
                continue
            if (text := own[one.path]) and not (options.model and options.overwrite):
                untouched = entry is not None and entry.output == current and entry.settings == FROM_SOURCE
                if current is None or (untouched and text != existing):
                    self._write_caption(one, text, FROM_SOURCE)
            elif options.model and is_due(current, entry, one.digest, settings, options.overwrite):
                due.append(one)
        if not due:
            return
        from dreambooth.preparation.captioners import EXAMPLES, open_captioner

        captioner = open_captioner(self._origin("captions", EXAMPLES), options.prompt, options.max_tokens)
        with self._each("captions", prepared, due) as ones:
            for one, image in ones:
                text = captioner.describe(image)
                if self.config.trigger:
                    prompt = self.config.instance_prompt or ""
                    text = insert_trigger(text, self.config.trigger, self.config.class_word, prompt)
                if text:
                    self._write_caption(one, text, settings)

    def write_masks(self, prepared: Sequence[PreparedPhoto]) -> None:
        """Write a mask of each photo, if there is a model. If nothing is found, the mask is white.

        Raises:
            UserError: the model cannot be used.
        """
        options = self.config.masks
        text = options.text or self.config.class_word or ""
        settings = str([options.model, options.revision, text, options.threshold])
        due = []
        for one in prepared:
            one.mask = masks.mask_file(one.path, str(self.folder))
            current = file_digest(one.mask) if one.mask else None
            entry = self.progress.find("mask", one.path.stem)
            if options.model and is_due(current, entry, one.digest, settings, options.overwrite):
                due.append(one)
        if due:
            from dreambooth.preparation.segmenters import EXAMPLES, open_segmenter

            segmenter = open_segmenter(self._origin("masks", EXAMPLES), text, options.threshold)
            with self._each("masks", prepared, due) as ones:
                for one, image in ones:
                    self._write_mask(one, segmenter.segment(image), settings)
        for one in prepared:
            self._describe_mask(one, text)

    def find_faces(self, prepared: Sequence[PreparedPhoto]) -> None:
        """Find the faces of each photo, if there is a model.

        Raises:
            UserError: the model cannot be used.
        """
        options = self.config.faces
        if not options.model:
            return
        settings = str([options.model, options.revision, options.label, options.threshold])
        due = []
        for one in prepared:
            entry = self.progress.find("faces", one.path.name)
            if entry is None or entry.photo != one.digest or entry.settings != settings:
                due.append(one)
        if due:
            from dreambooth.preparation.face_detectors import EXAMPLES, open_face_detector

            detector = open_face_detector(self._origin("faces", EXAMPLES), options.label, options.threshold)
            with self._each("faces", prepared, due) as ones:
                for one, image in ones:
                    scale = [side / width for side, width in zip(one.size * 2, image.size * 2, strict=True)]
                    boxes = [[round(value * factor) for value, factor in zip(box, scale, strict=True)]
                             for box in detector.find(image)]
                    self.progress.add("faces", one.path.name, Entry(one.digest, settings, "", boxes))
        for one in prepared:
            entry = self.progress.find("faces", one.path.name)
            assert entry is not None
            one.faces = [(box[0], box[1], box[2], box[3]) for box in entry.value]
            one.subject = one.subject or max(one.faces, key=_area, default=None)
            if not one.faces:
                one.remarks.append(f"{one.path.name} shows no {options.label} that the model finds")
            elif len(one.faces) > 1:
                one.remarks.append(f"{one.path.name} shows {len(one.faces)} {options.label}s: crop it to the subject")

    def _origin(self, section: str, examples: str) -> Any:
        import torch

        from dreambooth.preparation.pretrained import Pretrained

        options = getattr(self.config, section)
        return Pretrained(options.model, options.revision, self.config.offline, f"{section}.model", examples,
                          torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @contextmanager
    def _each(self, title: str, prepared: Sequence[PreparedPhoto], due: Sequence[PreparedPhoto]
              ) -> Iterator[Iterator[tuple[PreparedPhoto, Image.Image]]]:
        """Show a progress bar, and yield an iterator over the photos that are due, with the picture for a model."""
        def pictures(tick: Callable[[], None]) -> Iterator[tuple[PreparedPhoto, Image.Image]]:
            for one in due:
                yield one, load_picture(one.path)
                tick()

        with self.console.bar(title, len(prepared), len(prepared) - len(due)) as bar:
            yield pictures(partial(bar.tick))

    def _write_caption(self, one: PreparedPhoto, text: str, settings: str) -> None:
        with atomic_files.write_file(one.path.with_suffix(".txt")) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        one.caption = text
        self.progress.add("caption", one.path.name, Entry(one.digest, settings, digest(text.encode())))

    def _write_mask(self, one: PreparedPhoto, mask: np.ndarray[Any, Any], settings: str) -> None:
        low = Image.fromarray(mask.astype(np.uint8) * 255 if mask.any() else np.full_like(mask, 255, np.uint8))
        full = low.resize(one.size, Image.Resampling.BILINEAR).point(lambda level: 255 if level >= 128 else 0)
        one.mask = self.folder / f"{one.path.stem}.png"
        with atomic_files.write_file(one.mask) as temporary:
            full.save(temporary, format="PNG")
        entry = Entry(one.digest, settings, file_digest(one.mask) or "", bool(mask.any()))
        self.progress.add("mask", one.path.stem, entry)

    def _describe_mask(self, one: PreparedPhoto, text: str) -> None:
        """Add what the mask says about the photo."""
        if one.mask is None:
            return
        try:
            loaded = masks.load_mask(one.path, Image.new("1", one.size), str(self.folder))
        except UnusablePhoto as error:
            one.remarks.append(f"{one.path.name} {error}")
            return
        except OSError:
            one.remarks.append(f"{one.path.name} has a mask that cannot be read: remove {one.mask}")
            one.mask = None
            return
        if loaded and (box := loaded.getbbox()):
            one.subject = scale_box(box, loaded.size, one.size)
        entry = self.progress.find("mask", one.path.stem)
        if entry is not None and entry.value is False and entry.output == file_digest(one.mask):
            one.subject = None
            one.remarks.append(f"{one.path.name} shows no {text} that the model finds, so that its mask is white: "
                               f"paint {one.mask}, or lower masks.threshold")


def load_picture(path: Path) -> Image.Image:
    """Return the upright photo in sRGB, as models receive it: scaled, but not cropped."""
    picture = Image.fromarray(photos.load_image(path, INPUT_SIDE))
    picture.thumbnail((MAX_INPUT, MAX_INPUT))
    return picture


def scale_box(box: tuple[int, int, int, int], old: tuple[int, int], new: tuple[int, int]) -> Box:
    """Return a box of a picture of the size `old`, (width, height), in pixels of the size `new`."""
    left, top, right, bottom = (round(value * new[axis % 2] / old[axis % 2]) for axis, value in enumerate(box))
    return left, top, right, bottom


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
