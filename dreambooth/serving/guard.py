"""What happens before every route: the token is checked, and the answer is counted."""

import base64
import hmac
import re
import time
from collections.abc import Set
from hashlib import sha256

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dreambooth.serving import openai
from dreambooth.serving.metrics import Metrics
from dreambooth.serving.refusals import Refused

OPEN = {"/", "/ping", "/metrics"}  # without a token: probes and Prometheus have none, and these tell no secrets


class Guard:
    """An ASGI application around another one.

    Args:
        token: clients must send it as `Authorization: Bearer TOKEN`; None: everyone may ask.
        paths: the paths of all routes; the metrics count all others under one name.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, token: str | None, paths: Set[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with the application, or with status 401."""
        if scope["type"] != "http":
            return
        began = time.monotonic()
        route = scope["path"] if scope["path"] in self.paths else "other"
        code = 500

        async def counting(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            if scope["path"] in OPEN or self._may_pass(scope):
                await self.app(scope, receive, counting)
            else:
                refusal = Refused(401, "the token is missing or wrong: send the header Authorization: Bearer TOKEN")
                answer = JSONResponse(openai.error(refusal), 401, {"WWW-Authenticate": "Bearer"})
                await answer(scope, receive, counting)
        finally:
            self.metrics.requests.labels(route, str(code)).inc()
            self.metrics.request_seconds.labels(route).observe(time.monotonic() - began)

    def _may_pass(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        sent = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = sent.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


def content_policy(html: str) -> dict[str, str]:
    """Return headers with which a browser runs only the scripts and styles of this page, and asks only this server."""
    hashes = {tag: " ".join(f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"
                            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL))
              for tag in ("script", "style")}
    policy = (f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data: blob:; "
              "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
