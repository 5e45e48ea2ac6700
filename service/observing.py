"""Every request is counted, timed and told in one line of the log, before its answer has ended."""

import logging
import time
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import Metrics

log = logging.getLogger("service.http")

QUIET = ("/healthz", "/readyz", "/metrics")
"""Asked every few seconds: not worth a line each."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

_notes: ContextVar[dict[str, str] | None] = ContextVar("notes", default=None)


def note(**notes: str) -> None:
    """Let the line of the request that is being answered say more; outside of one, nothing."""
    if (known := _notes.get()) is not None:
        known.update(notes)


class Observed:
    """Pure ASGI. The line has the route's template, and never a path, a query, a header or a body.

    It is written just before the last piece of the answer leaves: who has that can rely on it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = time.perf_counter()
        status = 500
        has_ended = False
        notes: dict[str, str] = {}

        def end() -> None:
            nonlocal has_ended
            if not has_ended:
                has_ended = True
                self._tell(scope, status, time.perf_counter() - began, notes)

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                end()
            await send(message)

        token = _notes.set(notes)
        self.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, send_and_see)
        except Exception:
            notes["problem"] = "internal-error"
            raise
        finally:
            end()
            _notes.reset(token)

    def _tell(self, scope: Scope, status: int, seconds: float, notes: dict[str, str]) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = getattr(scope.get("route"), "path_format", "unmatched")
        self.metrics.in_flight.dec()
        self.metrics.requests.labels(method, route, status).inc()
        self.metrics.seconds.labels(method, route).observe(seconds)
        if "problem" in notes:
            self.metrics.rejected.labels(notes["problem"]).inc()
        said = {"method": method, "route": route, "status": status, **notes}
        level = logging.DEBUG if route in QUIET else logging.INFO
        log.log(level, "request", extra={**said, "duration_s": round(seconds, 6)})
