"""The files in which encoded prompts are kept."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dreambooth.models.prompt_encodings import PromptEncodings
from tests.support.runs import flip_bit


def test_a_prompt_is_encoded_once_and_damaged_files_again(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def encode(prompts: Sequence[str]) -> Iterator[Tensor]:
        calls.append(list(prompts))
        yield from (torch.full((1, 2), float(len(prompt))) for prompt in prompts)

    def opened(key: str = "encoder") -> PromptEncodings:
        return PromptEncodings(tmp_path, key, encode, torch.device("cpu"))

    opened().ensure(["b", "", "aaa", "b"])
    assert calls == [["", "aaa", "b"]]
    assert opened()["aaa"].tolist() == [[3.0, 3.0]]
    assert calls[1:] == []
    flip_bit(opened().path("b"), 0.99)
    (path := opened().path("aaa")).write_bytes(path.read_bytes()[:20])
    opened().ensure(["aaa", "b"])
    assert calls[1:] == [["aaa", "b"]]
    opened("another encoder").ensure(["b"])
    assert calls[2:] == [["b"]]
