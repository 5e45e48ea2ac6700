"""A process serves so many requests at once, and refuses the next with a 503."""

from starlette.types import ASGIApp, Receive, Scope, Send

from safelatent.errors import Overloaded
from service import problems

ALWAYS = ("/healthz", "/readyz", "/metrics")
"""A full process is alive, and its operator must be able to see that."""


class MaxRequests:
    """Pure ASGI. Streams and requests that hold the line count until they end.

    uvicorn's own limit answers text/plain, and counts idle connections.
    """

    def __init__(self, app: ASGIApp, most: int):
        self.app = app
        self.most = most
        self._served = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ALWAYS:
            return await self.app(scope, receive, send)
        if self._served >= self.most:
            error = Overloaded(
                f"this process serves {self.most} requests already, the most it takes at once",
                retry_after_s=1,
            )
            return await problems.answer(error, scope["path"])(scope, receive, send)
        self._served += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._served -= 1
