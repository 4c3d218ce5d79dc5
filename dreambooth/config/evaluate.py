"""What can be measured, by name, and which way is better; the section `evaluate` of a run. No torch.

A measure has a role, such as subject_similarity, and a name that says how it was measured: `dino`, or
`subject_similarity_efficientnet_lite0`. What the paper defines (Ruiz et al. 2023, arXiv:2208.12242, sections 4.1 and
4.3) has the paper's name, and only if it was measured with the paper's encoder.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dreambooth.config import eval_prompts
from dreambooth.config.enums import EncoderKind
from dreambooth.config.section import Section, require
from dreambooth.utils.assets import asset

INSTANCE_LOSS = "instance_loss"  # the objective that needs no picture, see objective.py

HIGHER_IS_BETTER = {
    "subject_similarity": True,  # pictures of the subject to its photos
    "text_similarity": True,  # pictures to their prompts
    "diversity": True,  # pictures of one prompt to each other
    "class_similarity": False,  # pictures of the class to photos of the subject: it collapsed onto it
    "class_drift": False,  # pictures of the class now to those before training
}
_PAPER = {
    ("subject_similarity", "dino"): "dino", ("class_similarity", "dino"): "pres",
    ("subject_similarity", "clip"): "clip_i", ("text_similarity", "clip"): "clip_t",
    ("diversity", "lpips"): "div",
}


@dataclass
class Evaluate(Section):
    """How well a run did: pictures of evaluation prompts and of the class, scored by an encoder."""

    encoder: EncoderKind = EncoderKind.efficientnet_lite0
    every: int | None = None
    prompts: str = "scenes"
    images_per_prompt: int = 2
    class_images: int = 8
    seed: int = 1000
    reference_dir: str | None = None
    select: str | None = None
    objective: str = INSTANCE_LOSS
    promote: bool = False
    max_class_similarity: float | None = None
    dino: str = "facebook/dino-vits16"
    clip: str = "openai/clip-vit-base-patch32"
    lpips: str | None = None
    offline: bool = True

    def __post_init__(self) -> None:
        bound = self.max_class_similarity
        require("evaluate", {
            "every": (self.every is None or self.every >= 1, f"1 or more, or null for the end only, not {self.every}"),
            "images_per_prompt": (self.images_per_prompt >= 1, f"1 or more, not {self.images_per_prompt}"),
            "class_images": (self.class_images >= 1, f"1 or more, not {self.class_images}"),
            "seed": (0 <= self.seed < 2**63, f"from 0 to 2**63 - 1, not {self.seed}"),
            "max_class_similarity": (bound is None or -1 <= bound <= 1,
                                     f"from -1 to 1, or null for no bound, not {bound}"),
        })

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of what looks; none: there is no evaluation."""
        kind = self.encoder
        return ("dino", "clip") if kind is EncoderKind.paper else (kind.value,) * (kind is not EncoderKind.none)


def name(role: str, encoder: str) -> str:
    """class_drift seen through dino -> class_drift_dino; the paper's names for what the paper defines."""
    return _PAPER.get((role, encoder), f"{role}_{encoder}")


def known(evaluate: Evaluate, class_prompt: str) -> dict[str, str]:
    """name -> role of everything that a run measures, in the order in which a role finds its name."""
    looks = evaluate.encoders
    seen = ("lpips",) * (evaluate.lpips is not None and bool(looks)) + looks
    return {name(role, encoder): role for encoder in seen for role in HIGHER_IS_BETTER
            if (encoder != "lpips" or role == "diversity") and (encoder == "clip" or role != "text_similarity")
            and (role != "diversity" or evaluate.images_per_prompt > 1)
            and (bool(class_prompt.strip()) or not role.startswith("class_"))}


def problems(evaluate: Evaluate, class_prompt: str) -> Iterator[str]:
    """Rules between the keys of the section that are broken, one sentence each."""
    try:
        eval_prompts.read(evaluate.prompts)
    except ValueError as error:
        yield f"evaluate.prompts {error}"
    if evaluate.reference_dir is not None and not Path(asset(evaluate.reference_dir)).is_dir():
        yield (f"evaluate.reference_dir={evaluate.reference_dir} is no folder: type a folder with photos of the "
               "subject, or evaluate.reference_dir=null for the training photos")
    if evaluate.select is not None and evaluate.every is None:
        yield "evaluate.select chooses among checkpoints: type evaluate.every=50, steps between evaluations"
    for key, text in (("select", evaluate.select), ("objective", evaluate.objective)):
        if text is None or (key == "objective" and text == INSTANCE_LOSS):
            continue
        try:
            parse(text, known(evaluate, class_prompt))
        except ValueError as error:
            yield f"evaluate.{key} {error}"


def parse(text: str, measured: Mapping[str, str]) -> dict[str, float]:
    """`subject_similarity+0.5*class_drift`, roles or names, as name -> signed weight; the greater the sum, the better.

    Each measure counts in the direction that is better, so that weights are always positive.

    Args:
        measured: name -> role of what is measured, see `known`.

    Raises:
        ValueError: a term is not `measure` or `weight*measure`, or is not measured; completes the sentence "KEY ...".
    """
    found: dict[str, float] = {}
    for term in text.replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)\*)?([a-z]\w*)", term)
        if not match:
            raise ValueError(f"is a sum such as subject_similarity+0.5*class_drift, not {text!r}")
        measure = next((key for key, role in measured.items() if match[2] in (key, role)), None)
        if measure is None:
            others = f"one of {', '.join(measured)}" if measured else "evaluate.encoder=efficientnet_lite0"
            raise ValueError(f"names {match[2]}, which this run does not measure: type {others}")
        sign = 1 if HIGHER_IS_BETTER[measured[measure]] else -1
        found[measure] = found.get(measure, 0.0) + sign * float(match[1] or 1)
    return found


def objective(text: str, measured: Mapping[str, str], scores: Mapping[str, float]) -> float:
    """What a sweep minimises: the instance loss, or minus the weighted sum of measures."""
    return scores[text] if text == INSTANCE_LOSS else -total(parse(text, measured), scores)


def total(weights: Mapping[str, float], scores: Mapping[str, float]) -> float:
    """The weighted sum of scores."""
    return sum(weight * scores[measure] for measure, weight in weights.items())
