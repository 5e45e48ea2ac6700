"""The wire below the app: a request's head must be small and must arrive in time."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from safelatent.errors import MalformedHeader

MAX_HEAD = 32 * 1024
HEAD_TIMEOUT_S = 10
"""For the request line and the headers, from the connection or their first byte on."""


class Protocol(H11Protocol):
    """uvicorn's own, which would wait for a head for ever, and answers text/plain to a bad one."""

    _slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._slow:
            self._slow.cancel()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self._slow = self._slow or self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)
        elif self._slow:
            self._slow.cancel()
            self._slow = None

    def send_400_response(self, msg: str) -> None:
        error = MalformedHeader(
            "this is no HTTP/1.1 request, or its request line and headers have more than "
            f"{MAX_HEAD} bytes"
        )
        body = error.problem.model_dump_json(exclude_unset=True).encode()
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            if output := self.conn.send(event):
                self.transport.write(output)
        self.transport.close()
