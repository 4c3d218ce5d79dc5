"""The words of a photo: photo.txt beside it, its line in metadata.jsonl, else the prompt. No torch.

metadata.jsonl is the convention of Hugging Face `datasets`' imagefolder: one JSON object a line, {"file_name": "a.jpg",
"text": "a caption"}. What makes a caption unusable is appended to `problems`, a sentence each.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

METADATA = "metadata.jsonl"


def sources(photo: Path) -> Iterator[Path]:
    """The files beside a photo that its caption may stand in."""
    beside = next(filter(Path.is_file, map(photo.with_suffix, (".txt", ".TXT"))), None)
    if beside is not None:
        yield beside
    if (listed := photo.with_name(METADATA)).is_file():
        yield listed


def listed(folder: Path, problems: list[str]) -> dict[str, str]:
    """File name -> caption of the folder's metadata.jsonl; empty if there is none."""
    path = folder / METADATA
    if not path.is_file():
        return {}
    found: dict[str, str] = {}
    for number, line in enumerate((_read(path, problems) or "").split("\n"), start=1):  # JSON allows other line ends
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
            problems.append(f"{METADATA} line {number} names {name}, which is not there: remove the line")
        elif found.setdefault(name, text) != text:
            problems.append(f"{METADATA} line {number} gives {name} a second caption: remove one")
    return found


def caption(photo: Path, prompt: str, known: Mapping[str, str], problems: list[str]) -> str | None:
    """The caption of a photo on one line, or None and one more problem.

    Args:
        known: what `listed` found in its folder.
    """
    path = next((path for path in sources(photo) if path.name != METADATA), None)
    if path is None:
        return known.get(photo.name, prompt)
    content = _read(path, problems)
    if content is None:
        return None
    text = " ".join(content.split())
    if not text:
        problems.append(f"{path.name} is empty: write the caption into it, or remove it to use the prompt")
    elif known.get(photo.name, text) != text:
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
