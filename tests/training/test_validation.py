"""The loss on held-out photos: fixed noise and timesteps, the same for every batch size and number of processes."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreambooth.data.batches import Batches
from dreambooth.errors import Diverged
from dreambooth.runtime.engine import Engine
from dreambooth.tracking.journal import read
from dreambooth.training.loss import dreambooth_loss
from dreambooth.training.step import History, Objective
from dreambooth.training.validation import DRAWS, TRAINING_LOSS, ValidationHook, turned_up, validation_loss
from dreambooth.utils.assets import resolve_asset
from tests.support.faults import train
from tests.support.runs import KILLED, assert_same, losses, the_run
from tests.support.toy_model import ToyModel, make_batches, make_photo_set, make_schedule, make_state

HELD_OUT = make_photo_set("validation", 3)


def toy_setup(batches: Batches | None = None, step: int = 0, objective: Objective | None = None) -> Any:
    model = ToyModel()
    state = make_state(model)
    state.step = step
    return SimpleNamespace(batches=batches or make_batches(), objective=objective or Objective(make_schedule()),
                           trained=model, state=state, held_out=HELD_OUT)


def measure(batches: Batches | None = None, step: int = 0, objective: Objective | None = None,
            engine: Engine | None = None) -> float:
    return validation_loss(toy_setup(batches, step, objective), HELD_OUT, engine or Engine())


def test_the_value_depends_on_the_weights_alone() -> None:
    expected = measure()
    assert measure(step=7) == measure(replace(make_batches(), seed=4)) == expected
    for batch in (1, 3, 8, 20):
        assert measure(make_batches(batch)) == pytest.approx(expected, rel=1e-12)


def test_random_numbers_and_modes_of_training_are_not_disturbed() -> None:
    setup, before = toy_setup(), torch.get_rng_state()
    validation_loss(setup, HELD_OUT, Engine())
    assert torch.get_rng_state().equal(before)
    assert setup.trained.training and all(p.grad is None for p in setup.trained.parameters())


def test_several_processes_measure_each_photo_once_and_get_the_value_of_one() -> None:
    parts: list[list[tuple[int, float]]] = []
    for rank in range(2):
        def keep(own: list[tuple[int, float]]) -> list[tuple[int, float]]:
            parts.append(own)
            return own

        measure(engine=replace(Engine(), rank=rank, world_size=2, gather=keep))
    assert sorted(number for own in parts for number, _ in own) == [0, 1, 2]
    joined = replace(Engine(), rank=1, world_size=2, gather=lambda own: parts[0] + own)
    assert measure(engine=joined) == measure()


def test_it_is_the_training_objective_with_one_timestep_in_each_part_of_the_schedule() -> None:
    """Min-SNR weights, v-prediction and offset noise are those of the run. Each of the 8 parts has one timestep."""
    seen: list[torch.Tensor] = []
    schedule = make_schedule("v_prediction")
    weights = schedule.min_snr_weights

    class Spy(Objective):
        def __call__(self, model: Any, batch: Any) -> Any:
            seen.append(batch.timesteps)
            assert batch.num_instances == len(batch.timesteps) and batch.class_batch is None
            found = super().__call__(model, batch)
            goal = schedule.target(batch.latents, batch.noise, batch.timesteps)
            noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
            again = dreambooth_loss(model(noisy, batch.timesteps, batch.text), goal, batch.num_instances, 1.0,
                                    weights(batch.timesteps, 5.0).to(goal.dtype))
            assert found.instance.equal(again.instance)
            return found

    measure(make_batches(3), objective=Spy(schedule, 0.5, 5.0))
    rows = torch.cat(seen).view(len(HELD_OUT.photos), DRAWS)
    assert (rows // 125).tolist() == [list(range(8))] * 3
    assert len(set(rows.flatten().tolist())) > 20, "all photos have the same timesteps"
    assert measure(make_batches(noise_offset=0.5)) != measure()


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    setup = toy_setup()
    torch.nn.init.constant_(setup.trained.unet.weight, float("nan"))
    with pytest.raises(Diverged, match="held-out photos after step 0 is nan"):
        validation_loss(setup, HELD_OUT, Engine())


def history(*pairs: tuple[float, float]) -> dict[int, dict[str, float]]:
    return {10 * i: {"validation_loss": held_out, TRAINING_LOSS: train_loss}
            for i, (held_out, train_loss) in enumerate(pairs, start=1)}


@pytest.mark.parametrize("pairs, turn", [
    ([(.5, .5), (.4, .4), (.41, .3), (.42, .3), (.43, .3)], 20),
    ([(.5, .5), (.4, .4), (.41, .3), (.42, .3), (.43, .3), (.44, .3)], None),  # it turned before
    ([(.5, .5), (.4, .4), (.41, .5), (.42, .5), (.43, .5)], None),  # the training loss rises too
    ([(.5, .5), (.4, .4), (.401, .3), (.42, .3), (.43, .3)], None),  # within the margin
    ([(.4, .4), (.42, .3), (.43, .3)], None),  # too few measurements
    ([(.5, .5), (.4, .4), (.3, .3)], None)])
def test_the_held_out_loss_turns_upwards_once_while_the_training_loss_falls(
        pairs: list[tuple[float, float]], turn: int | None) -> None:
    assert turned_up(history(*pairs), 10 * len(pairs)) == turn


def test_the_hook_measures_the_base_model_every_n_steps_and_the_last_step(caplog: pytest.LogCaptureFixture) -> None:
    """The last step is not in the history unless it is a multiple, so that an extended run decides the same."""
    logged: dict[int, dict[str, float]] = {}
    setup = toy_setup()
    setup.state.ema = None
    recipe = SimpleNamespace(validates=True, train=SimpleNamespace(validate_every=2, max_train_steps=5))
    hook = ValidationHook(setup, Engine(), SimpleNamespace(phase=lambda name: nullcontext()), recipe,  # type: ignore[arg-type]
                          SimpleNamespace(log_metrics=lambda step, values: logged.update({step: values})))  # type: ignore[arg-type]
    hook.before_training()
    for step in range(1, 6):
        setup.state.step = step
        hook(SimpleNamespace(step=step, numbers={"loss_instance": float(step)}))  # type: ignore[arg-type]
    assert list(logged) == [0, 2, 4, 5] and logged[5]["validation_loss"] == measure()
    assert {step: values.get(TRAINING_LOSS) for step, values in setup.state.history.scores.items()} == {
        0: None, 2: 1.5, 4: 3.5}
    assert (setup.state.history.loss_sum, setup.state.history.loss_count) == (5.0, 1)
    assert hook.note == f", validation {measure():.3f}"


def test_without_held_out_photos_a_run_records_no_history() -> None:
    """Its checkpoints are those of earlier versions."""
    setup = toy_setup()
    setup.held_out = None
    hook = ValidationHook(setup, Engine(), None, None, None)  # type: ignore[arg-type]
    hook.before_training()
    hook(SimpleNamespace(step=1))  # type: ignore[arg-type]
    assert setup.state.history == History() and not hook.due(0) and hook.note == ""


# -- whole runs -----------------------------------------------------------------------------------------------------

STOPS = ["train.validate_every=2", "train.stop_when.measure=validation_loss", "train.stop_when.patience=1",
         "train.stop_when.min_delta=9", "checkpoint.every=3"]  # no improvement is large enough: it stops after step 4


@pytest.mark.slow
def test_a_run_that_stops_early_is_finished_and_killed_runs_decide_the_same(tmp_path: Path) -> None:
    whole, log = tmp_path / "whole", tmp_path / "log.txt"
    assert train(whole, "dataset.validation_count=2", *STOPS, log=log) == 0
    assert "stopped after step 4: validation_loss has not improved in 1 measurement" in log.read_text()
    result = json.loads((the_run(whole) / "result.json").read_text())
    assert (result["step"], result["scores"].keys()) == (4, {"instance_loss", "validation_loss"})
    assert sorted(losses(the_run(whole))) == [1, 2, 3, 4]
    for fault in ("checkpoint_rename", "export"):  # before and after the checkpoint of the last step is written
        killed = tmp_path / fault
        assert train(killed, "dataset.validation_count=2", *STOPS, fault=fault) == KILLED
        assert train(killed, "dataset.validation_count=2", *STOPS) == 0
        assert_same(the_run(killed), the_run(whole))
        again = json.loads((the_run(killed) / "result.json").read_text())
        assert all(again[key] == result[key] for key in ("stopped", "scores", "base_scores"))
    assert train(killed, "dataset.validation_count=2", *STOPS, log=log) == 0
    assert "it was stopped after 4 steps of 8, because validation_loss" in log.read_text()


@pytest.mark.slow
def test_a_run_has_the_same_weights_with_and_without_the_measurement(tmp_path: Path) -> None:
    """Both train on the same three photos."""
    for number, photo in enumerate(sorted(Path(resolve_asset("package:demo")).glob("*.png"))):
        folder = tmp_path / ("held" if number in (1, 3) else "photos")
        folder.mkdir(exist_ok=True)
        shutil.copy(photo, folder)
    own = ["dataset.instance_dir=" + str(tmp_path / "photos"), "train.max_train_steps=4", "train.validate_every=1"]
    assert train(tmp_path / "without", *own) == 0
    assert train(tmp_path / "with", *own, f"dataset.validation_dir={tmp_path / 'held'}") == 0
    assert_same(the_run(tmp_path / "with"), the_run(tmp_path / "without"))
    values = [entry["metrics"]["validation_loss"] for entry, _ in read(the_run(tmp_path / "with") / "metrics.jsonl")
              if "validation_loss" in entry.get("metrics", {})]
    assert len(values) == 5 and values[4] < values[0]
