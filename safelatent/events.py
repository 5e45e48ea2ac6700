"""Progress through Redis: one stream for all generations, one entry per step of a whole batch.

A worker publishes; each service process follows with one connection and wakes whoever waits.
The latest step of a running generation also stands in a hash, for those who only look.
"""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import redis.asyncio
from redis import Redis

from safelatent.schema import Progress

STREAM = "safelatent:events"
STREAM_LENGTH = 10_000
PROGRESS = "safelatent:progress"


def publish_steps(connection: Redis, steps: Mapping[str, Progress]) -> None:
    """Say how far each generation of a batch has come."""
    news = {id: [progress.step, progress.steps] for id, progress in steps.items()}
    with connection.pipeline(transaction=False) as pipeline:
        pipeline.xadd(STREAM, {"steps": json.dumps(news)}, maxlen=STREAM_LENGTH, approximate=True)
        pipeline.hset(PROGRESS, mapping={id: json.dumps(step) for id, step in news.items()})
        pipeline.execute()


def publish_finished(connection: Redis, id: str) -> None:
    """Say that a generation has reached a terminal status, which its job holds."""
    with connection.pipeline(transaction=False) as pipeline:
        pipeline.xadd(STREAM, {"finished": id}, maxlen=STREAM_LENGTH, approximate=True)
        pipeline.hdel(PROGRESS, id)
        pipeline.execute()


def progress(connection: Redis, id: str) -> Progress | None:
    """The latest published step of a running generation."""
    latest = connection.hget(PROGRESS, id)
    if latest is None:
        return None
    step, steps = json.loads(latest)
    return Progress(step=step, steps=steps)


def latest(connection: Redis, id: str, after: str) -> tuple[str, Progress] | None:
    """The newest step of a generation after a stream id, and the stream id of that step."""
    before = "+"
    while page := list(_entries(connection.xrevrange(STREAM, before, f"({after}", count=200))):
        for stream_id, steps, _ in page:
            if id in steps:
                return stream_id, steps[id]
        before = f"({page[-1][0]}"
    return None


def holds(connection: Redis, stream_id: str) -> bool:
    """Whether the stream has given this id, and still holds all that came after it."""
    first: Any = connection.xrange(STREAM, count=1)
    newest: Any = connection.xrevrange(STREAM, count=1)
    if not first:
        return False
    oldest, last = first[0][0].decode(), newest[0][0].decode()
    return order(oldest) <= order(stream_id) <= order(last)


def order(stream_id: str) -> tuple[int, int]:
    """What stream ids are sorted by."""
    milliseconds, sequence = stream_id.split("-")
    return int(milliseconds), int(sequence)


async def last(connection: redis.asyncio.Redis) -> str:
    """The stream id of the newest entry, to follow from. XREAD's own "$" would miss what comes
    between two calls."""
    newest: Any = await connection.xrevrange(STREAM, count=1)
    return newest[0][0].decode() if newest else "0-0"


async def follow(
    connection: redis.asyncio.Redis, after: str
) -> AsyncIterator[tuple[str, dict[str, Progress], list[str]]]:
    """Yield (stream id, steps, ids that finished) for every entry after `after`, for ever."""
    while True:
        answer: Any = await connection.xread({STREAM: after}, count=1000, block=1000)
        for _, entries in answer:
            for entry in _entries(entries):
                after = entry[0]
                yield entry


def _entries(answer: Any) -> Iterator[tuple[str, dict[str, Progress], list[str]]]:
    for stream_id, fields in answer:
        steps = {
            id: Progress(step=step, steps=steps)
            for id, (step, steps) in json.loads(fields.get(b"steps", b"{}")).items()
        }
        finished = [fields[b"finished"].decode()] if b"finished" in fields else []
        yield stream_id.decode(), steps, finished
