"""Suggests the square part of a photo to crop to."""

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def suggest_square(width: int, height: int, subject: Box | None) -> Box:
    """Return the largest square of a photo whose centre is as near as possible to that of the subject.

    Args:
        width, height: size of the upright photo in pixels.
        subject: where the subject is; None: the centre of the photo.
    """
    side = min(width, height)
    left, top, right, bottom = subject or (0, 0, width, height)
    x = min(max(0, (left + right - side) // 2), width - side)
    y = min(max(0, (top + bottom - side) // 2), height - side)
    return x, y, x + side, y + side


def loses_subject(width: int, height: int, subject: Box, allowed: float = 0.1) -> bool:
    """Return whether the central square of a photo contains less of the subject's box than the best square does.

    Args:
        allowed: the fraction of the box that may be lost without a remark.
    """
    def inside(square: Box) -> float:
        width, height = (max(0, min(subject[axis + 2], square[axis + 2]) - max(subject[axis], square[axis]))
                         for axis in (0, 1))
        return width * height / max(1, (subject[2] - subject[0]) * (subject[3] - subject[1]))

    return inside(suggest_square(width, height, subject)) - inside(suggest_square(width, height, None)) > allowed


def describe(box: Box) -> str:
    """Return a box as text, such as "512 x 512 pixels from (120, 0)"."""
    return f"{box[2] - box[0]} x {box[3] - box[1]} pixels from ({box[0]}, {box[1]})"
