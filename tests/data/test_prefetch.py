"""The step's numbers a step late, and the next step's samples ahead: nothing that is broken is shown or saved."""

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreambooth.data.batches import Batch
from dreambooth.data.prefetch import Ahead
from dreambooth.errors import Diverged, Interrupted
from dreambooth.runtime.async_readback import Sent
from dreambooth.runtime.engine import Engine
from dreambooth.training.hooks import All
from dreambooth.training.loop import fit
from dreambooth.training.step import Objective, StepInfo, TrainState, train_step
from dreambooth.training.stop_hook import Halt
from tests.support.toy_model import Toy, batches, schedule, state


def step(found: TrainState, parts: list[Batch]) -> StepInfo:
    return train_step(found, parts, Objective(schedule()), Engine(), 1.0)


def breaking(at: int):  # type: ignore[no-untyped-def]
    """A step whose loss is not a number once `at` steps are completed."""
    def broken(found: TrainState, parts: list[Batch]) -> StepInfo:
        if found.step == at:
            parts[0].latents.fill_(math.nan)
        return step(found, parts)

    return broken


def test_a_step_is_handed_out_after_the_next_one_was_given_to_the_device() -> None:
    found = state(Toy())
    seen = [(info.step, found.step) for info in fit(found, batches(), step, 5, lambda number: number == 3)]
    assert seen == [(1, 2), (2, 3), (3, 3), (4, 5), (5, 5)]


def test_late_numbers_are_those_of_their_step() -> None:
    late, prompt = state(Toy()), state(Toy())
    numbers = [[info.numbers for info in fit(found, batches(), step, 5, lambda number, now=now: now)]
               for found, now in ((late, False), (prompt, True))]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("needed", [2, 3, 4])
def test_a_broken_step_is_never_shown_where_somebody_needs_the_state(needed: int) -> None:
    """Step 3 is broken. Whoever needs the state after a step sees steps up to 2 at most."""
    found, seen = state(Toy()), []
    with pytest.raises(Diverged, match="loss of step 3 is"):
        for info in fit(found, batches(), breaking(2), 9, lambda number: number == needed):
            seen.append(info.step)
            assert info.step != needed or found.step == needed == 2
    assert seen == [1, 2]


def saving(found: TrainState, saved: list[int], resume: str = "auto") -> Any:
    """In the place of Save: notes which step's state it was to save."""
    return SimpleNamespace(
        now=lambda: saved.append(found.step), setup=SimpleNamespace(state=found),
        recipe=SimpleNamespace(train=SimpleNamespace(max_train_steps=9), checkpoint=SimpleNamespace(resume=resume)))


def test_who_asks_to_stop_while_a_broken_step_is_unchecked_gets_nothing_saved() -> None:
    found, stop, saved = state(Toy()), SimpleNamespace(requested=None), []
    halt = Halt(stop, Engine(), saving(found, saved))  # type: ignore[arg-type]

    def stepping(made: TrainState, parts: list[Batch]) -> StepInfo:
        if made.step == 2:
            stop.requested = "SIGTERM"
        return breaking(2)(made, parts)

    with pytest.raises(Diverged, match="step 3"):
        for info in fit(found, batches(), stepping, 9, All([halt]).due):
            halt(info)
    assert saved == []


def test_who_asks_to_stop_gets_the_state_after_that_step_saved() -> None:
    found, stop, saved = state(Toy()), SimpleNamespace(requested=None), []
    halt = Halt(stop, Engine(), saving(found, saved))  # type: ignore[arg-type]

    def stepping(made: TrainState, parts: list[Batch]) -> StepInfo:
        if made.step == 2:
            stop.requested = "SIGTERM"
        return step(made, parts)

    with pytest.raises(Interrupted, match="after step 3"):
        for info in fit(found, batches(), stepping, 9, All([halt]).due):
            halt(info)
    assert saved == [3]


@pytest.mark.parametrize("resume, words", [
    ("auto", "repeat the command to go on"), ("never", "repeat the command without checkpoint.resume to go on"),
    ("runs/x/checkpoints/step-000002", "repeat the command without checkpoint.resume to go on")])
def test_who_began_elsewhere_is_told_what_goes_on_from_here(resume: str, words: str) -> None:
    """The same command would start over, or from that path, again."""
    save = saving(state(Toy()), [], resume)
    halt = Halt(SimpleNamespace(requested="SIGTERM"), Engine(), save)  # type: ignore[arg-type]
    assert halt.due(3)
    with pytest.raises(Interrupted, match=f"after step 3; {words}$"):
        halt(SimpleNamespace(step=3))  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [2, 9])
def test_who_asks_to_stop_while_a_hook_works_stops_after_that_step(at: int) -> None:
    """The last step too: what the hook left undone is done when the run is called again."""
    found, stop, saved = state(Toy()), SimpleNamespace(requested=None), []
    halt = Halt(stop, Engine(), saving(found, saved))  # type: ignore[arg-type]

    class Working:
        def due(self, step: int) -> bool:
            return step == at

        def __call__(self, info: StepInfo) -> None:
            stop.requested = "SIGTERM" if info.step == at else None

    every = All([Working(), halt])
    with pytest.raises(Interrupted, match=f"after step {at}"):
        for info in fit(found, batches(), step, 9, every.due):
            every(info)
    assert saved == [at]


def test_several_processes_stop_after_the_same_step_although_one_was_asked() -> None:
    """What a process asks in a step, all of them know in the next: the flags of both are reduced together."""
    def run(mine: list[bool], theirs: list[bool]) -> int:
        steps = iter(theirs)
        engine = Engine(world=2, mean=lambda flag: (flag + float(next(steps))) / 2)
        stop = SimpleNamespace(requested=None)
        halt = Halt(stop, engine, SimpleNamespace())  # type: ignore[arg-type]
        for number, asked in enumerate(mine, 1):
            stop.requested = "SIGTERM" if asked else None
            if halt.due(number):
                return number
        raise AssertionError

    asked, idle = [False, True, True, True], [False] * 4
    assert run(asked, idle) == run(idle, asked) == 3


@pytest.mark.parametrize("rank, done", [(0, ["saved", "waited"]), (1, ["waited"])])
def test_no_process_leaves_before_the_first_has_saved(rank: int, done: list[str]) -> None:
    """A launcher ends the others when one has gone."""
    events: list[str] = []
    engine = Engine(rank=rank, wait=lambda: events.append("waited"))
    recipe = SimpleNamespace(checkpoint=SimpleNamespace(resume="auto"))
    save = SimpleNamespace(now=lambda: events.append("saved"), recipe=recipe)
    halt = Halt(SimpleNamespace(requested="SIGTERM"), engine, save)  # type: ignore[arg-type]
    assert halt.due(3)
    with pytest.raises(Interrupted):
        halt(SimpleNamespace(step=3))  # type: ignore[arg-type]
    assert events == done


def test_all_hooks_are_asked_even_if_the_first_needs_the_state() -> None:
    asked: list[int] = []

    def hook(name: int) -> SimpleNamespace:
        return SimpleNamespace(due=lambda step: asked.append(name) is None)

    assert All([hook(1), hook(2)]).due(1)  # type: ignore[list-item]
    assert asked == [1, 2]


def source(draw: Callable[[int], Any], place: Callable[[Any], Any] = lambda found: found) -> Any:
    return SimpleNamespace(draw=draw, place=place)


def test_samples_drawn_ahead_are_those_of_their_step_in_any_order() -> None:
    made = batches(concepts=None)
    with Ahead(made, 9) as ahead:
        for number in (0, 1, 2, 5, 3, 8):
            [mine], [theirs] = ahead(number), made(number)
            for field in ("latents", "noise", "timesteps", "text"):
                assert getattr(mine, field).equal(getattr(theirs, field)), (number, field)


def test_only_the_next_step_is_drawn_ahead_and_none_beyond_the_last() -> None:
    drawn: list[int] = []
    with Ahead(source(lambda number: drawn.append(number) or number), 3) as ahead:
        assert [ahead(number) for number in range(3)] == [0, 1, 2]
    assert drawn == [0, 1, 2]


def test_what_drawing_raises_is_raised_at_its_own_step() -> None:
    def draw(number: int) -> int:
        if number == 2:
            raise MemoryError("of step 2")
        return number

    with Ahead(source(draw), 9) as ahead:
        assert [ahead(0), ahead(1)] == [0, 1]
        with pytest.raises(MemoryError, match="of step 2"):
            ahead(2)


def test_the_thread_ends_with_the_loop_even_after_an_error() -> None:
    with pytest.raises(KeyError), Ahead(source(lambda number: number), 9) as ahead:
        ahead(0)
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_device_work_stays_in_the_steps_own_thread() -> None:
    threads: dict[str, str] = {}
    with Ahead(source(lambda number: threads.setdefault("draw", threading.current_thread().name),
                      lambda found: threads.setdefault("place", threading.current_thread().name)), 9) as ahead:
        ahead(0)
    assert threads["draw"].startswith("ahead") and threads["place"] == threading.main_thread().name


def test_numbers_that_were_sent_are_read_as_they_were() -> None:
    assert Sent(torch.tensor([1.5, math.inf])).read() == [1.5, math.inf]


def test_no_limit_leaves_gradients_alone_and_still_tells_their_norm() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    assert float(Engine().clip(optimizer, [weight], None)) == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]
    assert float(Engine().clip(optimizer, [weight], 1.0)) == 5.0
    assert weight.grad.norm() == pytest.approx(1.0, abs=1e-5)
