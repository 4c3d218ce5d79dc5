"""What a message advises is accepted when it is typed: no advice is answered by another message."""

import re
from itertools import combinations
from typing import Any

import pytest

from dreambooth.config import validation
from dreambooth.config.enums import Dtype, MethodKind, OptimizerKind, PriorKind, Rounding, Weights
from dreambooth.config.schema import Config
from tests.support.configs import NONE, T4, demo_config

ENUMS = {"prior.kind": PriorKind, "memory.weights": Weights, "memory.rounding": Rounding}
SETTINGS: list[dict[str, Any]] = [
    {"train__global_batch_size": 2}, {"train__gradient_accumulation_steps": 2}, {"train__compile": True},
    {"prior__kind": PriorKind.output}, {"prior__with_prior_preservation": False},
    {"method__kind": MethodKind.lora, "method__name": "lora"}, {"memory__optimizer_in_backward": True},
    {"memory__offload_optimizer": True}, {"memory__split_prior": True}, {"memory__fully_shard": True},
    {"memory__weights": Weights.half}, {"memory__rounding": Rounding.kahan}, {"precision__dtype": Dtype.bf16},
    {"dataset__buckets": True}, {"dataset__center_crop": False}, {"optimizer__kind": OptimizerKind.adafactor},
    {"train__channels_last": True}, {"train__train_text_encoder": False}]


def problems(values: dict[str, Any], device: str) -> list[str]:
    config: Config = demo_config(**values)
    return list(validation.problems(config, device, T4 if device == "cuda" else NONE))


def reason(sentence: str) -> str:
    return sentence.partition(": type ")[0]


def first_advice(sentence: str) -> dict[str, Any]:
    """The overrides before the first alternative, as values of `demo_config`."""
    typed: dict[str, Any] = {}
    for word in re.split(r",? or |, ", sentence.rpartition(": type ")[2])[0].split():
        key, _, text = word.partition("=")
        if key == "precision":
            typed["precision__dtype"] = Dtype(text)
        elif key in ("method", "optimizer"):
            typed[f"{key}__kind"] = (MethodKind if key == "method" else OptimizerKind)(text)
            typed |= {"method__name": text} if key == "method" else {}
        else:
            known: dict[str, Any] = {"true": True, "false": False, "null": None, "1": 1}
            value = known[text] if text in known else ENUMS[key](text) if key in ENUMS else text
            typed[key.replace(".", "__")] = value
    return typed


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_advised_is_accepted(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "find_spec", lambda name: True)
    refused = []
    for pair in [*combinations(SETTINGS, 2), *combinations(SETTINGS[:10], 3)]:
        values = {key: value for settings in pair for key, value in settings.items()}
        before = problems(values, device)
        for sentence in before:
            after = problems(values | first_advice(sentence), device)
            refused += [f"{values}\n  {sentence}\n  -> {new}" for new in after
                        if new == sentence or reason(new) not in map(reason, before)]
    assert not refused, "\n".join(refused[:20]) + f"\n{len(refused)}"
