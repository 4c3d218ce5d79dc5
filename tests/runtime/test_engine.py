"""The engine: clipping of gradients, and numbers that are read from the device later."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate
import pytest
import torch

from dreambooth.config.enums import Dtype
from dreambooth.errors import Interrupted, LostProcess
from dreambooth.runtime import engine as engine_module
from dreambooth.runtime.async_readback import AsyncReadback
from dreambooth.runtime.engine import Engine
from dreambooth.runtime.lost_process import reporting_lost_process
from dreambooth.utils.signals import StopRequest


def test_numbers_are_read_back_unchanged() -> None:
    assert AsyncReadback(torch.tensor([1.5, math.inf])).read() == [1.5, math.inf]


@pytest.mark.parametrize("error, kind", [
    (RuntimeError("[/a/gloo/transport/tcp/pair.cc:5] Connection closed by peer [::1]:7. This is typical"), LostProcess),
    (torch.distributed.DistNetworkError("the client socket has failed to connect"), LostProcess),
    (RuntimeError("shape mismatch"), RuntimeError)])
def test_the_loss_of_another_process_is_a_sentence_and_no_internal_fault(error: Exception, kind: type) -> None:
    with pytest.raises(kind) as caught, reporting_lost_process("auto"):
        raise error
    assert type(caught.value) is kind
    assert kind is RuntimeError or ("repeat the command" in str(caught.value) and "pair.cc" not in str(caught.value))


def test_without_a_limit_gradients_stay_unchanged_and_their_norm_is_returned() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    assert float(Engine().clip(optimizer, [weight], None)) == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]
    assert float(Engine().clip(optimizer, [weight], 1.0)) == 5.0
    assert weight.grad.norm() == pytest.approx(1.0, abs=1e-5)


def on_two_processes(items: list[int], stops: list[StopRequest]) -> list[list[Any]]:
    """What `map_shared` gives to two processes, here threads: (item, process that computed it) or the exception."""
    together, sent = threading.Barrier(2, timeout=60), [[], []]

    def process(rank: int) -> list[Any]:
        def gather(values: list[Any]) -> list[Any]:
            sent[rank] = values
            together.wait()
            joined = sent[0] + sent[1]
            together.wait()
            return joined

        results: list[Any] = []
        engine = Engine(rank=rank, world_size=2, gather=gather)
        try:
            results.extend(engine.map_shared(lambda item: (item, rank), items, stops[rank]))
        except Interrupted as error:
            results.append(str(error))
        return results

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, range(2)))


def test_processes_share_items_and_get_all_results_in_order() -> None:
    expected = [(7, 0), (8, 1), (9, 0)]
    assert on_two_processes([7, 8, 9], [StopRequest(), StopRequest()]) == [expected, expected]
    assert list(Engine().map_shared(str, [1, 2], StopRequest())) == ["1", "2"]


def test_a_stop_request_of_one_process_ends_shared_work_in_all() -> None:
    stops = [StopRequest(), StopRequest()]
    stops[1].signal_name = "SIGTERM"
    assert on_two_processes([7, 8, 9], stops) == [["another process: stopped"], ["SIGTERM: stopped"]]


def test_processes_wait_for_each_other_longer_than_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's default of 10 minutes with NCCL would abort a run while the main process scores or saves."""
    class Seen(Exception):
        pass

    def accelerator(**arguments: Any) -> None:
        raise Seen(*arguments["kwargs_handlers"])

    monkeypatch.setattr(accelerate, "Accelerator", accelerator)
    with pytest.raises(Seen) as caught:
        engine_module.create_engine("cpu", Dtype.fp32)
    [timeout] = [handler.timeout for handler in caught.value.args if hasattr(handler, "timeout")]
    assert timeout == engine_module.COLLECTIVE_TIMEOUT
    assert timeout.total_seconds() >= 3600
