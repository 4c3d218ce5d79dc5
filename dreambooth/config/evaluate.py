"""The config group `evaluate`, and the names and weighted sums of measures, which are metrics of image quality.

A measure has a role, which says what is measured, such as subject_similarity. An encoder is a
network that computes the features by which images are compared. The name of a measure consists of its role and its
encoder, such as `subject_similarity_efficientnet_lite0`. Some measures are those of the DreamBooth paper (Ruiz et al.
2023, arXiv:2208.12242, sections 4.1 and 4.3). They have the paper's name, such as `dino`, only if they are computed
with the paper's encoder.
Imports neither torch nor Hydra.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.config import eval_prompts
from dreambooth.config.enums import Direction, EncoderKind
from dreambooth.config.section import Section, require
from dreambooth.errors import UserError
from dreambooth.utils.assets import resolve_asset

SCENE_BORDERS = "scene_borders.json"  # in the folder of a base model, see evaluation/scene_borders.py
BORDER = "border"  # takes the place of an encoder in the name of the measure that SCENE_BORDERS makes possible
PROMPT_FIDELITY = "prompt_fidelity"
INSTANCE_LOSS = "instance_loss"  # an objective that needs no generated images, see training/instance_loss.py
VALIDATION_LOSS = "validation_loss"  # a measure that needs no generated images, see training/validation.py

HIGHER_IS_BETTER = {  # role -> whether a higher value is better
    "subject_similarity": True,  # similarity between generated images of the subject and its photos
    "text_similarity": True,  # similarity between generated images and their prompts
    PROMPT_FIDELITY: True,  # share of images whose surroundings are those that their prompt describes
    "diversity": True,  # distance between the images of one prompt
    "class_similarity": False,  # similarity between class images and photos of the subject; high if the class collapsed
    "class_drift": False,  # distance between images of the class and those that the base model generates
    VALIDATION_LOSS: False,  # loss of photos that do not train
}
_PAPER_NAMES = {  # (role, encoder) -> name in the paper
    ("subject_similarity", "dino"): "dino", ("class_similarity", "dino"): "pres",
    ("subject_similarity", "clip"): "clip_i", ("text_similarity", "clip"): "clip_t",
    ("diversity", "lpips"): "div",
}


@dataclass
class Evaluate(Section):
    """Settings of evaluation, which generates images from evaluation prompts and the class prompt, and scores them."""

    encoder: EncoderKind = EncoderKind.efficientnet_lite0
    every: int | None = None
    prompts: str = "scenes"
    images_per_prompt: int = 2
    class_images: int = 8
    seed: int = 1000
    reference_dir: str | None = None
    select: str | None = None
    objective: Any = INSTANCE_LOSS  # a text; several objectives are a list, which becomes a text with commas
    promote: bool = False
    max_class_similarity: float | None = None
    min_prompt_fidelity: float | None = None
    dino: str = "facebook/dino-vits16"
    clip: str = "openai/clip-vit-base-patch32"
    lpips: str | None = None
    offline: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.objective, list):
            self.objective = ",".join(map(str, self.objective))
        names = split_objectives(str(self.objective))
        bound, fidelity = self.max_class_similarity, self.min_prompt_fidelity
        require("evaluate", {
            "every": (self.every is None or self.every >= 1, f"1 or more, or null for the end only, not {self.every}"),
            "images_per_prompt": (self.images_per_prompt >= 1, f"1 or more, not {self.images_per_prompt}"),
            "class_images": (self.class_images >= 1, f"1 or more, not {self.class_images}"),
            "seed": (0 <= self.seed < 2**63, f"from 0 to 2**63 - 1, not {self.seed}"),
            "objective": (isinstance(self.objective, str) and all(names) and len(set(names)) == len(names),
                          f"a measure, a sum of measures, or a list of different ones, not {self.objective}"),
            "max_class_similarity": (bound is None or -1 <= bound <= 1,
                                     f"from -1 to 1, or null for no bound, not {bound}"),
            "min_prompt_fidelity": (fidelity is None or 0 <= fidelity <= 1,
                                    f"from 0 to 1, or null for no bound, not {fidelity}"),
        })

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the encoders; empty if `encoder` is none, which turns evaluation off."""
        kind = self.encoder
        return ("dino", "clip") if kind is EncoderKind.paper else (kind.value,) * (kind is not EncoderKind.none)


def measure_name(role: str, encoder: str) -> str:
    """Return the name of a measure.

    If the DreamBooth paper has a name for the measure, return this name, such as dino. Otherwise return ROLE_ENCODER,
    such as class_drift_dino.

    Args:
        role: what is measured, such as subject_similarity.
        encoder: name of the network that computes the features of the images.
    """
    return _PAPER_NAMES.get((role, encoder), f"{role}_{encoder}")


def measure_roles(evaluate: Evaluate, class_prompt: str, source: str = "", validates: bool = False) -> dict[str, str]:
    """Return what each measure of a run measures (its role, such as subject_similarity), by the measure's name.

    Several measures may have the same role. In the text that `parse_sum` parses, the role stands for the first of them.

    Args:
        source: the setting model.source.
        validates: whether the run measures the loss on held-out photos.
    """
    try:
        templates = eval_prompts.read_templates(evaluate.prompts)
    except ValueError:  # the file is not on this machine
        templates = []
    special = (BORDER,) * _names_scene(templates, source) + ("lpips",) * (evaluate.lpips is not None)
    encoders, only = evaluate.encoders, {BORDER: PROMPT_FIDELITY, "lpips": "diversity"}
    has_class = bool(class_prompt.strip())
    roles = {measure_name(role, encoder): role
            for encoder in (*special, *encoders) * bool(encoders) for role in HIGHER_IS_BETTER
            if role == only.get(encoder, role) and (encoder == "clip" or role != "text_similarity")
            and (role != "diversity" or evaluate.images_per_prompt > 1)
            and (role != PROMPT_FIDELITY or encoder == BORDER or (has_class and len(templates) != 1))
            and (has_class or not role.startswith("class_")) and role != VALIDATION_LOSS}
    return roles | ({VALIDATION_LOSS: VALIDATION_LOSS} if validates else {})


def _names_scene(templates: Sequence[str], source: str) -> bool:
    """Return whether a template names a scene whose border is described in the file SCENE_BORDERS of a base model.

    Args:
        source: the setting model.source.
    """
    try:
        scenes = json.loads((Path(resolve_asset(source)) / SCENE_BORDERS).read_text(encoding="utf-8"))["scenes"]
    except (OSError, ValueError, KeyError):
        return False
    return any(scene["phrase"] in template for scene in scenes.values() for template in templates)


def problems(evaluate: Evaluate, class_prompt: str, source: str, validate_every: int | None = None,
             stop_measure: str | None = None) -> Iterator[str]:
    """Yield one sentence for each broken rule of the group evaluate that involves several keys or files.

    Args:
        source: the setting model.source.
        validate_every: the setting train.validate_every; None if the run measures no loss on held-out photos.
        stop_measure: the setting train.stop_when.measure.
    """
    try:
        eval_prompts.read_templates(evaluate.prompts)
    except ValueError as error:
        yield f"evaluate.prompts {error}"
    if evaluate.reference_dir is not None and not Path(resolve_asset(evaluate.reference_dir)).is_dir():
        yield (f"evaluate.reference_dir={evaluate.reference_dir} is not a folder: type a folder with photos of the "
               "subject, or evaluate.reference_dir=null for the training photos")
    keys = [("evaluate.select", "chooses among checkpoints", evaluate.select),
            ("train.stop_when.measure", "is compared from time to time", stop_measure),
            *(("evaluate.objective", "", name) for name in split_objectives(evaluate.objective))]
    for key, purpose, text in keys:
        if text is None or (text == INSTANCE_LOSS and not purpose):
            continue
        try:
            weights = parse_sum(text, measure_roles(evaluate, class_prompt, source, validate_every is not None))
        except ValueError as error:
            yield f"{key} {error}"
            continue
        if purpose and evaluate.every is None and weights.keys() != {VALIDATION_LOSS}:
            yield f"{key} {purpose}: type evaluate.every=50, steps between evaluations"
        elif purpose and weights.keys() > {VALIDATION_LOSS} and evaluate.every and validate_every \
                and evaluate.every % validate_every:
            yield (f"{key} needs the validation_loss of every evaluation, and evaluate.every={evaluate.every} is no "
                   f"multiple of train.validate_every={validate_every}: type train.validate_every={evaluate.every}")


def steps_between(measures: Collection[str], evaluate_every: int | None, validate_every: int | None) -> int | None:
    """Return the number of steps between the steps at which all `measures` are measured; None: only at the end.

    Args:
        measures: names of measures, one or more.
        evaluate_every: the setting evaluate.every.
        validate_every: the setting train.validate_every.
    """
    return validate_every if set(measures) == {VALIDATION_LOSS} else evaluate_every


def parse_measure(text: str, measured: Mapping[str, str]) -> tuple[dict[str, float], Direction]:
    """Parse the setting train.stop_when.measure: the name of a measure, or a sum as in `parse_sum`.

    Returns:
        The weight of each measure, and the direction in which the weighted sum becomes better. A single name has the
        weight 1, so that the value is that of the measure itself. A greater sum is better.

    Raises:
        ValueError: as in `parse_sum`.
    """
    weights = parse_sum(text, measured)
    return weights if _is_sum(text) else dict.fromkeys(weights, 1.0), better_direction(text)


def parse_sum(text: str, measured: Mapping[str, str]) -> dict[str, float]:
    """Parse a weighted sum of measures, such as `subject_similarity+0.5*class_drift`. A higher sum is better.

    The weights in `text` are positive. In the result, a measure for which lower is better has a negative weight.

    Args:
        text: terms `MEASURE` or `WEIGHT*MEASURE`, joined by `+`. MEASURE is the role or the name of a measure.
        measured: the role of each measure of the run, by the measure's name, see `measure_roles`.

    Returns:
        The signed weight of each measure, by name.

    Raises:
        ValueError: a term has another form, or names a measure that is not in `measured`. The message is the end of a
            sentence that begins with the configuration key of `text`, such as evaluate.objective.
    """
    weights: dict[str, float] = {}
    for term in text.replace(" ", "").split("+"):
        match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)\*)?([a-z]\w*)", term)
        if not match:
            raise ValueError(f"must be a sum such as subject_similarity+0.5*class_drift, not {text!r}")
        measure = next((key for key, role in measured.items() if match[2] in (key, role)), None)
        if measure is None and match[2] == VALIDATION_LOSS:
            raise ValueError("names validation_loss, and no photos are held out: type dataset.validation_count=1, or "
                             "dataset.validation_dir=DIR, with train.validate_every=50")
        if measure is None:
            available = f"one of {', '.join(measured)}" if measured else "evaluate.encoder=efficientnet_lite0"
            raise ValueError(f"names {match[2]}, which this run does not measure: type {available}")
        sign = 1 if HIGHER_IS_BETTER[measured[measure]] else -1
        weights[measure] = weights.get(measure, 0.0) + sign * float(match[1] or 1)
    return weights


def compute_objective(text: str, measured: Mapping[str, str], scores: Mapping[str, float]) -> float:
    """Return the number that a sweep minimises.

    If `text` is "instance_loss", this is the instance loss in `scores`. Otherwise it is the weighted sum of measures
    that `text` describes, multiplied by -1.

    Args:
        text: the setting evaluate.objective. Of several objectives, the first one counts.
        measured: the role of each measure of the run, by the measure's name, see `measure_roles`.
        scores: the value of each measure, and of the instance loss, by name.
    """
    text = split_objectives(text)[0]
    return scores[text] if text == INSTANCE_LOSS else -weighted_sum(parse_sum(text, measured), scores)


def split_objectives(text: str) -> list[str]:
    """Return the objectives that the setting evaluate.objective names, one or more."""
    return [name.strip() for name in text.split(",")]


def require_one_objective(text: str) -> None:
    """Raise UserError if the setting evaluate.objective names several, for sweeps that compare their runs by one."""
    if len(split_objectives(text)) > 1:
        raise UserError(f"evaluate.objective={text} are several objectives, and workflows compare runs by one: type "
                        "evaluate.objective=ONE, or run the sweep with python -m dreambooth.train -m")


def _is_sum(text: str) -> bool:
    return "+" in text or "*" in text


def better_direction(objective: str) -> Direction:
    """Return the direction in which one of several objectives becomes better. A greater sum of measures is better.

    Raises:
        ValueError: no measure has this name. The message is the end of a sentence that begins with the key.
    """
    if _is_sum(objective):
        return Direction.max
    papers = {name: role for (role, _), name in _PAPER_NAMES.items()}
    role = papers.get(objective) or next((role for role in HIGHER_IS_BETTER if objective == role
                                          or objective.startswith(f"{role}_")), None)
    if role is None and objective != INSTANCE_LOSS:
        raise ValueError(f"names {objective}, which is no measure: type a list such as "
                         "[subject_similarity,class_drift]")
    return Direction.max if role is not None and HIGHER_IS_BETTER[role] else Direction.min


def compute_objectives(text: str, measured: Mapping[str, str], scores: Mapping[str, float]) -> dict[str, float]:
    """Return the value of each of several objectives, by name; {} if the setting evaluate.objective names only one.

    Unlike the number that `compute_objective` returns, a value has the sign of the measure or of the sum: whether lower
    or higher values are better depends on the objective, see `better_direction`. The arguments are those of
    `compute_objective`.
    """
    names = split_objectives(text)
    return {name: scores[name] if name == INSTANCE_LOSS else weighted_sum(parse_measure(name, measured)[0], scores)
            for name in names} if len(names) > 1 else {}


def read_objective(result: Mapping[str, Any]) -> float | list[float] | None:
    """Return what a run returns to a sweeper: its objective, or a list of several. None if one is not a finite number.

    Args:
        result: the content of the run's result.json.
    """
    values = [result.get("objective"), *(result.get("objectives") or {}).values()]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return None
    numbers = [float(value) for value in values]
    return numbers[1:] or numbers[0]


def weighted_sum(weights: Mapping[str, float], scores: Mapping[str, float]) -> float:
    """Return the sum of weight * score over the measures in `weights`. Scores of other measures are ignored."""
    return sum(weight * scores[measure] for measure, weight in weights.items())
