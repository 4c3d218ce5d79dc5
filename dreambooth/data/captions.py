"""Reads the caption of a photo from NAME.txt beside NAME.jpg, else from metadata.jsonl. The default is the prompt.

metadata.jsonl has the format of `imagefolder` in Hugging Face `datasets`: one JSON object per line, such as
{"file_name": "a.jpg", "text": "a caption"}. Functions with the argument `problems` append one sentence to this list for
each caption that cannot be used, so that one message can report all of them. Imports no torch.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

METADATA = "metadata.jsonl"


def caption_files(photo: Path) -> Iterator[Path]:
    """Yield the files beside a photo in which its caption may be: NAME.txt and metadata.jsonl, as far as they exist."""
    text_file = next(filter(Path.is_file, map(photo.with_suffix, (".txt", ".TXT"))), None)
    if text_file is not None:
        yield text_file
    if (metadata := photo.with_name(METADATA)).is_file():
        yield metadata


def read_metadata(folder: Path, problems: list[str]) -> dict[str, str]:
    """Return the captions in a folder's metadata.jsonl, with the photo's file name as the key.

    Return an empty dictionary if the folder has no metadata.jsonl.
    """
    path = folder / METADATA
    if not path.is_file():
        return {}
    captions: dict[str, str] = {}
    # Not splitlines(): JSON strings may contain other line separators, such as U+2028.
    for number, line in enumerate((_read(path, problems) or "").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], " ".join(entry["text"].split())
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f'{METADATA} line {number} is not {{"file_name": "photo.jpg", "text": "a caption"}}')
            continue
        if not text:
            problems.append(f"{METADATA} line {number} has an empty text: write a caption, or remove the line")
        elif not isinstance(name, str) or not (folder / name).is_file():
            problems.append(f"{METADATA} line {number} names {name}, which does not exist: remove the line")
        elif captions.setdefault(name, text) != text:
            problems.append(f"{METADATA} line {number} gives {name} a second caption: remove one")
    return captions


def read_caption(photo: Path, prompt: str, metadata: Mapping[str, str], problems: list[str]) -> str | None:
    """Return the caption of a photo as one line.

    If the caption cannot be used, append the reason to `problems` and return None.
    Args:
        prompt: returned if the photo has no caption.
        metadata: the result of `read_metadata` for the photo's folder.
    """
    path = next((path for path in caption_files(photo) if path.name != METADATA), None)
    if path is None:
        return metadata.get(photo.name, prompt)
    content = _read(path, problems)
    if content is None:
        return None
    text = " ".join(content.split())
    if not text:
        problems.append(f"{path.name} is empty: write the caption into it, or remove it to use the prompt")
    elif metadata.get(photo.name, text) != text:
        problems.append(f"{photo.name} has a caption in {path.name} and another in {METADATA}: remove one")
        return None
    return text or None


def _read(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
    except UnicodeDecodeError:
        problems.append(f"{path.name} is not UTF-8 text: save the caption as UTF-8")
    return None
