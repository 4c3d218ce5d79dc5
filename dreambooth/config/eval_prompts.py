"""Lists of evaluation prompts: one template a line with {subject} in it, # for remarks. No torch."""

import re
from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "assets" / "prompts"


def read(source: str) -> list[str]:
    """The templates of a list that ships with dreambooth (scenes, object, live), or of a text file.

    Raises:
        ValueError: there is no such list, or a line lacks {subject}; completes the sentence "evaluate.prompts ...".
    """
    path = SHIPPED / f"{source}.txt"
    path = path if path.is_file() else Path(source)
    shipped = ", ".join(sorted(found.stem for found in SHIPPED.glob("*.txt")))
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"is a list that ships ({shipped}) or a text file, and {source} cannot be read: "
                         "type evaluate.prompts=scenes") from error
    templates = [line for line in lines if line and not line.startswith("#")]
    if wrong := [line for line in templates if "{subject}" not in line]:
        raise ValueError(f"has a line without {{subject}} in {source}: write {{subject}} into {wrong[0]!r}")
    if not templates:
        raise ValueError(f"is empty in {source}: write one prompt a line, such as 'a {{subject}} on the beach'")
    return templates


def noun(prompt: str) -> str:
    """What a prompt is about: "zwx toy" of "a photo of a zwx toy"; a prompt of another form is taken whole."""
    return re.sub(r"^\s*(?:(?:an?|the)\s+)?(?:\w+\s+)?(?:photo|picture|image|drawing|render|cartoon)\s+of\s+"
                  r"(?:(?:an?|the|my)\s+)?", "", prompt, flags=re.IGNORECASE).strip()


def fill(templates: list[str], subject: str) -> list[str]:
    """The prompts themselves."""
    return [template.replace("{subject}", subject) for template in templates]
