"""Lists of evaluation prompts: text files with one template per line, such as "a {subject} on the beach".

Imports no torch.
"""

import re
from pathlib import Path

PROMPT_DIR = Path(__file__).parents[1] / "assets" / "prompts"


def read_templates(source: str) -> list[str]:
    """Read the templates of a shipped list (scenes, object, live) or a text file. Lines that begin with # are comments.

    Raises:
        ValueError: the list does not exist or is empty, or a line lacks {subject}; the message is the end of a sentence
            that begins with "evaluate.prompts".
    """
    path = PROMPT_DIR / f"{source}.txt"
    path = path if path.is_file() else Path(source)
    shipped = ", ".join(sorted(file.stem for file in PROMPT_DIR.glob("*.txt")))
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"must be a shipped list ({shipped}) or a text file, and {source} cannot be read: "
                         "type evaluate.prompts=scenes") from error
    templates = [line for line in lines if line and not line.startswith("#")]
    if invalid := [line for line in templates if "{subject}" not in line]:
        raise ValueError(f"has a line without {{subject}} in {source}: write {{subject}} into {invalid[0]!r}")
    if not templates:
        raise ValueError(f"is empty in {source}: write one prompt per line, such as 'a {{subject}} on the beach'")
    return templates


def extract_subject(prompt: str) -> str:
    """Return the subject of a prompt: "zwx toy" for "a photo of a zwx toy".

    Return a prompt unchanged if it does not begin with words such as "a photo of".
    """
    return re.sub(r"^\s*(?:(?:an?|the)\s+)?(?:\w+\s+)?(?:photo|picture|image|drawing|render|cartoon)\s+of\s+"
                  r"(?:(?:an?|the|my)\s+)?", "", prompt, flags=re.IGNORECASE).strip()


def fill_templates(templates: list[str], subject: str) -> list[str]:
    """Return the templates with the placeholder {subject} replaced by `subject`."""
    return [template.replace("{subject}", subject) for template in templates]
