"""Progress through Redis: one stream for all generations, one entry per step of a whole batch.

A worker publishes; each service process follows with one connection and wakes whoever waits.
The latest step of a running generation, and its finished images, also stand in hashes, for those
who only look.
"""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

import redis.asyncio
from redis import Redis

from safelatent.schema import Image, Progress, Started

STREAM = "safelatent:events"
STREAM_LENGTH = 10_000
PROGRESS = "safelatent:progress"
IMAGES = "safelatent:images:{}"
"""A generation's stored images by their index, until its result says the same and more."""


class News(NamedTuple):
    """What one entry of the stream says of one generation."""

    event: str
    """`started`, `step`, `image` or `finished`."""
    data: Started | Progress | Image | None = None

    @property
    def key(self) -> str:
        """A later news of the same key replaces it."""
        return f"image {self.data.index}" if isinstance(self.data, Image) else self.event


Entry = tuple[str, dict[str, News]]
"""A stream id, and the news by generation."""


def publish_started(connection: Redis, id: str, at: datetime) -> None:
    """Say that a worker has begun a generation."""
    fields = {"started": id, "data": Started(started_at=at).model_dump_json()}
    connection.xadd(STREAM, fields, maxlen=STREAM_LENGTH, approximate=True)  # type: ignore[arg-type]


def publish_steps(connection: Redis, steps: Mapping[str, Progress]) -> None:
    """Say how far each generation of a batch has come."""
    news = {id: [progress.step, progress.steps] for id, progress in steps.items()}
    with connection.pipeline(transaction=False) as pipeline:
        pipeline.xadd(STREAM, {"steps": json.dumps(news)}, maxlen=STREAM_LENGTH, approximate=True)
        pipeline.hset(PROGRESS, mapping={id: json.dumps(step) for id, step in news.items()})
        pipeline.execute()


def publish_image(connection: Redis, id: str, image: Image, kept_s: int) -> None:
    """Say that an image is stored. A second attempt's image takes the place of the first's, and
    is not told again."""
    key = IMAGES.format(id)
    is_first = not connection.hexists(key, str(image.index))
    content = image.model_dump_json()
    with connection.pipeline() as pipeline:
        pipeline.hset(key, str(image.index), content)
        pipeline.expire(key, kept_s)
        if is_first:
            fields = {"image": id, "data": content}
            pipeline.xadd(STREAM, fields, maxlen=STREAM_LENGTH, approximate=True)  # type: ignore[arg-type]
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


def in_progress(connection: Redis) -> list[str]:
    """Ids of which a step stands here: of those that run, and those whose end told nobody."""
    ids: Any = connection.hkeys(PROGRESS)
    return [id.decode() for id in ids]


def forget_progress(connection: Redis, id: str) -> None:
    connection.hdel(PROGRESS, id)


def images(connection: Redis, id: str) -> list[Image]:
    """The images that a generation has so far, by their index."""
    found: Any = connection.hvals(IMAGES.format(id))
    return sorted(map(Image.model_validate_json, found), key=lambda image: image.index)


def since(connection: Redis, id: str, after: str) -> list[tuple[str, News]]:
    """A generation's news after a stream id, oldest first; of its steps only the latest."""
    found: dict[str, tuple[str, News]] = {}
    while page := list(_entries(connection.xrange(STREAM, f"({after}", count=200))):
        for stream_id, news in page:
            if one := news.get(id):
                found.pop(one.key, None)
                found[one.key] = stream_id, one
        after = page[-1][0]
    return list(found.values())


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


async def follow(connection: redis.asyncio.Redis, after: str) -> AsyncIterator[Entry]:
    """Yield every entry after `after`, for ever."""
    while True:
        answer: Any = await connection.xread({STREAM: after}, count=1000, block=1000)
        for _, entries in answer:
            for entry in _entries(entries):
                after = entry[0]
                yield entry


def _entries(answer: Any) -> Iterator[Entry]:
    for stream_id, fields in answer:
        news: dict[str, News] = {}
        for id, (step, steps) in json.loads(fields.get(b"steps", b"{}")).items():
            news[id] = News("step", Progress(step=step, steps=steps))
        if id := fields.get(b"started"):
            news[id.decode()] = News("started", Started.model_validate_json(fields[b"data"]))
        if id := fields.get(b"image"):
            news[id.decode()] = News("image", Image.model_validate_json(fields[b"data"]))
        if id := fields.get(b"finished"):
            news[id.decode()] = News("finished")
        yield stream_id.decode(), news
