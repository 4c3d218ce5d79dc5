"""Draws pictures with a running server, and measures whether they show the subject of the run."""

import base64
import io
import math
import os
from typing import Any

import requests
from PIL import Image, UnidentifiedImageError

from dreambooth.config.evaluate import measure_name
from dreambooth.config.recipe import Recipe
from dreambooth.errors import UserError
from dreambooth.serving.options import TOKEN_VARIABLE
from dreambooth.sweeps.trials import load_trial

SUBJECT_SIMILARITY = "subject_similarity"
# Share of the gain in subject_similarity over the base model that the pictures of a server must have. Pictures of
# another model have none of it; the precision of the server changes it by little.
MIN_SHARE = 0.5
TIMEOUT = 600  # seconds for one picture


def check(url: str, recipe: Recipe) -> str:
    """Draw one picture of each evaluation prompt, and compare their subject_similarity with that of the run.

    Args:
        url: address of the server.
        recipe: the run whose model the server should have.

    Returns:
        A sentence with the measured value.

    Raises:
        UserError: the server refuses a request, or the pictures have less than MIN_SHARE of the run's gain.
    """
    pictures = [_draw(url, recipe, prompt) for prompt in recipe.evaluate_prompts]
    if (measured := load_trial(recipe.run_dir).score(SUBJECT_SIMILARITY)) is None:
        return f"{len(pictures)} pictures were drawn, and not measured, because the run has no {SUBJECT_SIMILARITY}"
    from dreambooth.evaluation.evaluator import Scorer
    from dreambooth.evaluation.scoring import score

    name, trained, base = measured
    scorer = Scorer(recipe)
    encoders = [one for one in scorer.encoders if measure_name(SUBJECT_SIMILARITY, one.name) == name]
    value = score(scorer.reference, dict(zip(recipe.evaluate_texts, ([one] for one in pictures), strict=True)),
                  encoders)[name]
    least = MIN_SHARE * trained if math.isnan(base) else base + MIN_SHARE * (trained - base)
    numbers = f"{name} of {len(pictures)} pictures is {value:.3f}, the run's was {trained:.3f}"
    if value < least:
        raise UserError(f"the pictures of the server do not show the subject: {numbers}, and at least {least:.3f} is "
                        "required: check the base model and the precision of the server")
    return numbers


def _draw(url: str, recipe: Recipe, prompt: str) -> Image.Image:
    """Return the picture that the evaluation of the run drew first from `prompt`, drawn by the server."""
    token = os.environ.get(TOKEN_VARIABLE)
    body: dict[str, Any] = {
        "prompt": prompt, "seed": recipe.evaluate.seed, "num_inference_steps": recipe.sample.num_inference_steps,
        "guidance_scale": recipe.sample.guidance_scale}
    try:
        answer = requests.post(f"{url}/v1/images/generations", json=body, timeout=TIMEOUT,
                               headers={"Authorization": f"Bearer {token}"} if token else {})
        if not answer.ok:
            raise UserError(f"the server at {url} refused a picture with status {answer.status_code} "
                            f"({' '.join(answer.text.split())[:200]}): see its log")
        return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).convert("RGB")
    except (requests.RequestException, ValueError, LookupError, UnidentifiedImageError) as error:
        raise UserError(f"the server at {url} did not draw ({' '.join(str(error).split())[:200]}): see its log"
                        ) from error
