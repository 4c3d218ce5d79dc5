"""Numbers with their nouns, for messages."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, such as "1 picture" or "2 pictures".

    Args:
        plural: the plural of the noun; "": the noun with an s.
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
