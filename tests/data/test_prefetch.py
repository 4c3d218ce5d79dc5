"""Prefetching: samples drawn in a background thread are those of their step."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dreambooth.data.prefetch import Prefetcher
from tests.support.toy_model import make_batches


def source(draw: Callable[[int], Any], to_device: Callable[[Any], Any] = lambda samples: samples) -> Any:
    """A BatchSource made of two functions."""
    return SimpleNamespace(draw=draw, to_device=to_device)


def test_prefetched_samples_are_those_of_their_step_in_any_order() -> None:
    batches = make_batches()
    with Prefetcher(batches, 9) as prefetcher:
        for step in (0, 1, 2, 5, 3, 8):
            [prefetched], [expected] = prefetcher(step), batches(step)
            for field in ("latents", "noise", "timesteps", "text"):
                assert getattr(prefetched, field).equal(getattr(expected, field)), (step, field)


def test_only_the_next_step_is_prefetched_and_none_after_the_last() -> None:
    drawn: list[int] = []
    with Prefetcher(source(lambda step: drawn.append(step) or step), 3) as prefetcher:
        assert [prefetcher(step) for step in range(3)] == [0, 1, 2]
    assert drawn == [0, 1, 2]


def test_an_exception_of_draw_is_raised_when_its_step_is_requested() -> None:
    def draw(step: int) -> int:
        if step == 2:
            raise MemoryError("of step 2")
        return step

    with Prefetcher(source(draw), 9) as prefetcher:
        assert [prefetcher(0), prefetcher(1)] == [0, 1]
        with pytest.raises(MemoryError, match="of step 2"):
            prefetcher(2)


def test_the_thread_ends_with_the_context_manager_even_after_an_error() -> None:
    with pytest.raises(KeyError), Prefetcher(source(lambda step: step), 9) as prefetcher:
        prefetcher(0)
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_device_work_is_done_in_the_callers_thread() -> None:
    threads: dict[str, str] = {}

    def record(stage: str) -> str:
        return threads.setdefault(stage, threading.current_thread().name)

    with Prefetcher(source(lambda step: record("draw"), lambda samples: record("to_device")), 9) as prefetcher:
        prefetcher(0)
    assert threads["draw"].startswith("prefetch") and threads["to_device"] == threading.main_thread().name
