"""The events of one generation as Server-Sent Events: a snapshot, its steps, its end.

An event's id is a place in the Redis stream. The end's is the last place of its millisecond, so
that a client which comes back with it is known to have seen everything.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress

from anyio import CancelScope
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from safelatent import events
from safelatent.errors import NotFound, QueueUnavailable, SafelatentError
from safelatent.jobs import redis_errors
from safelatent.schema import Generation, Progress
from service.waiting import Waiting

KEEP_ALIVE_S = 15
STREAM_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,20}")
END = str(2**64 - 1)
"""The sequence number in the id of a last event."""

EVENTS = {
    "description": "`snapshot` (the generation), then `step` ({step, steps}: the latest, when the "
    "client reads slowly), and `finished` (the generation), after which the stream closes. "
    f"A comment comes after {KEEP_ALIVE_S} s of silence.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


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
    after = last_event_id if STREAM_ID.fullmatch(last_event_id or "") else None
    if after and generation.status.is_terminal and after.endswith(f"-{END}"):
        return Response(status_code=204)

    def held() -> bool:
        with redis_errors():
            return events.holds(waiting.jobs.connection, after or "")

    if after and (events.order(after)[1] > int(END) or not await run_in_threadpool(held)):
        after = None
    return EventSourceResponse(
        _frames(waiting, generation, tenant, after, cancels),
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _frames(
    waiting: Waiting, generation: Generation, tenant: str, after: str | None, cancels: bool
) -> AsyncIterator[bytes]:
    jobs = waiting.jobs

    def look() -> Generation:
        try:
            return jobs.fetch(generation.id, tenant)
        except QueueUnavailable:  # it may come back, and the client should not have to
            return generation

    def missed(since: str) -> tuple[str, Progress] | None:
        with redis_errors():
            return events.latest(jobs.connection, generation.id, since)

    step: Progress | None = None
    try:
        with waiting.mailbox(generation.id) as mailbox:
            # What is read from here on is older than what the mailbox gets, or the same.
            told = after or waiting.position or "0-0"
            generation = await run_in_threadpool(look)
            if after is None:
                yield _frame("snapshot", linked(generation), told)
                step = generation.progress
            elif not generation.status.is_terminal:
                found = await run_in_threadpool(missed, after)
                mailbox.step = mailbox.step or found
                mailbox.news.set()
            while not generation.status.is_terminal and not waiting.released:
                try:
                    await asyncio.wait_for(mailbox.news.wait(), KEEP_ALIVE_S)
                except TimeoutError:
                    yield KEEPALIVE_COMMENT
                    mailbox.finished.set()  # its event may have been lost: look
                mailbox.news.clear()
                latest, mailbox.step = mailbox.step, None
                if latest and events.order(latest[0]) > events.order(told) and latest[1] != step:
                    told, step = latest
                    yield _frame("step", step, told)
                if mailbox.finished.is_set():
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


def _frame(event: str, data: BaseModel, id: str) -> bytes:
    return format_sse_event(data_str=data.model_dump_json(), event=event, id=id)
