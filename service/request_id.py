"""Every request has an id: the caller's X-Request-ID or a new one, in its answer and in the log."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("uvicorn.error")

HEADER = "X-Request-ID"
PROBES = ("/healthz", "/readyz")
"""Asked every few seconds: not worth a line each."""
PRINTABLE = re.compile(r"[!-~]{1,100}")


class RequestId:
    """Pure ASGI. An id that is longer or has other characters is replaced by a new one.

    The line of a request has its path and never its query, its headers or its body.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        asked = Headers(scope=scope).get(HEADER, "")
        id = asked if PRINTABLE.fullmatch(asked) else str(uuid.uuid4())
        scope["request_id"] = id
        began = time.monotonic()
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            took_ms = 1000 * (time.monotonic() - began)
            path = ascii(scope["path"])[1:-1][:200]
            level = logging.DEBUG if path in PROBES else logging.INFO
            line = "%s %s %s %.0f ms request_id=%s"
            log.log(level, line, scope["method"], path, status, took_ms, id)
