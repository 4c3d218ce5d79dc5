"""Prepares a folder of photos: reports what is there, and writes a copy with captions and masks to another folder.

Layout of the output folder:

    photo.jpg, photo.txt      copies of the usable photos, byte for byte, and their captions
    masks/photo.png           masks, as dataset.mask reads them
    review/                   contact-sheet.png, contact-sheet.html, report.json, progress.jsonl

The source folder is only read.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth.config.model_defaults import default_resolution
from dreambooth.data.photo_report import describe_unused_files
from dreambooth.data.photos import list_photos, load_photo
from dreambooth.errors import UserError
from dreambooth.preparation import crop, inspection, review
from dreambooth.preparation.annotation import Annotator, PreparedPhoto
from dreambooth.preparation.inspection import Inspection, SourcePhoto
from dreambooth.preparation.options import Prepare
from dreambooth.preparation.progress import RECORD, Entry, Progress, digest, file_digest
from dreambooth.preparation.review import printable
from dreambooth.preparation.trigger import contains_word
from dreambooth.utils import atomic_files, file_lock, quoting
from dreambooth.utils.console import Console
from dreambooth.utils.plurals import counted
from dreambooth.utils.signals import StopRequest

CONTINUE = "finished photos, captions and masks are kept; repeat the command to continue"


def prepare(config: Prepare, stop: StopRequest) -> list[PreparedPhoto]:
    """Do what this file's docstring describes, print the report, and return the photos of the output folder.

    Raises:
        UserError: the folders or a model cannot be used, or no photo can be used.
        Interrupted, OutOfMemory: a stop was requested, or memory ran out. What was written is kept.
    """
    source, out = check_folders(config)
    console = Console()
    with stop.at_once(CONTINUE):
        paths = list_photos(source, "in")
        atomic_files.check_writable(out, "type out=DIR, a folder that you can write to")
        files = []
        with console.bar("photos", len(paths)) as bar:
            for path in paths:
                files.append(inspection.inspect_file(path, config.side))
                bar.tick()
        found = inspection.inspect_set(files, config.side)
        dropped = _similar_to_drop(found) if config.similar == "drop" else {}
        left_out = [(file.path.name, reason) for file in files if (reason := _why_left_out(file, dropped))]
        chosen = [file for file in found.usable if file.path not in dropped]
        if not chosen:
            console.list("left out:", [printable(sentence) for _, sentence in left_out])
            raise UserError(f"no photo in {source} can be used ({counted(len(files), 'file')}): type in=DIR with a "
                            "folder of photos")
        progress = Progress(out / "review" / RECORD)
        progress.start(source)
        with _locked(out / "review"):
            return _write(config, source, out, console, progress, found, chosen, left_out)


def check_folders(config: Prepare) -> tuple[Path, Path]:
    """Return the source folder and the output folder.

    Raises:
        UserError: one of them is not given, or one contains the other, so that the source folder would be changed; or
            masks are wanted of nothing; or neither a model nor a resolution is given.
    """
    if not config.source or not config.out:
        raise UserError("type in=PHOTOS out=PREPARED, the folder of your photos and a new folder")
    if not config.base_model and not config.resolution:
        raise UserError("without a model, photos have no size to be judged at: type base_model=NAME or resolution=512")
    if config.masks.model and not (config.masks.text or config.class_word):
        raise UserError("masks need a word for the subject: type class_word=dog, or masks.text=\"a dog\"")
    source, out = Path(config.source), Path(config.out)
    inside, around = source.resolve(), out.resolve()
    if source.is_dir():
        written = [folder.resolve() for folder in (out, out / "masks", out / "review")]
        if any(parent.exists() and parent.samefile(source) for path in written for parent in (path, *path.parents)):
            raise UserError(f"out={out} is in the folder of the photos, which is never changed: type out=DIR with a "
                            "folder elsewhere")
    if around in inside.parents:
        raise UserError(f"the photos in {source} are in out={out}: type out=DIR with a folder of its own")
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file, not a folder: type out=DIR with a new folder")
    return source, out


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        with file_lock.hold(folder / ".lock", timeout=0):
            yield
    except file_lock.Locked as error:
        raise UserError(f"another command prepares {folder.parent}: wait for it, or type another out=DIR") from error


@contextmanager
def _reporting_memory(phase: str, config: Prepare) -> Iterator[None]:
    """Raise OutOfMemory, with what the user can type, if memory runs out while a model works inside the block."""
    if not getattr(config, phase).model:
        yield
        return
    import torch

    from dreambooth.runtime.memory_meter import MemoryMeter

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    advice = ("CUDA_VISIBLE_DEVICES= before the command, which then uses the CPU" if device.type == "cuda" else
              f"{phase}.model=ID with a smaller model")
    with MemoryMeter(device, lambda _: advice, saved_notice="finished photos, captions and masks are kept"
                     ).phase(phase):
        yield


def _write(config: Prepare, source: Path, out: Path, console: Console, progress: Progress, found: Inspection,
           chosen: Sequence[SourcePhoto], left_out: Sequence[tuple[str, str]]) -> list[PreparedPhoto]:
    """Write the output folder, and print the report."""
    atomic_files.remove_leftovers(out)
    prepared = [_copy(file, out / name, progress) for file, name in copy_names(chosen)]
    annotator = Annotator(config, progress, console)
    remarks = list(found.remarks)
    for title, annotate in (("captions", partial(annotator.write_captions, source=source, remarks=remarks)),
                            ("masks", annotator.write_masks), ("faces", annotator.find_faces)):
        with _reporting_memory(title, config):
            annotate(prepared)
    for one in prepared:
        _add_remarks(one, config)
    command = train_command(config, out, prepared)
    unused = describe_unused_files(source, [file.path for file in found.files], key="in")
    strays = _strays(out, prepared)
    if strays:
        remarks.append(f"{', '.join(strays)} in {out} {'is' if len(strays) == 1 else 'are'} not of this call: remove "
                       "what shall not be trained on")
    summary: dict[str, Any] = {"command": command, "remarks": remarks, "unused": [printable(line) for line in unused]}
    review.write_review(out / "review", found, prepared, left_out, summary)
    _print_report(console, config, source, out, found, prepared, left_out, summary)
    return prepared


def copy_names(files: Sequence[SourcePhoto]) -> list[tuple[SourcePhoto, str]]:
    """Return each file with the name of its copy.

    Copies with different names have different stems, because the caption and the mask of a photo have its stem. Stems
    that differ only in upper and lower case, or in the Unicode form of letters, count as equal: they are equal on the
    file systems of macOS and Windows.
    """
    taken: set[str] = set()
    named = []
    for file in files:
        name, number = file.path.name, 2
        while (stem := unicodedata.normalize("NFC", Path(name).stem).casefold()) in taken:
            name, number = f"{file.path.stem}-{number}{file.path.suffix}", number + 1
        taken.add(stem)
        named.append((file, name))
    return named


def _copy(file: SourcePhoto, target: Path, progress: Progress) -> PreparedPhoto:
    """Copy a photo to `target`, unless the copy is there or the user has edited it."""
    current, entry = file_digest(target), progress.find("copy", target.name)
    edited = current is not None and current != file.digest and (entry is None or entry.output != current)
    assert file.photo is not None
    height, width = file.photo.original_size
    if edited:
        problems: list[str] = []
        photo = load_photo(target, 64, problems)
        if photo is None:
            raise UserError(f"{target.parent}: {problems[0]}; or remove it, and it is copied from the source again")
        return PreparedPhoto(file, target, current or "", photo.original_size[::-1], True, remarks=[
            f"{target.name} was edited in {target.parent}, and is kept as it is there"])
    content = file.path.read_bytes()
    written = digest(content)
    if current != written:
        with atomic_files.write_file(target) as temporary:
            temporary.write_bytes(content)
    if entry is None or entry.output != written:
        progress.add("copy", target.name, Entry(written, "", written))
    return PreparedPhoto(file, target, written, (width, height))


def _why_left_out(file: SourcePhoto, dropped: dict[Path, str]) -> str | None:
    """Return the sentence that says why a file has no copy; None if it has one."""
    if file.copy_of is not None:
        return f"{file.path.name} is the same picture as {file.copy_of}"
    return file.problem or dropped.get(file.path)


def _similar_to_drop(found: Inspection) -> dict[Path, str]:
    """Return the photos that look like a better one, each with a sentence that says so."""
    dropped: dict[Path, str] = {}
    for group in found.alike:
        best = inspection.best_of(group)
        dropped |= {file.path: f"{file.path.name} looks like {best.path.name}, which is larger or sharper"
                    for file in group if file is not best}
    return dropped


def _add_remarks(one: PreparedPhoto, config: Prepare) -> None:
    """Add the remarks that need the outputs of the models, and the name of the copy."""
    if one.path.name != one.file.path.name:
        one.remarks.append(f"{one.file.path.name} is copied as {one.path.name}, because another photo has the same "
                           "name up to its suffix")
    if config.trigger and one.caption and not contains_word(one.caption, config.trigger):
        one.remarks.append(f"{one.path.name} has a caption that does not name the subject: write {config.trigger} into "
                           "it")
    if one.subject and crop.loses_subject(*one.size, one.subject):
        best = crop.describe(crop.suggest_square(*one.size, one.subject))
        one.remarks.append(f"{one.path.name} shows the subject outside its central square: crop it to {best}, or type "
                           "dataset.buckets=true")


def train_command(config: Prepare, out: Path, prepared: Sequence[PreparedPhoto]) -> str:
    """Return the command that trains on the output folder, ready to paste."""
    settings: dict[str, quoting.Value] = {}
    if config.base_model:
        settings["model"] = config.base_model
        if config.side != default_resolution(config.base_model):
            settings["model.resolution"] = config.side
    settings |= {"dataset": "folder", "dataset.instance_dir": str(out)}
    if config.instance_prompt:
        settings["dataset.instance_prompt"] = config.instance_prompt
    if config.class_prompt:
        settings["dataset.class_prompt"] = config.class_prompt
    else:
        settings["prior.prior_loss_weight"] = 0
    if all(one.mask is not None for one in prepared):
        settings["dataset.mask"] = str(out / "masks")
    return quoting.command("train", settings)


def _strays(out: Path, prepared: Sequence[PreparedPhoto]) -> list[str]:
    """Return the names of the photos in the output folder that are not copies of this call."""
    return sorted({printable(path.name) for path in list_photos(out)} - {printable(one.path.name) for one in prepared})


def _print_report(console: Console, config: Prepare, source: Path, out: Path, found: Inspection,
                  prepared: Sequence[PreparedPhoto], left_out: Sequence[tuple[str, str]],
                  summary: dict[str, Any]) -> None:
    parts = [counted(len(prepared), "photo")]
    parts += [f"{count} {what}" for count, what in (
        (sum(one.caption is not None for one in prepared), "with a caption"),
        (sum(one.mask is not None for one in prepared), "with a mask"),
        (sum(min(one.size) < config.side for one in prepared), f"smaller than {config.side} pixels"),
        (sum(one.file.orientation != 1 for one in prepared), "turned upright by EXIF"),
        (sum(one.file.profile is not None for one in prepared), "converted to sRGB")) if count]
    remarks = [remark for one in prepared for remark in (*one.file.remarks, *one.remarks)] + summary["remarks"]
    for title, lines in ((f"left out of {counted(len(found.files), 'file')}:", [text for _, text in left_out]),
                         ("not read:", summary["unused"]), ("remarks:", remarks)):
        console.list(title, [printable(line) for line in lines])
    rows = {"prepared": f"{', '.join(parts)} in {out}"}
    if found.variety is not None:
        rows["variety"] = f"two photos differ in {found.variety:.0f} of 64 bits of their hashes; unrelated ones in 32"
    rows["review"] = str(out / "review" / review.PAGE)
    if not config.trigger:
        rows["prompts"] = "type trigger=zwx class_word=dog, with your words, to have prompts in the command"
    console.table(rows | {"train": summary["command"]})
