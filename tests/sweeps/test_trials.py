"""Bounds of the scores of a trial: a run that has forgotten the scenes of its prompts is told apart.

A page of the sweep, the order of its trials, and a promotion show the difference.
"""

import json
from pathlib import Path

import pytest

from dreambooth.errors import UserError
from dreambooth.runs import report
from dreambooth.sweeps.html_page import render_page
from dreambooth.sweeps.promotion import PromotionOptions, promote, register_run
from dreambooth.sweeps.summary import parallel_axes, rank_trials
from dreambooth.sweeps.trials import find_trials
from dreambooth.utils.atomic_files import write_json
from tests.support.runs import Registry, trial

FIDELITY, SUBJECT = "prompt_fidelity_efficientnet_lite0", "subject_similarity_efficientnet_lite0"


def scenes_trial(root: Path, name: str, subject: float, fidelity: float | None, **settings: str) -> Path:
    """Make a run folder with the objective of the shipped sweeps; prompt_fidelity was 0.9 before training.

    Args:
        fidelity: None: an earlier version of this package, which did not measure it, wrote the folder.
    """
    settings = {"evaluate__objective": "subject_similarity+class_similarity+0.5*prompt_fidelity"} | settings
    folder = trial(root, name, 0.0, **settings)
    result = json.loads((folder / "result.json").read_text())
    result["scores"] |= {SUBJECT: subject} | ({} if fidelity is None else {FIDELITY: fidelity})
    result["base_scores"] |= {SUBJECT: 0.41} | ({} if fidelity is None else {FIDELITY: 0.9})
    result["objective"] = -(subject - 0.4 + 0.5 * (fidelity or 0))
    write_json(folder / "result.json", result)
    return folder


@pytest.fixture
def kept_and_lost(tmp_path: Path) -> tuple[Path, Path]:
    """Trials of one sweep: "lost" is more similar to the photos, because none of its pictures shows a scene."""
    return scenes_trial(tmp_path, "kept", 0.55, 0.9), scenes_trial(tmp_path, "lost", 0.62, 0.0)


def test_a_sweep_tells_a_run_that_lost_its_scenes(kept_and_lost: tuple[Path, Path], tmp_path: Path) -> None:
    trials = find_trials(tmp_path, "s")
    assert [item.folder.name for item in rank_trials(trials)] == ["kept", "lost"]
    page = render_page("s", trials, 64)
    assert "lost has prompt_fidelity_efficientnet_lite0 0.000, under 0.650" in page and "out of bounds" in page
    assert parallel_axes(trials)["prompt_fidelity"] == [0.9, 0.0]


def test_a_model_that_lost_its_scenes_is_no_champion(
    kept_and_lost: tuple[Path, Path], tmp_path: Path, registry: Registry
) -> None:
    """By instance loss or likeness alone, "lost" would win."""
    record = promote("s", tmp_path, PromotionOptions(objective="subject_similarity"))
    assert record["run"] == "kept" and record["prompt_fidelity"] == {"name": FIDELITY, "value": 0.9, "base": 0.9}
    assert registry.versions[0].tags[FIDELITY] == "0.9"
    assert f"{FIDELITY} 0.900" in report.promotion_message(record)
    with pytest.raises(UserError, match=r"lost has prompt_fidelity\w+ 0\.000, under 0\.650$"):
        register_run(kept_and_lost[1], PromotionOptions())
    loose = PromotionOptions(objective="subject_similarity", replace=True, min_prompt_fidelity=0)
    assert promote("s", tmp_path, loose)["run"] == "lost"
    with pytest.raises(UserError, match=r"under 0\.950; .*: type min_prompt_fidelity=NUMBER to allow it"):
        promote("s", tmp_path, PromotionOptions(min_prompt_fidelity=0.95))


def test_the_runs_own_bound_of_prompt_fidelity_applies(tmp_path: Path, registry: Registry) -> None:
    scenes_trial(tmp_path, "a", 0.55, 0.9, evaluate__min_prompt_fidelity="0.95")
    with pytest.raises(UserError, match=r"under 0\.950"):
        promote("s", tmp_path, PromotionOptions())
    assert promote("s", tmp_path, PromotionOptions(min_prompt_fidelity=0.8))["run"] == "a"


def test_a_run_of_an_earlier_version_is_promoted_unless_a_bound_is_given(tmp_path: Path, registry: Registry) -> None:
    scenes_trial(tmp_path, "old", 0.55, None, evaluate__objective="subject_similarity")
    page = render_page("s", find_trials(tmp_path, "s"), 64)
    assert "prompt fidelity" not in page and "out of bounds" not in page
    with pytest.raises(UserError, match=r"old did not measure prompt_fidelity: type allow_unmeasured=true"):
        promote("s", tmp_path, PromotionOptions(min_prompt_fidelity=0.5))
    assert promote("s", tmp_path, PromotionOptions(min_prompt_fidelity=0.5, allow_unmeasured=True))["run"] == "old"
    scenes_trial(tmp_path, "new", 0.60, 0.9, evaluate__objective="subject_similarity")
    record = promote("s", tmp_path, PromotionOptions())
    assert record["run"] == "new"


def test_the_measure_by_borders_is_found_without_the_base_model(tmp_path: Path, registry: Registry) -> None:
    """A result may be promoted on a machine that does not have the base model."""
    folder = scenes_trial(tmp_path, "a", 0.55, 0.9, model__source="/nowhere")
    result = json.loads((folder / "result.json").read_text())
    for scores in ("scores", "base_scores"):
        result[scores]["prompt_fidelity_border"] = 1.0
    write_json(folder / "result.json", result)
    assert promote("s", tmp_path, PromotionOptions())["prompt_fidelity"]["name"] == "prompt_fidelity_border"
