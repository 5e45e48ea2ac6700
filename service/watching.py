"""The events of one generation as Server-Sent Events: a snapshot, its way, its end.

An event's id is a place in the Redis stream; that of `queued` also says which position was told.
The end's is the last place of its millisecond, so that a client which comes back with it is known
to have seen everything. A snapshot has no id: who has seen no more gets another one.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from anyio import CancelScope
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from safelatent import events
from safelatent.errors import NotFound, QueueUnavailable, SafelatentError
from safelatent.events import News
from safelatent.jobs import redis_errors
from safelatent.schema import Generation, Image, Progress, Started, Status
from service.waiting import Waiting

KEEP_ALIVE_S = 15
EVENT_ID = re.compile(r"([0-9]{1,19}-[0-9]{1,20})(?:\.([0-9]{1,9}))?")
END = str(2**64 - 1)
"""The sequence number in the id of a last event."""

EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["snapshot", "queued", "started", "step", "image", "finished"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
        "id": {"type": "string", "description": "For Last-Event-ID; a snapshot has none."},
    },
}
EVENTS = {
    "description": "`snapshot` (the generation as it stands), and then what happens: `queued` "
    "({position, eta_s}, when the position changes), `started` ({started_at}; again when a crash "
    "has put it back), `step` ({step, steps}: the latest, when the client reads slowly), `image` "
    "(an image as soon as it is stored), and `finished` (the generation), after which the stream "
    f"closes. A comment comes after {KEEP_ALIVE_S} s of silence.",
    "content": {"text/event-stream": {"itemSchema": EVENT}},
}


@dataclass
class Seen:
    """What a watcher knows already, so that nothing is told twice."""

    started_at: datetime | None = None
    step: int = -1
    images: set[int] = field(default_factory=set)
    position: int | None = None

    @classmethod
    def of(cls, generation: Generation) -> "Seen":
        step = generation.progress.step if generation.progress else -1
        images = {image.index for image in generation.images}
        return cls(generation.started_at, step, images, generation.position)

    def learns(self, news: News) -> bool:
        """Take note of news; False when they are none."""
        match news.data:
            case Started(started_at=at):
                is_new = at != self.started_at
                if is_new:
                    self.started_at, self.step = at, -1
            case Progress(step=step):
                is_new = step > self.step
                self.step = max(step, self.step)
            case Image(index=index):
                is_new = index not in self.images
                self.images.add(index)
            case _:
                is_new = False
        return is_new


def linked(generation: Generation) -> Generation:
    """With the paths that lead on from it."""
    here = f"/generations/{generation.id}"
    generation.links = {"self": here, "events": f"{here}/events", "cancel": f"{here}/cancel"}
    return generation


async def watch(
    waiting: Waiting,
    generation: Generation,
    tenant: str,
    last_event_id: str | None = None,
    cancels: bool = False,
) -> Response:
    """Stream a generation's events: from the start, or what came after the last that was seen.

    A last event that is malformed, unknown or no longer held is as good as none: a new snapshot
    says all that was missed. Who has seen the end gets 204, which tells a browser not to come back.
    With `cancels` a client that hangs up before the end cancels the generation.
    """
    found = EVENT_ID.fullmatch(last_event_id or "")
    after = found[1] if found else None
    if after and generation.status.is_terminal and after.endswith(f"-{END}"):
        return Response(status_code=204)

    def held() -> bool:
        with redis_errors():
            return events.holds(waiting.jobs.connection, after or "")

    if after and (events.order(after)[1] > int(END) or not await run_in_threadpool(held)):
        after = None
    seen = Seen(position=int(found[2])) if found and found[2] else Seen()
    return EventSourceResponse(
        _frames(waiting, generation, tenant, after, seen, cancels),
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _frames(
    waiting: Waiting,
    generation: Generation,
    tenant: str,
    after: str | None,
    seen: Seen,
    cancels: bool,
) -> AsyncIterator[bytes]:
    jobs = waiting.jobs

    def look() -> Generation:
        try:
            return jobs.fetch(generation.id, tenant)
        except QueueUnavailable:  # it may come back, and the client should not have to
            return generation

    def missed(since: str) -> list[tuple[str, News]]:
        with redis_errors():
            return events.since(jobs.connection, generation.id, since)

    try:
        with waiting.mailbox(generation.id) as mailbox:
            # What is read from here on is older than what the mailbox gets, or the same.
            told = after or waiting.position or "0-0"
            generation = await run_in_threadpool(look)
            news: list[tuple[str, News]] = []
            if after is None:
                seen = Seen.of(generation)
                yield _frame("snapshot", linked(generation))
            else:
                news = await run_in_threadpool(missed, after)
            if generation.status is Status.QUEUED:
                mailbox.queued = generation
            while True:
                if (place := mailbox.place) and seen.started_at is None:
                    mailbox.place = None
                    if place.position != seen.position:
                        seen.position = place.position
                        yield _frame("queued", place, f"{told}.{place.position}")
                for stream_id, one in news:
                    if events.order(stream_id) > events.order(told) and seen.learns(one):
                        told = stream_id
                        mailbox.queued = None
                        assert one.data is not None
                        yield _frame(one.event, one.data, told)
                if generation.status.is_terminal or waiting.released:
                    break
                if not mailbox.finished.is_set():
                    try:
                        await asyncio.wait_for(mailbox.news.wait(), KEEP_ALIVE_S)
                    except TimeoutError:
                        yield KEEPALIVE_COMMENT
                        mailbox.finished.set()  # its event may have been lost: look
                mailbox.news.clear()
                is_end = mailbox.finished.is_set()
                news = mailbox.take()
                if is_end:
                    mailbox.finished.clear()
                    generation = await run_in_threadpool(look)
            if generation.status.is_terminal:
                now = (waiting.position or told).split("-")[0]
                yield _frame("finished", linked(generation), f"{now}-{END}")
    except (asyncio.CancelledError, GeneratorExit):
        if cancels and not waiting.released:
            with CancelScope(shield=True), suppress(SafelatentError):
                await run_in_threadpool(jobs.cancel, generation.id, tenant)
        raise
    except (NotFound, QueueUnavailable):
        pass  # deleted meanwhile, or Redis is away: the client may come back and ask


def _frame(event: str, data: BaseModel, id: str | None = None) -> bytes:
    return format_sse_event(data_str=data.model_dump_json(), event=event, id=id)
