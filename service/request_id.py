"""Every request has an id: the caller's X-Request-ID or a new one, in its answer and in the log."""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safelatent import logs

HEADER = "X-Request-ID"
PRINTABLE = re.compile(r"[!-~]{1,100}")


class RequestId:
    """Pure ASGI. An id that is longer or has other characters is replaced by a new one.

    It stands in every line that is logged for the request, and goes with its job to the worker.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        asked = Headers(scope=scope).get(HEADER, "")
        id = asked if PRINTABLE.fullmatch(asked) else str(uuid.uuid4())
        scope["request_id"] = id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = id
            await send(message)

        with logs.bound(request_id=id):
            await self.app(scope, receive, send_with_id)
