"""Tests of the config group `evaluate`: names of measures, weighted sums, prompt lists, rules, objectives."""

from pathlib import Path

import pytest

from dreambooth.config import eval_prompts, evaluate
from dreambooth.config.evaluate import EncoderKind, Evaluate, compute_objective, measure_roles, parse_sum
from dreambooth.errors import ConfigError, UserError
from dreambooth.runs.identity import identity
from dreambooth.runs.run_folder import Result, with_objective
from dreambooth.training.best_weights import best_step
from tests.support.configs import compose_config, compose_recipe

OFFLINE = measure_roles(Evaluate(), "a photo of a toy")
PAPER = measure_roles(Evaluate(encoder=EncoderKind.paper, lpips="x"), "a photo of a toy")
OFFLINE_SETTINGS = Evaluate()
CHOOSING = ["evaluate.every=50", "evaluate.select=subject_similarity"]


def test_only_the_papers_encoders_measure_by_the_papers_names() -> None:
    names = {"dino", "clip_i", "clip_t", "pres", "div"}
    assert names <= PAPER.keys()
    assert not names & OFFLINE.keys()
    assert all(name.endswith("_efficientnet_lite0") for name in OFFLINE)


def test_without_lpips_weights_nothing_is_called_div() -> None:
    roles = measure_roles(Evaluate(encoder=EncoderKind.paper), "a toy")
    assert "div" not in roles
    assert roles["diversity_dino"] == "diversity"


def test_a_run_without_a_class_prompt_measures_no_class() -> None:
    assert not [name for name in measure_roles(Evaluate(), "") if "class" in name or "prompt" in name]


def test_only_a_base_that_describes_its_scenes_measures_prompt_fidelity_by_borders(tmp_path: Path) -> None:
    """The measure by borders is exact, so it comes first. The base is known by its file, not by its name."""
    def measured(source: str, evaluate: Evaluate = OFFLINE_SETTINGS, class_prompt: str = "a toy") -> list[str]:
        return [name for name, role in measure_roles(evaluate, class_prompt, source).items()
                if role == "prompt_fidelity"]

    assert measured("package:tiny-sd") == ["prompt_fidelity_border", "prompt_fidelity_efficientnet_lite0"]
    assert measured("package:tiny-sd", class_prompt="") == ["prompt_fidelity_border"]
    assert measured("package:tiny-sd", Evaluate(encoder=EncoderKind.none)) == []
    assert measured(str(tmp_path)) == measured("owner/name") == ["prompt_fidelity_efficientnet_lite0"]
    (tmp_path / "one.txt").write_text("a {subject} on the moon\n", encoding="utf-8")
    assert measured("package:tiny-sd", Evaluate(prompts=str(tmp_path / "one.txt"))) == []


def test_prompt_fidelity_may_be_selected_and_higher_is_better() -> None:
    recipe = compose_recipe("evaluate.every=50", "evaluate.select=subject_similarity+0.5*prompt_fidelity")
    assert parse_sum(recipe.evaluate.select or "", recipe.measure_roles) == {
        "subject_similarity_efficientnet_lite0": 1.0, "prompt_fidelity_border": 0.5}


def test_a_role_finds_the_first_encoder_that_has_it() -> None:
    assert parse_sum("subject_similarity", PAPER) == {"dino": 1.0}
    assert parse_sum("diversity", PAPER) == {"div": 1.0}
    assert parse_sum("text_similarity+clip_i", PAPER) == {"clip_t": 1.0, "clip_i": 1.0}


def test_each_measure_counts_in_the_direction_that_is_better() -> None:
    assert parse_sum("dino + 0.5*pres + 2*class_drift", PAPER) == {"dino": 1.0, "pres": -0.5, "class_drift_dino": -2.0}


@pytest.mark.parametrize("text", ["", "+dino", "dino-pres", "2", "2*", "-1*dino", "dino*2"])
def test_an_invalid_sum_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"subject_similarity\+0.5\*class_drift"):
        parse_sum(text, PAPER)


def test_an_unknown_measure_is_refused_and_the_message_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="subject_similarity_efficientnet_lite0"):
        parse_sum("text_similarity", OFFLINE)


def test_an_objective_is_lower_where_the_measure_is_better() -> None:
    assert compute_objective("dino", PAPER, {"dino": 0.6}) == -0.6
    assert compute_objective("pres", PAPER, {"pres": 0.6}) == 0.6
    assert compute_objective("dino+pres", PAPER, {"dino": 0.6, "pres": 0.2}) == pytest.approx(-0.4)
    assert compute_objective("instance_loss", OFFLINE, {"instance_loss": 0.1}) == 0.1


def test_the_best_step_is_a_candidate_that_training_made() -> None:
    scores = {step: {"dino": value} for step, value in {0: 0.9, 50: 0.5, 70: 0.8, 100: 0.6, 130: 0.7}.items()}
    assert best_step(scores, {"dino": 1.0}, every=50, last=130) == 130
    assert best_step(scores, {"dino": 1.0}, every=50, last=150) == 100  # 130 was the last step of a shorter run
    assert best_step(scores, {"dino": -1.0}, every=50, last=130) == 50
    assert best_step({0: {"dino": 1.0}}, {"dino": 1.0}, every=50, last=50) is None


def test_of_equal_steps_the_earliest_is_best() -> None:
    assert best_step({1: {"dino": 0.5}, 2: {"dino": 0.5}}, {"dino": 1.0}, every=1, last=2) == 1


# -- prompts --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, count", [("object", 25), ("live", 25), ("scenes", 6)])
def test_shipped_lists_have_as_many_different_prompts_as_the_paper(name: str, count: int) -> None:
    assert len(set(eval_prompts.read_templates(name))) == count
    head = (eval_prompts.PROMPT_DIR / f"{name}.txt").read_text(encoding="utf-8").splitlines()[0]
    assert head.startswith("#")


def test_the_papers_lists_share_scenes_and_colours_and_name_their_source() -> None:
    assert len(set(eval_prompts.read_templates("object")) & set(eval_prompts.read_templates("live"))) == 15
    for name in ("object", "live"):
        assert "arXiv:2208.12242" in (eval_prompts.PROMPT_DIR / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("prompt, subject", [
    ("a photo of a zwx toy", "zwx toy"), ("photo of zwx toy", "zwx toy"), ("a 3d render of the toy", "toy"),
    ("zwx toy, from above", "zwx toy, from above"), ("A picture of my dog", "dog"), ("a toy", "a toy"),
])
def test_the_subject_of_a_prompt(prompt: str, subject: str) -> None:
    assert eval_prompts.extract_subject(prompt) == subject


def test_encoders_read_the_class_where_the_model_reads_the_rare_word() -> None:
    resolved = compose_recipe()
    assert resolved.evaluate_prompts[1] == "a photo of a zwx toy on the beach"
    assert resolved.evaluate_texts[1] == "a photo of a toy on the beach"


def test_prompts_of_your_own(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("# remarks\n\n a {subject} on the moon\n", encoding="utf-8")
    assert compose_recipe(f"evaluate.prompts={tmp_path}/mine.txt").evaluate_prompts == ("a zwx toy on the moon",)


# -- rules ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("overrides, words", [
    (["evaluate.prompts=nope"], "type evaluate.prompts=scenes"),
    (["evaluate.prompts={tmp}/none.txt"], "write {{subject}} into 'a toy'"),
    (["evaluate.prompts={tmp}/empty.txt"], "is empty"),
    (["evaluate.select=subject_similarity"], "type evaluate.every=50"),
    (["evaluate.select=beauty", "evaluate.every=50"], "names beauty"),
    (["evaluate.select=subject_similarity", "evaluate.every=50", "evaluate.encoder=none"], "evaluate.encoder=effic"),
    (["evaluate.objective=text_similarity"], "does not measure"),
    (["evaluate.objective=subject_similarity", "evaluate.encoder=none"], "evaluate.encoder=effic"),
    (["evaluate.objective=diversity", "evaluate.images_per_prompt=1"], "does not measure"),
    (["evaluate.reference_dir={tmp}/nowhere"], "evaluate.reference_dir="),
    (["evaluate.every=0"], "evaluate.every must be 1 or more"),
    (["evaluate.min_prompt_fidelity=1.5"], "evaluate.min_prompt_fidelity must be from 0 to 1"),
])
def test_broken_rules_say_what_to_type(overrides: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("a toy\n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        compose_recipe(*(override.format(tmp=tmp_path) for override in overrides))
    assert words.format() in str(caught.value)


@pytest.mark.parametrize("override", ["evaluate.every=7", "evaluate.prompts=object", "evaluate.encoder=none",
                                      "evaluate.objective=class_drift", "evaluate.images_per_prompt=9"])
def test_evaluation_that_selects_nothing_is_not_part_of_the_identity(override: str) -> None:
    assert identity(compose_config(override)) == identity(compose_config())


@pytest.mark.parametrize("override", ["evaluate.every=7", "evaluate.prompts=object", "evaluate.class_images=9",
                                      "evaluate.select=class_drift", "sample.guidance_scale=9"])
def test_what_selects_the_exported_weights_is_part_of_the_identity(override: str) -> None:
    assert identity(compose_config(*CHOOSING)) != identity(compose_config())
    assert identity(compose_config(*CHOOSING, override)) != identity(compose_config(*CHOOSING))


@pytest.mark.parametrize("override", ["evaluate.objective=class_drift", "evaluate.offline=false", "sample.every=9",
                                      "evaluate.min_prompt_fidelity=0.5", "train.max_train_steps=400"])
def test_what_does_not_select_weights_is_never_part_of_the_identity(override: str) -> None:
    assert identity(compose_config(*CHOOSING, override)) == identity(compose_config(*CHOOSING))


def test_the_encoder_asks_the_hub_only_if_the_model_may() -> None:
    assert compose_config().evaluate.offline is True
    assert compose_config("hardware=g4dn").evaluate.offline is False


# -- a result and its objective -------------------------------------------------------------------------------------

def test_a_finished_run_is_judged_by_the_objective_that_is_asked_for() -> None:
    result = Result(8, 0.1, 1.0, "runs/x", "model", 8, {"instance_loss": 0.1, "class_drift_efficientnet_lite0": 0.3})
    assert with_objective(result, compose_recipe("evaluate.objective=class_drift")).objective == 0.3
    assert with_objective(result, compose_recipe()).objective == 0.1
    with pytest.raises(UserError, match=r"evaluate\.objective=instance_loss"):
        with_objective(result, compose_recipe("evaluate.objective=subject_similarity"))


def test_a_result_of_an_earlier_version_has_the_instance_loss() -> None:
    assert with_objective(Result(8, 0.1, 1.0, "runs/x", "model"), compose_recipe()).objective == 0.1


def test_directions_are_those_of_the_paper() -> None:
    assert evaluate.HIGHER_IS_BETTER == {"subject_similarity": True, "text_similarity": True, "prompt_fidelity": True,
                                         "diversity": True, "class_similarity": False, "class_drift": False,
                                         "validation_loss": False}
