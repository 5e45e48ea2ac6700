"""The parser of Server-Sent Events, by the rules of the WHATWG."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelatent.client.sse import Message, Parser


def read(*chunks: bytes) -> list[Message]:
    parser = Parser()
    return [message for chunk in chunks for message in parser.feed(chunk)]


@pytest.mark.parametrize(
    ("stream", "messages"),
    [
        (b"data: a\n\n", [Message("message", "a", "")]),
        (b"event: step\ndata: a\nid: 1\n\n", [Message("step", "a", "1")]),
        (b"data: a\ndata: b\n\n", [Message("message", "a\nb", "")]),
        (b"data:a\n\ndata:  b\n\n", [Message("message", "a", ""), Message("message", " b", "")]),
        (b"data\n\n", [Message("message", "", "")]),
        (b"event: step\n\ndata: a\n\n", [Message("message", "a", "")]),  # no data: no message
        (b"id: 1\ndata: a\n\ndata: b\n\n", [Message("message", d, "1") for d in "ab"]),
        (b"id: 1\n\nid\ndata: a\n\n", [Message("message", "a", "")]),
        (b"id: 1\x002\ndata: a\n\n", [Message("message", "a", "")]),
        (b": a comment\nretry: 5\nunknown: x\ndata: a\n\n", [Message("message", "a", "")]),
        (
            b"data: a\rdata: b\r\rdata: c\r\n\r\n",
            [Message("message", t, "") for t in ("a\nb", "c")],
        ),
        ("data: a\u2028b\x85c\n\n".encode(), [Message("message", "a\u2028b\x85c", "")]),
        (b"\xef\xbb\xbfdata: a\n\n", [Message("message", "a", "")]),
        (b"data: a\r\ndata: b\r\n\r\n", [Message("message", "a\nb", "")]),
        (b"data: a\n", []),  # not complete
    ],
)
def test_a_stream_and_its_messages(stream: bytes, messages: list[Message]) -> None:
    assert read(stream) == messages
    assert read(*(bytes([byte]) for byte in stream)) == messages


@given(st.lists(st.sampled_from([b"data: x", b"id: 1", b":", b"\r", b"\n", b"\r\n", b"\xc3\xa4"])))
def test_where_the_pieces_end_changes_nothing(pieces: list[bytes]) -> None:
    assert read(*pieces) == read(b"".join(pieces))
