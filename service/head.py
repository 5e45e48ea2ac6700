"""HEAD is answered wherever GET is, by the headers that GET would have (RFC 9110, 9.3.2)."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Head:
    """Pure ASGI. Calls the app with GET, and leaves it once it has sent its headers."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)
        answered = asyncio.Event()

        async def send_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                answered.set()

        got = asyncio.ensure_future(self.app({**scope, "method": "GET"}, receive, send_headers))
        enough = asyncio.ensure_future(answered.wait())
        try:
            await asyncio.wait((got, enough), return_when=asyncio.FIRST_COMPLETED)
            if got.done():
                got.result()
        finally:
            enough.cancel()
            got.cancel()  # what follows is the body, and of a stream of events it is long
        await asyncio.wait((got,))
        await send({"type": "http.response.body", "body": b""})
