"""Numbers with their nouns, for messages."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 picture" or "2 pictures"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
