"""What can be measured, by name, and which way is better. No torch.

A measure has a role, such as subject_similarity, and a name that says how it was measured: `dino`, or
`subject_similarity_efficientnet_lite0`. What the paper defines (Ruiz et al. 2023, arXiv:2208.12242, sections 4.1 and
4.3) has the paper's name, and only if it was measured with the paper's encoder.
"""

import re
from collections.abc import Iterable, Mapping

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
ENCODERS = {"none": (), "efficientnet_lite0": ("efficientnet_lite0",), "dino": ("dino",), "clip": ("clip",),
            "paper": ("dino", "clip")}  # evaluate.encoder -> what looks


def name(role: str, encoder: str) -> str:
    """class_drift seen through dino -> class_drift_dino; the paper's names for what the paper defines."""
    return _PAPER.get((role, encoder), f"{role}_{encoder}")


def measured(encoders: Iterable[str], with_lpips: bool, with_class: bool) -> dict[str, str]:
    """name -> role of everything that these encoders measure, in the order in which a role finds its name."""
    seen = ["lpips"] * with_lpips + list(encoders)
    return {name(role, encoder): role for encoder in seen for role in HIGHER_IS_BETTER
            if (encoder != "lpips" or role == "diversity") and (encoder == "clip" or role != "text_similarity")
            and (with_class or not role.startswith("class_"))}


def parse(text: str, known: Mapping[str, str]) -> dict[str, float]:
    """`subject_similarity+0.5*class_drift`, roles or names, as name -> signed weight; the greater the sum, the better.

    Each measure counts in the direction that is better, so that weights are always positive.

    Args:
        known: name -> role of what is measured, see `measured`.

    Raises:
        ValueError: a term is not `measure` or `weight*measure`, or is not measured; completes the sentence "KEY ...".
    """
    found: dict[str, float] = {}
    for term in text.replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)\*)?([a-z]\w*)", term)
        if not match:
            raise ValueError(f"is a sum such as subject_similarity+0.5*class_drift, not {text!r}")
        measure = next((key for key, role in known.items() if match[2] in (key, role)), None)
        if measure is None:
            raise ValueError(f"names {match[2]}, which this run does not measure: type one of {', '.join(known)}")
        sign = 1 if HIGHER_IS_BETTER[known[measure]] else -1
        found[measure] = found.get(measure, 0.0) + sign * float(match[1] or 1)
    return found


def total(weights: Mapping[str, float], scores: Mapping[str, float]) -> float:
    """The weighted sum of scores."""
    return sum(weight * scores[measure] for measure, weight in weights.items())
