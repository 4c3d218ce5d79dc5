"""The training loop and the stop hook: a diverged step is neither yielded nor saved, though steps are checked late."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dreambooth.data.batches import Batch
from dreambooth.errors import Diverged, Interrupted
from dreambooth.runtime.engine import Engine
from dreambooth.runtime.memory_meter import MemoryMeter
from dreambooth.training import checkpoint
from dreambooth.training.hooks import CheckpointHook, HookList
from dreambooth.training.loop import fit
from dreambooth.training.step import Objective, StepInfo, TrainState, train_step
from dreambooth.training.stop_hook import StopHook
from dreambooth.utils.signals import StopRequest
from tests.support.configs import small_recipe
from tests.support.toy_model import ToyModel, make_batches, make_schedule, make_state


def step(state: TrainState, batches: list[Batch]) -> StepInfo:
    return train_step(state, batches, Objective(make_schedule()), Engine(), 1.0)


def diverging_step(at: int) -> Callable[[TrainState, list[Batch]], StepInfo]:
    """A step whose loss is not a number once `at` steps are completed."""
    def diverge(state: TrainState, batches: list[Batch]) -> StepInfo:
        if state.step == at:
            batches[0].latents.fill_(math.nan)
        return step(state, batches)

    return diverge


def test_a_step_is_yielded_after_the_next_one_was_started() -> None:
    state = make_state(ToyModel())
    seen = [(info.step, state.step) for info in fit(state, make_batches(), step, 5, lambda number: number == 3)]
    assert seen == [(1, 2), (2, 3), (3, 3), (4, 5), (5, 5)]


def test_numbers_that_are_read_late_are_those_of_their_step() -> None:
    late, prompt = make_state(ToyModel()), make_state(ToyModel())
    numbers = [[info.numbers for info in fit(state, make_batches(), step, 5, lambda number, now=now: now)]
               for state, now in ((late, False), (prompt, True))]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("needed", [2, 3, 4])
def test_a_diverged_step_is_never_yielded_even_if_the_state_is_needed(needed: int) -> None:
    """Step 3 diverges. A caller that needs the state after a step sees steps up to 2 at most."""
    state, seen = make_state(ToyModel()), []
    with pytest.raises(Diverged, match="loss of step 3 is"):
        for info in fit(state, make_batches(), diverging_step(2), 9, lambda number: number == needed):
            seen.append(info.step)
            assert info.step != needed or state.step == needed == 2
    assert seen == [1, 2]


def fake_checkpoint_hook(state: TrainState, saved: list[int], resume: str = "auto") -> Any:
    """Records the step of each state that it is told to save."""
    return SimpleNamespace(
        save=lambda: saved.append(state.step), takes_part=True, setup=SimpleNamespace(state=state),
        recipe=SimpleNamespace(train=SimpleNamespace(max_train_steps=9), checkpoint=SimpleNamespace(resume=resume)))


def test_a_stop_request_before_a_diverged_step_is_checked_saves_nothing() -> None:
    state, stop, saved = make_state(ToyModel()), SimpleNamespace(signal_name=None), []
    stop_hook = StopHook(stop, Engine(), fake_checkpoint_hook(state, saved))  # type: ignore[arg-type]

    def stop_and_diverge(state: TrainState, batches: list[Batch]) -> StepInfo:
        if state.step == 2:
            stop.signal_name = "SIGTERM"
        return diverging_step(2)(state, batches)

    with pytest.raises(Diverged, match="step 3"):
        for info in fit(state, make_batches(), stop_and_diverge, 9, HookList([stop_hook]).due):
            stop_hook(info)
    assert saved == []


def test_a_stop_request_saves_the_state_after_the_step_in_which_it_came() -> None:
    state, stop, saved = make_state(ToyModel()), SimpleNamespace(signal_name=None), []
    stop_hook = StopHook(stop, Engine(), fake_checkpoint_hook(state, saved))  # type: ignore[arg-type]

    def request_stop(state: TrainState, batches: list[Batch]) -> StepInfo:
        if state.step == 2:
            stop.signal_name = "SIGTERM"
        return step(state, batches)

    with pytest.raises(Interrupted, match="after step 3"):
        for info in fit(state, make_batches(), request_stop, 9, HookList([stop_hook]).due):
            stop_hook(info)
    assert saved == [3]


@pytest.mark.parametrize("resume, words", [
    ("auto", "repeat the command to continue"), ("never", "repeat the command without checkpoint.resume to continue"),
    ("runs/x/checkpoints/step-000002", "repeat the command without checkpoint.resume to continue")])
def test_the_message_of_a_stop_says_which_command_resumes_from_here(resume: str, words: str) -> None:
    """With another checkpoint.resume than auto, the same command would start over, or from that path, again."""
    checkpoint_hook = fake_checkpoint_hook(make_state(ToyModel()), [], resume)
    stop_hook = StopHook(SimpleNamespace(signal_name="SIGTERM"), Engine(), checkpoint_hook)  # type: ignore[arg-type]
    assert stop_hook.due(3)
    with pytest.raises(Interrupted, match=f"after step 3; {words}$"):
        stop_hook(SimpleNamespace(step=3))  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [2, 9])
def test_a_stop_request_while_a_hook_runs_stops_after_that_step(at: int) -> None:
    """Also after the last step: what the hook has not finished is done when the run is called again."""
    state, stop, saved = make_state(ToyModel()), SimpleNamespace(signal_name=None), []
    stop_hook = StopHook(stop, Engine(), fake_checkpoint_hook(state, saved))  # type: ignore[arg-type]

    class SlowHook:
        def due(self, step: int) -> bool:
            return step == at

        def __call__(self, info: StepInfo) -> None:
            stop.signal_name = "SIGTERM" if info.step == at else None

    hooks = HookList([SlowHook(), stop_hook])
    with pytest.raises(Interrupted, match=f"after step {at}"):
        for info in fit(state, make_batches(), step, 9, hooks.due):
            hooks(info)
    assert saved == [at]


def test_all_processes_stop_after_the_same_step_if_one_has_a_stop_request() -> None:
    """A request of one process in a step is known to all in the next one: their flags are reduced together."""
    def stop_step(own: list[bool], others: list[bool]) -> int:
        flags = iter(others)
        engine = Engine(world_size=2, all_reduce_mean=lambda flag: (flag + float(next(flags))) / 2)
        stop = SimpleNamespace(signal_name=None)
        stop_hook = StopHook(stop, engine, SimpleNamespace())  # type: ignore[arg-type]
        for number, requested in enumerate(own, 1):
            stop.signal_name = "SIGTERM" if requested else None
            if stop_hook.due(number):
                return number
        raise AssertionError

    requested, idle = [False, True, True, True], [False] * 4
    assert stop_step(requested, idle) == stop_step(idle, requested) == 3


def test_a_stop_request_while_pictures_are_shared_stops_all_processes_after_that_step() -> None:
    """The next step would change the state, and the abandoned pictures could not be made when the run resumes."""
    state, saved = make_state(ToyModel()), []
    engine = Engine(world_size=2, all_reduce_mean=lambda flag: flag + 0.5)  # the other process has a stop request
    stop_hook = StopHook(StopRequest(), engine, fake_checkpoint_hook(state, saved), lambda step: step == 2)
    stop_hook(SimpleNamespace(step=1))  # type: ignore[arg-type]
    assert saved == []
    with pytest.raises(Interrupted, match="another process: stopped and saved after step 2"):
        stop_hook(SimpleNamespace(step=2))  # type: ignore[arg-type]
    assert saved == [0]


@pytest.mark.parametrize("rank, expected", [(0, ["saved", "waited"]), (1, ["waited"])])
def test_no_process_exits_before_the_main_process_has_saved(rank: int, expected: list[str]) -> None:
    """A launcher ends the other processes when one has exited."""
    events: list[str] = []
    engine = Engine(rank=rank, barrier=lambda: events.append("waited"))
    recipe = SimpleNamespace(checkpoint=SimpleNamespace(resume="auto"))
    checkpoint_hook = SimpleNamespace(save=lambda: events.append("saved"), takes_part=rank == 0, recipe=recipe)
    stop_hook = StopHook(SimpleNamespace(signal_name="SIGTERM"), engine, checkpoint_hook)  # type: ignore[arg-type]
    assert stop_hook.due(3)
    with pytest.raises(Interrupted):
        stop_hook(SimpleNamespace(step=3))  # type: ignore[arg-type]
    assert events == expected


def test_every_hook_is_asked_whether_it_is_due_even_if_the_first_is() -> None:
    called: list[int] = []

    def hook(name: int) -> SimpleNamespace:
        return SimpleNamespace(due=lambda step: called.append(name) is None)

    assert HookList([hook(1), hook(2)]).due(1)  # type: ignore[list-item]
    assert called == [1, 2]


def test_a_step_is_saved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop request after a step whose checkpoint was just written neither writes nor reads it again."""
    state, saved = make_state(ToyModel()), []
    monkeypatch.setattr(checkpoint, "save", lambda *_: saved.append(state.step))
    setup = SimpleNamespace(state=state, trained=ToyModel())
    hook = CheckpointHook(setup, Engine(), MemoryMeter(Engine().device), small_recipe())  # type: ignore[arg-type]
    for state.step in (2, 2, 3):
        hook.save()
    assert saved == [2, 3]
