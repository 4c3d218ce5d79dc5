"""Which layers get an adapter, with which rank; patterns that match nothing name similar layers."""

from typing import Any

import pytest
from torch import nn

from dreambooth.config.enums import Dtype, MethodKind
from dreambooth.config.method import Method
from dreambooth.errors import UserError
from dreambooth.models import families, lora
from dreambooth.models.adapters.selection import matches, select

TARGETS = families.of_architecture("sd15").adapter_targets


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = [nn.ModuleDict({name: nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 8)})
                                for name in ("attn1", "attn2")}) for _ in range(2)]
        self.unet = nn.ModuleDict({"down_blocks": nn.ModuleList(block), "to_q": nn.Linear(8, 8),
                                   "conv_in": nn.Conv2d(4, 8, 3)})
        self.text_encoder = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})


def chosen(**settings: Any) -> dict[str, tuple[int, float]]:
    choices = select(Model(), Method("lora", MethodKind.lora, **settings), TARGETS)
    return {name: (choice.rank, choice.alpha) for name, choice in choices.items()}


def test_patterns_choose_layers_ranks_and_alphas() -> None:
    assert len(chosen()) == 10 and set(chosen().values()) == {(16, 16.0)}
    assert list(chosen(target_modules=["attn2.*", "text_encoder.*"], exclude_modules=["unet.*.1.attn2.to_k"])) == [
        "unet.down_blocks.0.attn2.to_q", "unet.down_blocks.0.attn2.to_k", "unet.down_blocks.1.attn2.to_q",
        "text_encoder.q_proj"]
    found = chosen(rank_pattern={"attn1.to_q": 4, "attn1.*": 2}, alpha_pattern={"text_encoder.*": 3.0})
    assert found["unet.down_blocks.0.attn1.to_q"] == (4, 4.0), "the first match counts"
    assert found["unet.down_blocks.0.attn1.to_k"] == (2, 2.0)
    assert found["text_encoder.q_proj"] == (16, 3.0)
    assert chosen(alpha=8.0, rank_pattern={"q_proj": 4})["text_encoder.q_proj"] == (4, 8.0)
    assert matches("unet.to_q", "to_q") and not matches("unet.xto_q", "to_q")


@pytest.mark.parametrize(("settings", "message"), [
    ({"target_modules": ["attn2.to_qq"]}, r"attn2.to_qq in method.target_modules matches no layer; similar names are "
                                          r".*attn2.to_q.*: type .*attn2.to_q"),
    ({"exclude_modules": ["conv_in"]}, "conv_in in method.exclude_modules matches 1 layer, none of them a layer of "
                                       "method.targets=transformer: type method.targets=all"),
    ({"exclude_modules": ["*"]}, "leaves no layer"),
    ({"rank_pattern": {"to_q": 2, "attn1.to_q": 4}}, "an earlier pattern: leave attn1.to_q out")])
def test_a_pattern_without_effect_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(**settings)


def test_peft_adapts_exactly_the_chosen_layers_with_their_ranks() -> None:
    """unet.to_q alone is chosen, although the names of other layers end with it."""
    model = Model()
    method = Method("lora", MethodKind.lora, target_modules=["unet.to_q", "text_encoder.*"],
                    rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4.0})
    lora.inject(model, method, TARGETS, 1, Dtype.fp32)
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in lora.layers(model)}
    assert found == {"unet.to_q": (16, 1.0), "text_encoder.q_proj": (2, 2.0)}
    assert lora.describe(model, method) == [
        "adapter: lora in 1 layer of unet, 1 layer of text_encoder, 288 weights",
        "  target_modules unet.to_q: 1 layer, 256 weights", "  target_modules text_encoder.*: 1 layer, 32 weights",
        "  rank_pattern q_proj=2: 1 layer, 32 weights", "  alpha_pattern q_proj=4.0: 1 layer, 32 weights"]
