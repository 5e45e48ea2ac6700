"""Server-Sent Events from bytes to messages (WHATWG HTML, section 9.2.6), without I/O.

Lines end by CR, LF or CRLF and nothing else: `str.splitlines`, and so httpx's `iter_lines`, would
also cut at U+2028, which a prompt may hold.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

LINE_END = re.compile(rb"\r\n|\n|\r")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Message:
    event: str
    data: str
    id: str
    """The last id that the stream has said: that of this message, or of one before it."""


class Parser:
    """Feed it what arrives, in pieces of any size; it gives each message once it is complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._begun = self._after_cr = False
        self._event, self._data, self._id = "", list[str](), ""

    def feed(self, chunk: bytes) -> Iterator[Message]:
        if not chunk:
            return
        if self._after_cr:  # the second half of a CRLF
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        *lines, self._rest = LINE_END.split(self._rest + chunk)
        for line in lines:
            if not self._begun:
                line, self._begun = line.removeprefix(BYTE_ORDER_MARK), True
            if line:
                self._field(line.decode(errors="replace"))
            elif message := self._message():
                yield message

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "event":
                self._event = value
            case "data":
                self._data.append(value)
            case "id" if "\0" not in value:
                self._id = value

    def _message(self) -> Message | None:
        event, data = self._event or "message", self._data
        self._event, self._data = "", []
        return Message(event, "\n".join(data), self._id) if data else None
