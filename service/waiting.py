"""Holding the line: what `Prefer` asks for, and the news that wakes the requests that wait."""

import asyncio
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive

from safelatent import events
from safelatent.connecting import connect_async
from safelatent.errors import QueueUnavailable
from safelatent.events import News
from safelatent.jobs import Jobs
from safelatent.schema import Generation, Place

log = logging.getLogger("uvicorn.error")

MAX_WAIT_S = 300
CANCEL = "cancel-on-disconnect"
WAIT = re.compile(r'wait\s*=\s*("?)0*([0-9]+)\1', re.IGNORECASE)


def preferred_wait(prefer: list[str]) -> int | None:
    """The N of the first `wait=N` in the Prefer headers (RFC 7240), at most `MAX_WAIT_S`.

    A preference that cannot be read is ignored, as the RFC has it; None means no wait.
    """
    for preference in _preferences(prefer):
        if found := WAIT.fullmatch(preference):
            return min(int(found[2][:9]), MAX_WAIT_S)
    return None


def prefers_cancel(prefer: list[str]) -> bool:
    """Whether the Prefer headers ask that hanging up cancels the generation."""
    return CANCEL in (preference.lower() for preference in _preferences(prefer))


def _preferences(prefer: list[str]) -> Iterator[str]:
    for preference in ",".join(prefer).split(","):
        yield preference.split(";")[0].strip()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # the body, which is read or was not wanted


@dataclass(eq=False)
class Mailbox:
    """What one request has not yet read of its generation's news: of each kind the latest."""

    unread: dict[str, tuple[str, News]] = field(default_factory=dict)
    """News with their stream ids, oldest first."""
    queued: Generation | None = None
    """The generation while its place in the queue is news."""
    place: Place | None = None
    position: int | None = None
    """The last that was brought: the same one again is no news, and must not break a silence."""
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by all news; those who wait for the end only are woken by `finished` alone."""

    def put(self, stream_id: str, news: News) -> None:
        if news.event == "finished":
            return self.finish()
        self.unread.pop(news.key, None)
        self.unread[news.key] = stream_id, news
        self.news.set()

    def take(self) -> list[tuple[str, News]]:
        """What is unread, which then is read."""
        unread, self.unread = self.unread, {}
        return list(unread.values())

    def finish(self) -> None:
        self.finished.set()
        self.news.set()


class Waiting:
    """Brings the news of generations to who waits, by one Redis connection for the process."""

    def __init__(self, redis_url: str, jobs: Jobs, look_every_s: float = 5):
        self.redis_url = redis_url
        self.jobs = jobs
        self.look_every_s = look_every_s
        """How often a waiter looks although nobody woke it."""
        self.look_at_queues_every_s = 1.0
        self.released = False
        """Set when the process is about to end."""
        self.position: str | None = None
        """Stream id of the last event that was followed; None before the first connection."""
        self._mailboxes: dict[str, set[Mailbox]] = defaultdict(set)

    async def until_final(self, generation: Generation, tenant: str, seconds: float) -> Generation:
        """Wait until the generation's status is final, at most so long; then as it stands.

        While Redis is away the wait goes on: the caller must not lose an id it has not seen.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + seconds
        with self.mailbox(generation.id) as mailbox:
            while not generation.status.is_terminal:
                mailbox.finished.clear()
                with suppress(QueueUnavailable):
                    generation = await run_in_threadpool(self.jobs.fetch, generation.id, tenant)
                left = deadline - clock()
                if generation.status.is_terminal or left <= 0 or self.released:
                    break
                with suppress(TimeoutError):
                    await asyncio.wait_for(mailbox.finished.wait(), min(left, self.look_every_s))
        return generation

    async def hold(
        self, generation: Generation, tenant: str, seconds: float, receive: Receive
    ) -> Generation | None:
        """As `until_final`, but for no longer than the caller does: None once it has hung up."""
        end = asyncio.ensure_future(self.until_final(generation, tenant, seconds))
        gone = asyncio.ensure_future(_hung_up(receive))
        try:
            await asyncio.wait((end, gone), return_when=asyncio.FIRST_COMPLETED)
            return end.result() if end.done() else None
        finally:
            end.cancel()
            gone.cancel()

    def release(self) -> None:
        """Let every request that waits answer now: the process is about to end."""
        self.released = True
        for mailboxes in self._mailboxes.values():
            for mailbox in mailboxes:
                mailbox.finish()

    async def follow(self) -> None:
        """Wake waiters as generations finish, for ever; after an outage go on where it broke."""
        connection = connect_async(self.redis_url, socket_timeout=5, socket_connect_timeout=5)
        pause_s = 0.1
        async with connection:
            while True:
                try:
                    self.position = self.position or await events.last(connection)
                    async for news in events.follow(connection, self.position):
                        self._deliver(*news)
                        pause_s = 0.1
                except (RedisError, OSError) as error:
                    log.warning("cannot follow events, trying again: %s", error)
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, 5)
                except Exception:
                    log.exception("an event of a kind that this service does not know; going on")
                    self.position = None
                    await asyncio.sleep(pause_s)

    async def follow_queues(self) -> None:
        """Tell who watches a queued generation of its place, for ever: one look for all."""
        while True:
            await asyncio.sleep(self.look_at_queues_every_s)
            queued = {
                id: mailbox.queued
                for id, mailboxes in self._mailboxes.items()
                for mailbox in mailboxes
                if mailbox.queued is not None
            }
            if not queued:
                continue
            try:
                places = await run_in_threadpool(self.jobs.places, queued.values())
            except QueueUnavailable:
                continue
            for id in queued.keys() & places.keys() & self._mailboxes.keys():
                for mailbox in self._mailboxes[id]:
                    if mailbox.position != places[id].position:
                        mailbox.place, mailbox.position = places[id], places[id].position
                        mailbox.news.set()

    def _deliver(self, stream_id: str, news: dict[str, News]) -> None:
        self.position = stream_id
        for id in news.keys() & self._mailboxes.keys():
            for mailbox in self._mailboxes[id]:
                mailbox.put(stream_id, news[id])

    @contextmanager
    def mailbox(self, id: str) -> Iterator[Mailbox]:
        """Where the news of a generation come from now on."""
        mailbox = Mailbox()
        self._mailboxes[id].add(mailbox)
        try:
            yield mailbox
        finally:
            self._mailboxes[id].discard(mailbox)
            if not self._mailboxes[id]:
                del self._mailboxes[id]
