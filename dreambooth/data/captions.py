"""Reads the caption of a photo from a text file beside the photo, or from a metadata file in the photo's folder.

If neither contains a caption of the photo, the instance prompt is used as its caption.

- The text file of NAME.jpg is NAME.txt or NAME.caption. kohya's trainer uses NAME.caption by default.
- metadata.jsonl and metadata.csv have the format of `imagefolder` in Hugging Face `datasets`: one JSON object per line,
  such as {"file_name": "a.jpg", "text": "a caption"}, or a table with the columns file_name and text.

Functions with the argument `problems` append one sentence to this list for each caption that cannot be used, so that
one message can report all of them. Imports no torch.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".caption")  # lower case
METADATA = ("metadata.jsonl", "metadata.csv")


def caption_files(photo: Path) -> Iterator[Path]:
    """Yield the existing files in which the caption of a photo may be: text files beside it, then metadata files.

    Do not change the order, because the fingerprint of a folder (see index/file_hashes.py) depends on it.
    """
    for suffix in TEXT_SUFFIXES:
        if text_file := next(filter(Path.is_file, map(photo.with_suffix, (suffix, suffix.upper()))), None):
            yield text_file
    yield from filter(Path.is_file, map(photo.with_name, METADATA))


def read_metadata(folder: Path, problems: list[str]) -> dict[str, str]:
    """Return the captions in a folder's metadata files, with the photo's file name as the key.

    Return an empty dictionary if the folder has no metadata file.
    """
    captions: dict[str, str] = {}
    for path in filter(Path.is_file, map(folder.joinpath, METADATA)):
        content = _read(path, problems) or ""
        for line, name, text in (_csv_rows if path.suffix == ".csv" else _json_rows)(path.name, content, problems):
            where = f"{path.name} line {line}"
            if not text:
                problems.append(f"{where} has an empty text: write a caption, or remove the line")
            elif not (folder / name).is_file():
                problems.append(f"{where} names {name}, which does not exist: remove the line")
            elif captions.setdefault(name, text) != text:
                problems.append(f"{where} gives {name} a second caption: remove one")
    return captions


def _json_rows(file_name: str, content: str, problems: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, name of the photo, caption) for each row of a metadata.jsonl."""
    # Not splitlines(): JSON strings may contain other line separators, such as U+2028.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = str(entry["file_name"]), _one_line(entry["text"])
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f'{file_name} line {number} is not {{"file_name": "photo.jpg", "text": "a caption"}}')
        else:
            yield number, name, text


def _csv_rows(file_name: str, content: str, problems: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, name of the photo, caption) for each row of a metadata.csv."""
    rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        if content and not {"file_name", "text"} <= set(rows.fieldnames or ()):
            problems.append(f"{file_name} has the columns {', '.join(map(str, rows.fieldnames or ()))}: name the "
                            "column of the photos file_name and the column of the captions text, separated by commas")
            return
        for row in rows:
            if not row["file_name"]:
                problems.append(f"{file_name} line {rows.line_num} names no photo: write its name under file_name")
            else:
                yield rows.line_num, row["file_name"], _one_line(row["text"] or "")
    except csv.Error as error:
        problems.append(f"{file_name} cannot be read as far as line {rows.line_num} ({error}): close its quotes")


def read_caption(photo: Path, prompt: str, metadata: Mapping[str, str], problems: list[str]) -> str | None:
    """Return the caption of a photo as one line. If the caption cannot be used, append to `problems` and return None.

    Args:
        prompt: returned if the photo has no caption.
        metadata: the result of `read_metadata` for the photo's folder.
    """
    found: dict[str, str] = {}  # file -> caption
    for path in caption_files(photo):
        if path.name in METADATA:
            continue
        content = _read(path, problems)
        if content is None:
            return None
        found[path.name] = _one_line(content)
        if not found[path.name]:
            problems.append(f"{path.name} is empty: write the caption into it, or remove it to use the prompt")
            return None
    if photo.name in metadata:
        names = filter(Path.is_file, map(photo.with_name, METADATA))
        found[" or ".join(path.name for path in names)] = metadata[photo.name]
    if len(set(found.values())) > 1:
        first, *others = found
        problems.append(f"{photo.name} has a caption in {first} and another in {others[-1]}: remove one")
        return None
    return next(iter(found.values()), prompt)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _read(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
    except UnicodeDecodeError:
        problems.append(f"{path.name} is not UTF-8 text: save the caption as UTF-8")
    return None
