"""Numbers in messages agree with their nouns."""

from dreambooth.utils.plurals import counted


def test_one_has_no_plural() -> None:
    assert [counted(number, "picture") for number in (0, 1, 2)] == ["0 pictures", "1 picture", "2 pictures"]
