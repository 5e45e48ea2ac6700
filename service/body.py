"""No body larger than the service reads, or slower than it waits for, reaches a route."""

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safelatent.errors import BodyTooLarge, BodyTooSlow, RequestError
from service import problems

MAX_BODY = 1024 * 1024
BODY_TIMEOUT_S = 30
DRAINED = 16 * MAX_BODY
DRAIN_S = 5.0
"""How much more is read and dropped, and for how long, before a body that is too large is refused:
who still sends when the connection closes gets a reset in the place of the answer."""


class BodyLimit:
    """Read a request's body before its route does; 413 as soon as it is too large, 408 if slow.

    Pure ASGI. Starlette's own limit answers text/plain, and ours are all problems.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                messages = await self._read(scope, receive)
        except TimeoutError:
            error: RequestError = BodyTooSlow(f"the body did not arrive in {BODY_TIMEOUT_S} s")
        except BodyTooLarge as too_large:
            await _drain(receive)
            error = too_large
        else:

            async def replay() -> Message:
                return messages.pop(0) if messages else await receive()

            return await self.app(scope, replay, send)
        response = problems.answer(error, scope["path"])
        response.headers["Connection"] = "close"  # what follows on it is the unread rest
        await response(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> list[Message]:
        length = Headers(scope=scope).get("content-length", "0")
        size = int(length) if length.isdecimal() else 0
        messages: list[Message] = []
        while size <= MAX_BODY:
            message = await receive()
            messages.append(message)
            if not message.get("more_body"):
                return messages
            size = max(size, sum(len(each["body"]) for each in messages))
        raise BodyTooLarge(f"the body has more than {MAX_BODY} bytes, the most that is read")


async def _drain(receive: Receive) -> None:
    left = DRAINED
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return
