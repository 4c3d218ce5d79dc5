"""The routes, with workers that draw nothing: answers, status codes, and what happens to a request that is gone."""

import asyncio
import base64
import gc
import http.client
import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from dreambooth.serving import pool
from dreambooth.serving import server as process
from dreambooth.serving.options import Serve
from dreambooth.serving.service import Service
from tests.serving.fake_server import FakeServer, FakeWorker, png, serving, wait_until

GENERATIONS = "/v1/images/generations"
TOKEN = "a-token-of-sixteen-characters"


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def decoded(text: str) -> bytes:
    return base64.b64decode(text)


# -- answers ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("body", "expected"), [
    ({"prompt": "a"}, ["a 0"]),
    ({"prompt": "a", "num_images": 2, "seed": 5}, ["a 5", "a 6"]),
    ({"inputs": "a"}, ["a 0"]),
    ({"inputs": ["a", "b"]}, ["a 0", "b 0"]),
    ({"instances": [{"prompt": "a", "seed": 2}]}, ["a 2"]),
    ({"inputs": {"prompt": ["a", "b"], "seed": [1, 2]}}, ["a 1", "b 2"]),
    ({"inputs": {"prompt": "a"}, "params": {"seed": 4}}, ["a 4"]),
    ({"dataframe_records": [{"prompt": "a", "seed": None}], "params": {"seed": 3}}, ["a 3"]),
    ({"dataframe_split": {"columns": ["prompt", "seed"], "data": [["a", 1.0], ["b", None]]}}, ["a 1", "b 0"]),
], ids=str)
def test_invocations_read_the_formats_of_sagemaker_and_mlflow(server: FakeServer, body: Any,
                                                              expected: list[str]) -> None:
    answer = server.post("/invocations", body)
    assert answer.status_code == 200, answer.text
    pictures = [png(mark=mark) for mark in expected]
    assert [decoded(one["image"]) for one in answer.json()["predictions"]] == pictures
    assert [one["metadata"] for one in answer.json()["predictions"]] == [{"mark": mark} for mark in expected]


def test_invocations_give_one_picture_as_a_file(server: FakeServer) -> None:
    answer = server.post("/invocations", {"prompt": "a", "size": "64x128"}, headers={"Accept": "image/png"})
    assert (answer.headers["content-type"], answer.content) == ("image/png", png(64, 128, "a 0"))


def test_generations_answer_as_openai_does(server: FakeServer) -> None:
    answer = server.post(GENERATIONS, {"model": "toy", "prompt": "a", "n": 2, "seed": 7, "size": "auto",
                                       "response_format": "b64_json", "user": "me", "num_inference_steps": 3}).json()
    assert [(decoded(one["b64_json"]), one["seed"]) for one in answer["data"]] == [
        (png(mark="a 7"), 7), (png(mark="a 8"), 8)]
    assert answer["size"] == "64x64" and isinstance(answer["created"], int)


def test_a_stream_has_an_event_per_step_and_the_picture(server: FakeServer) -> None:
    answer = server.post(GENERATIONS, {"prompt": "a", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [(event["type"].partition(".")[2], event.get("step")) for event in events(answer.text)] == [
        ("queued", None), ("progress", 1), ("progress", 2), ("completed", None)]
    assert decoded(events(answer.text)[-1]["b64_json"]) == png(mark="a 0")


def test_models_page_and_metrics(server: FakeServer) -> None:
    listed = server.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["toy"] and listed["dreambooth"]["max_side"] == 128
    page = server.get("/")
    assert "<title>dreambooth</title>" in page.text and "'sha256-" in page.headers["content-security-policy"]
    assert "https://" not in page.text and "http://" not in page.text
    server.post(GENERATIONS, {"prompt": ""})
    server.get("/nothing")
    metrics = server.get("/metrics").text
    assert 'dreambooth_requests_total{code="422",route="/v1/images/generations"}' in metrics
    assert 'dreambooth_requests_total{code="404",route="other"}' in metrics
    assert "dreambooth_queue_pictures 0.0" in metrics and "dreambooth_workers_ready 1.0" in metrics


# -- refusals -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("path", "body", "status", "says"), [
    ("/invocations", {"prompt": 3}, 422, "prompt must be a text"),
    ("/invocations", {"prompt": "a", "steps": 3}, 422, "'steps'"),
    ("/invocations", {"prompt": "a", "num_images": 9}, 422, "num_images must be a whole number from 1 to 8"),
    ("/invocations", {"inputs": ["a"] * 9}, 422, "num_images must be at most 8 over all rows"),
    ("/invocations", {"prompt": "a", "size": "136x64"}, 422, "width must be a whole number from 1 to 128"),
    ("/invocations", {"prompt": "a", "size": "128x128"}, 422, "size must have at most 8192 pixels in all"),
    ("/invocations", {"prompt": "a", "size": "60x64"}, 422, "multiples of 8"),
    ("/invocations", {"prompt": "a", "adapter": "dog"}, 422, "adapter must be left out"),
    ("/invocations", {"prompt": "\ud800"}, 422, "prompt must be text that UTF-8 can express"),
    (GENERATIONS, {"prompt": "a", "negative_prompt": "\ud800"}, 422, "negative_prompt must be text that UTF-8 can"),
    ("/invocations", {"prompt": "a", "\ud800": 1}, 422, "\\ud800"),
    (GENERATIONS, {"prompt": "a", "\ud800": 1}, 422, "\\ud800 is not known"),
    ("/invocations", {"prompt": "a", "guidance_scale": 10**400}, 422, "guidance_scale must be a number from 0 to 100"),
    ("/invocations", {"inputs": [], "instances": []}, 422, "only one of inputs, instances"),
    ("/invocations", {"inputs": []}, 422, "inputs must have one row or more"),
    ("/invocations", {"inputs": ["a"], "params": 3}, 422, "params must be an object"),
    ("/invocations", {"inputs": ["a"], "parms": {}}, 422, "parms is not known"),
    ("/invocations", {"inputs": {"prompt": ["a"], "seed": [1, 2]}}, 422, "must have the same length"),
    ("/invocations", {"dataframe_split": {"columns": ["prompt"], "data": [["a", 3]]}}, 422, "dataframe_split must"),
    ("/invocations", [1], 422, "the body must be a JSON object"),
    (GENERATIONS, {"prompt": "a", "response_format": "url"}, 422, "response_format must be b64_json"),
    (GENERATIONS, {"prompt": "a", "style": "vivid"}, 422, "style must be left out"),
    (GENERATIONS, {"prompt": "a", "steps": 3}, 422, "steps is not known"),
    (GENERATIONS, {"prompt": "a", "stream": 1.5}, 422, "stream must be true or false"),
    (GENERATIONS, {"prompt": "a", "model": 3}, 422, "model must be the name of a model"),
    (GENERATIONS, {"prompt": "a", "model": "dog"}, 404, "there is no model 'dog'"),
    (GENERATIONS, {}, 422, "prompt is missing"),
    (GENERATIONS, {"prompt": "a", "n": 9}, 422, "n must be a whole number from 1 to 8"),
], ids=lambda value: str(value)[:40])
def test_an_invalid_request_is_refused_in_one_sentence(server: FakeServer, path: str, body: Any, status: int,
                                                       says: str) -> None:
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    message = answer.json()["message"] if path == "/invocations" else answer.json()["error"]["message"]
    assert says in message and "\n" not in message


def test_many_rows_are_refused_before_they_are_parsed(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of 1 MiB can have 200 000 rows of 8 pictures, and the event loop does nothing else meanwhile."""
    parsed: list[Any] = []
    monkeypatch.setattr("dreambooth.serving.app.parse", lambda row, limits: parsed.append(row) or [])
    answer = server.post("/invocations", {"inputs": ["a"] * 9, "params": {"num_images": 8}})
    assert answer.status_code == 422 and not parsed


@pytest.mark.parametrize(("data", "kind", "status"), [
    (b"{", "application/json", 400), (b"\xff", "application/json", 400), (b"[" * 100_000, "application/json", 400),
    (b'{"seed": ' + b"1" * 5000 + b"}", "application/json", 400), (b"prompt\na", "text/csv", 415), (b"{}", "", 415)])
def test_a_body_that_is_not_json_is_refused(server: FakeServer, data: bytes, kind: str, status: int) -> None:
    answer = server.post("/invocations", None, data=data, headers={"Content-Type": kind} if kind else {})
    assert answer.status_code == status and answer.json()["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_before_it_is_read(server: FakeServer, chunked: bool) -> None:
    """The client announces 2 GiB, or sends pieces without an end: the answer comes after a fraction of it."""
    host = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host[0], int(host[2])), timeout=10) as connection:
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {2**31}"
        connection.sendall(f"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{length}"
                           "\r\n\r\n".encode())
        for _ in range(3 if chunked else 0):
            connection.sendall(b"80000\r\n" + b" " * 0x80000 + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_token_is_required_but_not_of_page_probe_and_metrics() -> None:
    with serving(token=TOKEN) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN},
                        {"Authorization": f"Bearer {TOKEN}x"}):
            assert server.get("/v1/models", headers=headers).status_code == 401
            answer = server.post(GENERATIONS, {"prompt": "a"}, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert server.post(GENERATIONS, {"prompt": "a"}, headers=right).status_code == 200
        assert server.get("/v1/models", headers=right).status_code == 200
        assert [server.get(path).status_code for path in ("/", "/ping", "/metrics")] == [200, 200, 200]


# -- queue and workers ------------------------------------------------------------------------------------------

def post_in_threads(server: FakeServer, bodies: list[Any], threads: ThreadPoolExecutor) -> list[Any]:
    return [threads.submit(server.post, "/invocations", body) for body in bodies]


def slow(seconds: float) -> Any:
    return lambda worker: setattr(worker, "seconds", seconds)


def test_equal_shapes_are_drawn_together_and_the_oldest_first() -> None:
    with serving(slow(0.5), max_batch=3) as server, ThreadPoolExecutor(8) as threads:
        first = post_in_threads(server, [{"prompt": "first"}], threads)
        server.wait_until(lambda: server.worker.batches)
        for number, steps in enumerate([5, 6, 5, 5, 5, 6]):
            first += post_in_threads(server, [{"prompt": str(number), "num_inference_steps": steps}], threads)
            server.wait_until(lambda count=number + 1: len(server.service.queue) == count)  # type: ignore[misc]
        assert {one.result().status_code for one in first} == {200}
        assert [[one["prompt"] for one in batch] for batch in server.worker.batches] == [
            ["first"], ["0", "2", "3"], ["1", "5"], ["4"]]


def test_a_picture_waits_for_others_of_its_batch_only_for_a_moment() -> None:
    with serving(max_batch=2, max_wait_ms=400) as server, ThreadPoolExecutor(8) as threads:
        together = post_in_threads(server, [{"prompt": "a"}, {"prompt": "b"}], threads)
        assert {one.result().status_code for one in together} == {200}
        alone = server.post("/invocations", {"prompt": "c"})
        assert 0.4 <= alone.elapsed.total_seconds() < 2
        assert sorted(map(len, server.worker.batches)) == [1, 2]


def test_a_full_queue_is_429_with_the_time_to_try_again() -> None:
    with serving(slow(0.6), max_batch=1, max_queue=2, max_images=2) as server, ThreadPoolExecutor(8) as threads:
        accepted = post_in_threads(server, [{"prompt": "drawn"}], threads)
        server.wait_until(lambda: server.worker.batches)
        accepted += post_in_threads(server, [{"prompt": "waits"}], threads)
        server.wait_until(lambda: len(server.service.queue) == 1)
        refused = server.post(GENERATIONS, {"prompt": "a", "n": 2})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert {one.result().status_code for one in accepted} == {200}
        assert len(server.worker.batches) == 2, "of a request that does not fit wholly nothing is drawn"


def test_a_stream_ends_in_time_also_while_steps_are_reported() -> None:
    def prepare(worker: Any) -> None:
        worker.seconds, worker.steps = 4.0, 40

    with serving(prepare, request_timeout=1.0) as server:
        answer = server.post(GENERATIONS, {"prompt": "a", "stream": True})
        assert [event["status"] for event in events(answer.text) if event["type"] == "error"] == [504]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_client_is_gone_is_not_drawn(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    with serving(slow(0.8), max_batch=1) as server:
        host = server.url.removeprefix("http://")
        clients = [http.client.HTTPConnection(host) for _ in range(3)]
        for number, client in enumerate(clients):
            client.request("POST", GENERATIONS, json.dumps({"prompt": str(number), "stream": stream}),
                           {"Content-Type": "application/json"})
            server.wait_until(lambda count=number: server.worker.batches  # type: ignore[misc]
                              and len(server.service.queue) == count)
        for client in clients[:2]:  # of the batch that is drawn, and of one that waits
            if client.sock:
                client.sock.shutdown(socket.SHUT_RDWR)
            client.close()
        assert clients[2].getresponse().read()
        clients[2].close()
        assert [batch[0]["prompt"] for batch in server.worker.batches] == ["0", "2"]
        assert server.worker.stops == 1
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_killed_worker_fails_what_it_draws_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "FIRST_PAUSE", 0.05)

    def prepare(worker: Any) -> None:
        worker.prompts_to_crash, worker.seconds = ("crash",), 0.5

    with serving(prepare, max_batch=1) as server, ThreadPoolExecutor(4) as threads:
        answers = post_in_threads(server, [{"prompt": "crash"}], threads)
        server.wait_until(lambda: server.worker.batches)
        answers += post_in_threads(server, [{"prompt": "waits"}], threads)
        assert [one.result().status_code for one in answers] == [503, 200]
        assert "retry-after" in answers[0].result().headers
        assert "dreambooth_worker_restarts_total 1.0" in server.get("/metrics").text


def test_a_worker_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "FIRST_PAUSE", 0.01)
    with serving(slow(60), request_timeout=1.0) as server:
        assert server.post("/invocations", {"prompt": "a"}).status_code in (503, 504)
        server.worker.seconds = 0.01
        server.wait_until(lambda: server.get("/ping").status_code == 200)
        assert server.post("/invocations", {"prompt": "a"}).status_code == 200


def test_a_model_that_cannot_be_opened_ends_the_server_with_the_reason() -> None:
    def prepare(worker: Any) -> None:
        worker.refusal = {"code": 4, "sentence": "out of memory"}

    with serving(prepare, ready=False) as server:
        server.wait_until(lambda: server.pool.done())
        assert server.get("/ping").status_code == 503
        assert server.post("/invocations", {"prompt": "a"}).headers["retry-after"]
    assert str(server.failure) == "out of memory" and getattr(server.failure, "exit_code", 0) == 4


def test_a_worker_that_crashes_three_times_at_its_start_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "FIRST_PAUSE", 0.01)

    def prepare(worker: Any) -> None:
        worker.crash_at_start = True

    with serving(prepare, ready=False) as server:
        server.wait_until(lambda: server.pool.done())
    assert "ended 3 times before the model was open (exit code 3)" in str(server.failure)


def test_a_worker_that_cannot_open_the_model_leaves_it_to_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    """As on a machine whose second GPU is full."""
    def prepare(worker: Any) -> None:
        def open_model(self: Any) -> None:
            worker.refusal = {"code": 4, "sentence": "out of memory"} if len(worker.running) > 1 else None
            FakeWorker._open(self)

        worker._open = open_model

    with serving(prepare, workers=2) as server:
        server.wait_until(lambda: len(server.worker.running) == 1 and "out of memory" in capfd.readouterr().err)
        assert server.post("/invocations", {"prompt": "a"}).status_code == 200 and not server.pool.done()


# -- stopping -----------------------------------------------------------------------------------------------------

def test_a_stopping_server_delivers_what_it_can_and_refuses_the_rest() -> None:
    with serving(slow(0.4), max_batch=1, grace_seconds=1.0) as server, ThreadPoolExecutor(8) as threads:
        server.post("/invocations", {"prompt": "measured"})
        answers = []
        for number in range(5):
            answers += post_in_threads(server, [{"prompt": str(number)}], threads)
            server.wait_until(lambda count=number: len(server.worker.batches) == 2  # type: ignore[misc]
                              and len(server.service.queue) == count)
        import asyncio

        drain = asyncio.run_coroutine_threadsafe(server.service.drain(), server.loop)
        server.wait_until(lambda: server.service.stopping)
        late = server.post("/invocations", {"prompt": "late"})
        assert (late.status_code, server.get("/ping").status_code) == (503, 503) and late.headers["retry-after"]
        drain.result(10)
        codes = [one.result().status_code for one in answers]
        assert codes == sorted(codes) and (codes[0], codes[-1]) == (200, 503), "two or three fit into the time"


def test_a_second_signal_refuses_what_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server as it runs in its process, with workers that draw nothing."""
    worker: Any = type("Worker", (FakeWorker,), {"running": [], "batches": [], "seconds": 60.0})
    servers: list[Any] = []

    def start(config: Any) -> Any:
        servers.append(running_server(config))
        return servers[0]

    running_server = process._Server
    monkeypatch.setattr(process, "_Server", start)
    monkeypatch.setattr(process, "Service", lambda options, gpus: services.append(
        Service(options, gpus, worker)) or services[0])
    services: list[Service] = []
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/invocations"

    def post(prompt: str) -> int:
        return requests.post(url, json={"prompt": prompt}, timeout=20).status_code

    with ThreadPoolExecutor(3) as threads:
        ended = threads.submit(lambda: asyncio.run(process._serve(Serve(base="toy", max_batch=1, max_wait_ms=0.0),
                                                                  listener)))
        wait_until(lambda: services and services[0].is_ready)
        answers = [threads.submit(post, "drawn")]
        wait_until(lambda: worker.batches)
        answers.append(threads.submit(post, "waits"))
        wait_until(lambda: len(services[0].queue) == 1)
        for _ in range(2):
            servers[0].handle_exit(signal.SIGTERM, None)
            wait_until(lambda: services[0].stopping)
        assert [answer.result() for answer in answers] == [503, 503]
        ended.result(10)
