"""Holding the line: what `Prefer: wait=N` asks for, and who wakes the request that waits."""

import asyncio
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import redis.asyncio
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from safelatent import events
from safelatent.errors import QueueUnavailable
from safelatent.jobs import Jobs
from safelatent.schema import Generation

log = logging.getLogger("uvicorn.error")

MAX_WAIT_S = 300
WAIT = re.compile(r'wait\s*=\s*("?)0*([0-9]+)\1', re.IGNORECASE)


def preferred_wait(prefer: list[str]) -> int | None:
    """The N of the first `wait=N` in the Prefer headers (RFC 7240), at most `MAX_WAIT_S`.

    A preference that cannot be read is ignored, as the RFC has it; None means no wait.
    """
    for preference in ",".join(prefer).split(","):
        if found := WAIT.fullmatch(preference.split(";")[0].strip()):
            return min(int(found[2][:9]), MAX_WAIT_S)
    return None


class Waiting:
    """Wakes whoever waits for a generation, by one Redis connection for the process."""

    def __init__(self, redis_url: str, jobs: Jobs, look_every_s: float = 5):
        self.redis_url = redis_url
        self.jobs = jobs
        self.look_every_s = look_every_s
        """How often a waiter looks although nobody woke it."""
        self._waiters: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._released = False

    async def until_final(self, generation: Generation, tenant: str, seconds: float) -> Generation:
        """Wait until the generation's status is final, at most so long; then as it stands.

        While Redis is away the wait goes on: the caller must not lose an id it has not seen.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + seconds
        with self._waiter(generation.id) as woken:
            while not generation.status.is_terminal:
                woken.clear()
                with suppress(QueueUnavailable):
                    generation = await run_in_threadpool(self.jobs.fetch, generation.id, tenant)
                left = deadline - clock()
                if generation.status.is_terminal or left <= 0 or self._released:
                    break
                with suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), min(left, self.look_every_s))
        return generation

    def release(self) -> None:
        """Let every request that waits answer now: the process is about to end."""
        self._released = True
        for waiters in self._waiters.values():
            for woken in waiters:
                woken.set()

    async def follow(self) -> None:
        """Wake waiters as generations finish, for ever; after an outage go on where it broke."""
        connection = redis.asyncio.Redis.from_url(
            self.redis_url, socket_timeout=5, socket_connect_timeout=5
        )
        last: str | None = None
        pause_s = 0.1
        async with connection:
            while True:
                try:
                    last = last or await events.last(connection)
                    async for stream_id, _, finished in events.follow(connection, last):
                        last, pause_s = stream_id, 0.1
                        for id in finished:
                            for woken in self._waiters.get(id, ()):
                                woken.set()
                except (RedisError, OSError) as error:
                    log.warning("cannot follow events, trying again: %s", error)
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, 5)
                except Exception:
                    log.exception("an event of a kind that this service does not know; going on")
                    last = None
                    await asyncio.sleep(pause_s)

    @contextmanager
    def _waiter(self, id: str) -> Iterator[asyncio.Event]:
        woken = asyncio.Event()
        self._waiters[id].add(woken)
        try:
            yield woken
        finally:
            self._waiters[id].discard(woken)
            if not self._waiters[id]:
                del self._waiters[id]
