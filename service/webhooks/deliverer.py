"""Looks at what is owed, and calls who waits for it: at least once, and with patience.

What has ended is read from the queue, never told by a worker: a worker that lost its lease cannot
have anything sent.
"""

import asyncio
import hmac
import logging
import os
import random
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import certifi
import httpcore
from redis.exceptions import RedisError

from safelatent import errors, events, webhooks
from safelatent.connecting import connect_async
from safelatent.deliveries import LOOK_S, Owed
from safelatent.jobs import Jobs, redis_errors
from safelatent.schema import Generation
from service.watching import linked
from service.webhooks.addresses import Allowed, PublicOnly, Refused, Resolve, checked, sealed
from service.webhooks.settings import Settings

log = logging.getLogger(__name__)

AT_ONCE = 64
AT_ONCE_PER_HOST = 8
POLL_S = 0.5
GONE = 410


class Undeliverable(Exception):
    """An attempt that failed before the receiver could answer; the message is for the tenant."""


class Deliverer:
    """One process' deliveries. `secrets_of` gives a tenant's secrets; the first seals."""

    def __init__(
        self,
        settings: Settings,
        jobs: Jobs,
        secrets_of: Callable[[str], Sequence[str]],
        resolve: Resolve | None = None,
    ):
        self.settings = settings
        self.jobs = jobs
        self.owed = Owed(jobs.connection)
        self.secrets_of = secrets_of
        self.look_s: float = LOOK_S
        # An attempt ends long before its lease does.
        self.lease_s = 2 * settings.webhook_timeout_s + 5
        self.allowed = Allowed.parse(settings.webhook_allow)
        self._backend = PublicOnly(self.allowed, resolve)
        self._ssl = ssl.create_default_context(
            cafile=os.environ.get("SSL_CERT_FILE") or certifi.where()
        )
        self._at_host: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until `stop`; then end what was begun."""
        followers = [asyncio.create_task(self._follow()), asyncio.create_task(self._on(stop))]
        while not stop.is_set():
            self._news.clear()
            free = AT_ONCE - len(self._tasks)
            try:
                lease, ids = await asyncio.to_thread(self.owed.take, free, self.lease_s)
            except RedisError as error:
                log.warning("cannot look for webhooks, trying again: %s", error)
                await asyncio.sleep(POLL_S)
                continue
            for id in ids:
                task = asyncio.create_task(self._guarded(id, lease))
                self._tasks.add(task)
                task.add_done_callback(self._done)
            if not ids:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), POLL_S)
        if self._tasks:
            await asyncio.wait(self._tasks)
        for follower in followers:
            while not follower.done():  # asyncio and redis-py can swallow a cancellation
                follower.cancel()
                await asyncio.wait([follower], timeout=0.1)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._news.set()

    async def _on(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._news.set()

    async def _follow(self) -> None:
        """Make what ends due at once. What is missed here is found when it is looked at."""
        while True:
            try:
                async with connect_async(
                    self.settings.redis_url, socket_timeout=5, socket_connect_timeout=5
                ) as connection:
                    start = await events.last(connection)
                    async for _, told in events.follow(connection, start):
                        for id in (id for id, news in told.items() if news.event == "finished"):
                            await asyncio.to_thread(self._ended, id)
            except (RedisError, OSError, errors.QueueUnavailable) as error:
                log.warning("cannot follow events, trying again: %s", error)
            except Exception:
                log.exception("an event of a kind that is not known; going on")
            await asyncio.sleep(1)

    def _ended(self, id: str) -> None:
        with suppress(errors.NotFound):
            ended = self.jobs.ended(id)
            if ended and ended[2].webhook:
                with redis_errors():
                    self.owed.ended(id)
                self._news.set()

    async def _guarded(self, id: str, lease: str) -> None:
        try:
            await self._look(id, lease)
        except (RedisError, errors.QueueUnavailable) as error:
            log.warning("webhook of %s: Redis does not answer, later: %s", id, error)
        except Exception:
            log.exception("webhook of %s: a defect, later", id)

    async def _look(self, id: str, lease: str) -> None:
        try:
            ended = await asyncio.to_thread(self.jobs.ended, id)
        except errors.NotFound:  # deleted, or forgotten after its time
            await self._move(id, lease, None)
            return
        if ended is None:
            await self._move(id, lease, self.look_s)
            return
        tenant, seal, generation = ended
        if generation.webhook is None:  # forged
            await self._move(id, lease, None)
            return
        host = generation.webhook.url.partition("://")[2].partition("/")[0]
        if self._at_host[host] >= AT_ONCE_PER_HOST:  # others need not wait behind a slow one
            await self._move(id, lease, random.uniform(1, 3))
            return
        self._at_host[host] += 1
        try:
            await self._attempt(id, lease, tenant, seal, generation)
        finally:
            self._at_host[host] -= 1

    async def _attempt(
        self, id: str, lease: str, tenant: str, seal: str, generation: Generation
    ) -> None:
        delivery, generation.webhook = generation.webhook, None
        assert delivery is not None
        number = delivery.attempts + 1
        held = await self._move(id, lease, self.lease_s, ended=1, attempts=number)
        if held is None:
            return  # it came due at the same moment by another way
        status, error = None, ""
        try:
            status = await self._send(delivery.url, tenant, seal, generation)
            if not 200 <= status < 300:
                error = f"the receiver answered {status}"
                error += ", a redirect, which is not followed" if 300 <= status < 400 else ""
        except Undeliverable as failed:
            error = str(failed)
        except Exception:
            log.exception("webhook of %s: a defect", id)
            error = "the service met a defect"
        retries = self.settings.webhook_retry_s
        state: dict[str, str | int] = {
            "last_status": status or "",
            "last_error": error,
            "next_attempt_at": "",
        }
        if not error:
            outcome, wait = "delivered", None
        elif status == GONE or number > len(retries):
            outcome, wait = "failed", None
        else:
            outcome, wait = "retried", retries[number - 1] * random.uniform(0.9, 1.1)
            at = datetime.now(UTC) + timedelta(seconds=wait)
            state["next_attempt_at"] = at.isoformat()
        if outcome != "retried":
            state["status"] = outcome
        log.info("webhook of %s: attempt %d: %s %s", id, number, outcome, error)
        await self._move(id, held, wait, **state)
        await asyncio.to_thread(self.owed.count, outcome)

    async def _send(self, url: str, tenant: str, seal: str, generation: Generation) -> int:
        """POST the event; returns the HTTP status. The answer's body is not read."""
        secrets = self.secrets_of(tenant)
        if not secrets:
            raise Undeliverable("the service has no secret to sign it with any more")
        if not any(
            hmac.compare_digest(sealed(url, each).encode(), seal.encode()) for each in secrets
        ):
            raise Undeliverable("it was accepted under another secret, or by nobody")
        event = webhooks.Event(
            type=f"generation.{generation.status}",  # type: ignore[arg-type]
            timestamp=generation.finished_at or datetime.now(UTC),
            data=linked(generation),
        )
        body = event.model_dump_json().encode()
        try:
            target = checked(url, self.allowed)
            headers = {
                "host": target.netloc.decode(),
                "content-type": "application/json",
                "user-agent": "safelatent-webhooks/1",
                **webhooks.signed(f"msg_{generation.id}", body, secrets),
            }
            async with (
                asyncio.timeout(self.settings.webhook_timeout_s),
                # One connection a call: each is judged anew, and none waits for another.
                httpcore.AsyncConnectionPool(self._ssl, network_backend=self._backend) as pool,
                pool.stream(
                    "POST",
                    httpcore.URL(
                        scheme=target.raw_scheme,
                        host=target.raw_host,
                        port=target.port,
                        target=target.raw_path,
                    ),
                    headers=list(headers.items()),
                    content=body,
                    extensions={"timeout": {"connect": self.settings.webhook_timeout_s / 3}},
                ) as response,
            ):
                return response.status
        except Refused as error:
            raise Undeliverable(f"the URL {error}") from error
        except TimeoutError as error:
            limit = self.settings.webhook_timeout_s
            raise Undeliverable(f"the receiver did not answer within {limit:g} s") from error
        except (OSError, httpcore.NetworkError, httpcore.TimeoutException) as error:
            raise Undeliverable(f"cannot connect: {error or type(error).__name__}") from error
        except httpcore.ProtocolError as error:
            raise Undeliverable("the receiver hung up without an HTTP answer") from error

    async def _move(
        self, id: str, lease: str, in_s: float | None, **state: str | int
    ) -> str | None:
        return await asyncio.to_thread(self.owed.move, id, lease, in_s, **state)
