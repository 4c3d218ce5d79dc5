"""SIGTERM at any moment of a run: it ends soon, and the repeated command gives the result of an uninterrupted run."""

from pathlib import Path

import pytest

from tests.support.faults import train
from tests.support.moments import MOMENTS, install, stop_at
from tests.support.runs import assert_same, the_run

# The moments at which a run works longest without a step; `make torture` sends the signal at all of them.
LONG = ("model", "first_class_image", "samples", "instance_loss", "export")


def test_every_moment_names_a_function_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[str] = []
    monkeypatch.setattr("tests.support.moments.setattr", lambda owner, name, new: replaced.append(name), raising=False)
    for moment in MOMENTS:
        install(moment)
    assert len(replaced) == len(MOMENTS) >= 20


@pytest.mark.slow
def test_sigterm_while_a_run_works_without_steps_ends_it_and_loses_nothing(tmp_path: Path, uninterrupted: Path) -> None:
    for moment in LONG:
        log = tmp_path / f"{moment}.txt"
        stopped = stop_at(tmp_path, moment, log=log)
        text = log.read_text()
        assert stopped.code == 5 and "dreambooth: SIGTERM: stopped" in text and "Traceback" not in text, text
        assert stopped.seconds < 15, moment
        if moment == "samples":  # of step 4: the state is saved, the pictures are abandoned
            assert (the_run(tmp_path) / "checkpoints/step-000004/state.json").is_file()
            assert not (the_run(tmp_path) / "samples/step-000004").exists()
    assert train(tmp_path) == 0
    assert_same(the_run(tmp_path), uninterrupted)


@pytest.mark.slow
def test_sigterm_while_images_are_scored_ends_the_run_and_stores_no_scores(tmp_path: Path) -> None:
    settings = ["evaluate.encoder=efficientnet_lite0", "evaluate.class_images=2", "evaluate.images_per_prompt=1",
                "prior.with_prior_preservation=false", "sample.every=null", "train.max_train_steps=2"]
    assert stop_at(tmp_path, "scores", *settings).code == 5
    assert not list(the_run(tmp_path).glob("evaluation/*/step-*"))
    assert (the_run(tmp_path) / "checkpoints/step-000002/state.json").is_file()
