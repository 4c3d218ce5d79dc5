"""The routes of the server, as an ASGI application."""

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from dreambooth.inference.picture_answer import prediction
from dreambooth.inference.picture_request import InvalidRequest, PictureRequest, parse
from dreambooth.serving import invocations, openai
from dreambooth.serving.body import read_json
from dreambooth.serving.guard import Guard, content_policy
from dreambooth.serving.queue import Job
from dreambooth.serving.refusals import Gone, Refused
from dreambooth.serving.service import Service, page
from dreambooth.utils.masking import mask_urls

STREAM_SILENCE = 10.0  # seconds without an event after which a stream sends a comment, which shows that it is alive
CLOSED_REQUEST = 499  # nginx's status for a client that closed its connection; it is only counted, nobody reads it

Handler = Callable[[Request], Awaitable[Response]]


def create_app(service: Service) -> Guard:
    """Return the application."""
    routes = Routes(service)
    paths: list[tuple[str, str, Handler]] = [
        ("GET", "/", routes.page), ("GET", "/ping", routes.ping), ("GET", "/metrics", routes.metrics),
        ("GET", "/v1/models", routes.models), ("POST", "/invocations", routes.invocations),
        ("POST", "/v1/images/generations", routes.generations)]
    app = Starlette(routes=[Route(path, handler, methods=[method]) for method, path, handler in paths])
    return Guard(app, service.metrics, service.options.token, {path for _, path, _ in paths})


class Routes:
    """The handlers of all routes."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._page = page("serve.html")
        self._policy = content_policy(self._page)

    async def page(self, request: Request) -> Response:
        """GET /: the page to try the server in a browser."""
        return HTMLResponse(self._page, headers=self._policy)

    async def ping(self, request: Request) -> Response:
        """GET /ping: 200 if a picture could be drawn now."""
        if self.service.is_ready:
            return PlainTextResponse("ok\n")
        return _refusal(Refused(503, "no worker is ready", 5), "/ping")

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: for Prometheus."""
        metrics = self.service.metrics
        return Response(metrics.render(), headers={"Content-Type": metrics.content_type})

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the model and its adapters, and below `dreambooth` what the page needs."""
        return await self._answer(request, self._models)

    async def invocations(self, request: Request) -> Response:
        """POST /invocations: SageMaker's and MLflow's contract."""
        return await self._answer(request, self._invocations)

    async def generations(self, request: Request) -> Response:
        """POST /v1/images/generations: OpenAI's API for images."""
        return await self._answer(request, self._generations)

    async def _answer(self, request: Request, handler: Handler) -> Response:
        """Call a handler, and turn its errors into answers."""
        try:
            return await handler(request)
        except InvalidRequest as error:
            refusal = Refused(422, str(error))
        except Refused as error:
            refusal = error
        except (Gone, ClientDisconnect):
            refusal = Refused(CLOSED_REQUEST, "the client has closed the connection")
        except Exception as error:
            sys.stderr.write(mask_urls(traceback.format_exc()))
            refusal = Refused(500, f"internal error in dreambooth ({type(error).__name__}): see the server's log")
        return _refusal(refusal, request.url.path)

    async def _models(self, request: Request) -> Response:
        info, sizes, options = self.service.info(), self.service.size_limits(), self.service.options
        names = [info["model"], *self.service.adapters.paths()]
        models = [{"id": name, "object": "model", "created": self.service.started, "owned_by": "dreambooth"}
                  for name in names]
        limits = {"max_side": sizes.max_side, "max_pixels": sizes.max_pixels, "max_steps": options.max_steps,
                  "max_images": options.max_images}
        return JSONResponse({"object": "list", "data": models, "dreambooth": info | {"adapters": names[1:]} | limits})

    async def _invocations(self, request: Request) -> Response:
        limits = self.service.limits()  # first: a server that starts or stops reads no body
        data = await read_json(request, self.service.options.max_body)
        rows = invocations.read_rows(data)
        if len(rows) > limits.max_images:  # before they are parsed: a body can have very many rows
            raise _too_many(len(rows), limits.max_images)
        pictures = [picture for row in rows for picture in parse(row, limits)]
        if len(pictures) > limits.max_images:
            raise _too_many(len(pictures), limits.max_images)
        as_file = "image/png" in request.headers.get("accept", "")
        if as_file and len(pictures) > 1:
            raise Refused(422, f"num_images must be 1 with Accept: image/png, not {len(pictures)}")
        files = await self._draw(request, pictures)
        if as_file:
            return Response(files[0], media_type="image/png")
        return JSONResponse({"predictions": [prediction(file) for file in files]})

    async def _generations(self, request: Request) -> Response:
        info, limits = self.service.info(), self.service.limits()
        data = await read_json(request, self.service.options.max_body)
        ours, stream = openai.read_request(data, [info["model"]])
        adapter = ours.get("adapter")
        if adapter is not None and not self.service.adapters.has(adapter):
            raise Refused(404, f"there is no model {adapter!r}: GET /v1/models lists all")
        try:
            pictures = parse(ours, limits)
        except InvalidRequest as error:
            raise Refused(422, openai.rename_field(str(error))) from error
        if stream:
            return self._stream(pictures)
        return JSONResponse(openai.answer(pictures, await self._draw(request, pictures)))

    async def _draw(self, request: Request, pictures: Sequence[PictureRequest]) -> list[bytes]:
        """Draw the pictures of a request.

        Raises:
            Refused: a picture could not be drawn, or not in time.
            Gone: the client has closed its connection. What was not drawn yet is not drawn.
        """
        jobs = self.service.submit(pictures)
        drawing = asyncio.gather(*(job.result for job in jobs))
        drawing.add_done_callback(_mark_retrieved)
        gone = asyncio.ensure_future(_wait_until_gone(request))
        waiting: set[asyncio.Future[Any]] = {drawing, gone}
        try:
            await asyncio.wait(waiting, timeout=self.service.options.request_timeout,
                               return_when=asyncio.FIRST_COMPLETED)
            if drawing.done():
                return list(drawing.result())
            if gone.done():
                raise Gone
            raise Refused(504, f"the picture was not ready after {self.service.options.request_timeout:g} s")
        finally:
            gone.cancel()
            self.service.abandon(jobs)

    def _stream(self, pictures: Sequence[PictureRequest]) -> Response:
        events: asyncio.Queue[bytes | Job] = asyncio.Queue()
        ahead = len(self.service.queue)
        jobs = self.service.submit(pictures, lambda position, done, total: events.put_nowait(
            openai.progress(position, done, total)))
        for job in jobs:
            job.result.add_done_callback(lambda _, job=job: events.put_nowait(job))  # type: ignore[misc]
        body = self._events(jobs, events, openai.queued(ahead, len(jobs)))
        return StreamingResponse(body, media_type="text/event-stream",
                                 headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def _events(self, jobs: list[Job], events: "asyncio.Queue[bytes | Job]",
                      first: bytes) -> AsyncIterator[bytes]:
        """Yield the events of a stream until all pictures are finished, or one could not be drawn."""
        deadline = asyncio.get_running_loop().time() + self.service.options.request_timeout
        try:
            yield first
            remaining = len(jobs)
            while remaining:
                seconds = deadline - asyncio.get_running_loop().time()
                if seconds <= 0:
                    raise Refused(504, f"the picture was not ready after {self.service.options.request_timeout:g} s")
                try:
                    async with asyncio.timeout(min(seconds, STREAM_SILENCE)):
                        event = await events.get()
                except TimeoutError:
                    yield b": the picture is waiting or being drawn\n\n"
                    continue
                if isinstance(event, bytes):
                    yield event
                else:
                    remaining -= 1
                    yield openai.completed(jobs.index(event), event.request, event.result.result())
        except Refused as refusal:
            yield openai.failed(refusal)
        finally:  # also if the client has closed its connection
            self.service.abandon(jobs)


def _mark_retrieved(drawing: "asyncio.Future[list[bytes]]") -> None:
    """Keep asyncio from logging an error for which nobody waits any more."""
    if not drawing.cancelled():
        drawing.exception()


def _too_many(count: int, limit: int) -> Refused:
    return Refused(422, f"num_images must be at most {limit} over all rows, not {count}")


async def _wait_until_gone(request: Request) -> None:
    """Wait until the client has closed its connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(refusal: Refused, path: str) -> Response:
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    if refusal.status in (413, 408):
        headers["Connection"] = "close"  # the rest of the body is not read
    if path == "/invocations":
        content: Any = {"error_code": "BAD_REQUEST" if refusal.status < 500 else "INTERNAL_ERROR",
                        "message": refusal.sentence}
    else:
        content = openai.error(refusal)
    return JSONResponse(content, refusal.status, headers)
