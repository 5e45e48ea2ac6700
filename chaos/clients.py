"""Clients over HTTP that never give up, and the audit of what they were told.

They know the contract and nothing else: an Idempotency-Key makes a request safe to repeat, an id
can be asked for, a stream goes on after Last-Event-ID.
"""

import asyncio
import hashlib
import io
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from safelatent import webhooks
from tests.service.receiver import SECRET, Receiver

ENDED = ("succeeded", "failed", "cancelled")
WAYS = ("poll", "wait", "stream")
CALLED_S = 120
"""How long a webhook may take after the last end: a deliverer that is killed owes it for 35 s."""


@dataclass
class Told:
    """What a client was told of one request of its."""

    body: dict[str, Any]
    way: str
    id: str = ""
    ends: list[dict[str, Any]] = field(default_factory=list)
    """Each time that it was told of an end."""
    event_ids: list[str] = field(default_factory=list)


class Clients:
    """`count` of them share `n` requests among them, and go on until it is `enough`."""

    def __init__(
        self,
        urls: list[str],
        receiver: Receiver,
        n: int,
        count: int,
        seed: int,
        enough: Callable[[], bool] = lambda: True,
    ):
        self.urls, self.n, self.count, self.enough = urls, n, count, enough
        self.receiver = receiver
        """Of webhooks; every fifth call gets a 500 at first."""
        receiver.answers = [500, 204, 204, 204, 204] * 10_000
        self.random, self.bodies = random.Random(seed), random.Random(seed)
        self.told: list[Told] = []
        self.done = 0
        self.failed: list[str] = []
        """Requests that reached a frontend and got no answer, or an error of the server's."""

    def _next(self) -> Told:
        i = len(self.told)
        if i % 5 == 4:  # the same as an earlier one: the same picture must come
            body = self.bodies.choice(self.told).body
        else:
            body = {
                "prompt": f"a cat of kind {i}",
                "seed": i,
                "steps": self.bodies.choice((5, 20, 60)),
                "scheduler": "ddim",
                "safety": {"level": "max"},
                "n": self.bodies.choice((1, 1, 2)),
            }
            if i % 4 == 0:
                body["webhook"] = self.receiver.url
        self.told.append(Told(body, WAYS[i % 3]))
        return self.told[-1]

    async def run(self) -> None:
        async def client() -> None:
            async with http_client() as http:
                while len(self.told) < self.n or not self.enough():
                    told = self._next()
                    await self._accept(http, told, f"key-{len(self.told)}")
                    await getattr(self, f"_{told.way}")(http, told)
                    self.done += 1

        await asyncio.gather(*(client() for _ in range(self.count)))

    async def _ask(self, http: httpx.AsyncClient, method: str, path: str, **more: Any) -> Any:
        """Until some frontend answers; what is not our fault is tried again."""
        while True:
            url = self.random.choice(self.urls)
            try:
                answer = await http.request(method, url + path, **more)
            except httpx.ConnectError:
                await asyncio.sleep(0.1)
                continue
            except httpx.TransportError as error:
                self.failed.append(f"{method} {path}: {error!r}")
                await asyncio.sleep(0.1)
                continue
            if answer.status_code < 500 and answer.status_code not in (409, 429):
                answer.raise_for_status()
                return answer
            self.failed.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
            await asyncio.sleep(0.1)

    async def _accept(self, http: httpx.AsyncClient, told: Told, key: str) -> None:
        headers = {"Idempotency-Key": key}
        if told.way == "wait":
            headers["Prefer"] = "wait=5"
        answer = await self._ask(http, "POST", "/generate", json=told.body, headers=headers)
        told.id = answer.json()["id"]
        self._note(told, answer.json())

    def _note(self, told: Told, generation: dict[str, Any]) -> None:
        if generation["status"] in ENDED:
            told.ends.append(generation)

    async def _poll(self, http: httpx.AsyncClient, told: Told) -> None:
        while not told.ends:
            await asyncio.sleep(0.2)
            answer = await self._ask(http, "GET", f"/generations/{told.id}")
            self._note(told, answer.json())

    _wait = _poll

    async def _stream(self, http: httpx.AsyncClient, told: Told) -> None:
        while not told.ends:
            headers = {"Accept": "text/event-stream"}
            if told.event_ids:
                headers["Last-Event-ID"] = told.event_ids[-1]
            path = f"/generations/{told.id}/events"
            event = ""
            try:
                url = self.random.choice(self.urls) + path
                async with http.stream("GET", url, headers=headers) as answer:
                    if answer.status_code == 204:
                        break  # all was seen
                    async for line in answer.aiter_lines():
                        name, _, value = line.partition(": ")
                        if name == "event":
                            event = value
                        elif name == "id":
                            told.event_ids.append(value)
                        elif name == "data" and event in ("finished", "snapshot"):
                            self._note(told, json.loads(value))
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)


def http_client() -> httpx.AsyncClient:
    """A connection for each request, as a load balancer makes when a frontend goes."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=30, trust_env=False, limits=limits)


async def audit(
    clients: Clients, may_fail: Callable[[str, str], bool]
) -> tuple[Counter[str], list[str]]:
    """Counts, and what is wrong: everything is asked for once more, and must be as it was told.

    `may_fail` says whether a generation, by its id, may have ended with that problem.
    """
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    pictures: dict[str, list[np.ndarray]] = {}
    ids = [told.id for told in clients.told]
    if len(set(ids)) != len(ids):
        wrong.append("two requests were given one id")
    called = await _called(clients, counts, wrong)
    async with http_client() as http:
        for told in clients.told:
            final = (await clients._ask(http, "GET", f"/generations/{told.id}")).json()
            counts[final["status"]] += 1
            if "webhook" in told.body and told.id not in called:
                wrong.append(f"{told.id}: no webhook came")
            for end in told.ends + called.get(told.id, []):
                if (end["status"], _shas(end)) != (final["status"], _shas(final)):
                    wrong.append(f"{told.id} ended twice")
            if final["status"] != "succeeded":
                problem = (final["error"] or {}).get("type", "").removeprefix("/problems/")
                counts[problem] += 1
                if final["status"] != "failed" or not may_fail(told.id, problem):
                    wrong.append(f"{told.id} ended as {final['status']}: {final['error']}")
                continue
            if not all(map(_follows, told.event_ids, told.event_ids[1:])):
                wrong.append(f"{told.id}: events out of order or repeated: {told.event_ids}")
            if told.way == "stream" and not told.ends:
                wrong.append(f"{told.id}: its stream never told of the end")
            made = []
            for image in final["images"]:
                content = (await clients._ask(http, "GET", image["url"])).content
                counts["images"] += 1
                if hashlib.sha256(content).hexdigest() != image["sha256"]:
                    wrong.append(f"{told.id}: image {image['index']} is not what was reported")
                made.append(np.asarray(Image.open(io.BytesIO(content))).astype(int))
            first = pictures.setdefault(json.dumps(told.body), made)
            # Float tolerance: the same seed in another batch may differ in the last bit.
            if max(abs(one - other).max() for one, other in zip(first, made, strict=True)) > 1:
                wrong.append(f"{told.id}: the same seed gave another picture")
    return counts, wrong


async def _called(
    clients: Clients, counts: Counter[str], wrong: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """The generations that webhooks told of, by id, once all have come or time is up."""
    wanted = {told.id for told in clients.told if "webhook" in told.body}
    called: dict[str, list[dict[str, Any]]] = {}
    seen = 0
    deadline = time.monotonic() + CALLED_S
    while True:
        for _, headers, body in clients.receiver.calls[seen:]:
            seen += 1
            sent_at = float(headers["webhook-timestamp"])
            generation = webhooks.verify(body, headers, SECRET, now=sent_at)
            if headers["webhook-id"] != f"msg_{generation.id}":
                wrong.append(f"{generation.id}: a webhook is called {headers['webhook-id']}")
            called.setdefault(str(generation.id), []).append(generation.model_dump(mode="json"))
        if wanted <= called.keys() or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.2)
    counts["webhooks"], counts["webhook calls"] = len(called), seen
    return called


def _shas(generation: dict[str, Any]) -> list[str]:
    return [image["sha256"] for image in generation["images"]]


def _follows(before: str, after: str) -> bool:
    """Whether an event may come after another: later in the stream, or another place in the queue,
    which stands after the dot and may change both ways."""
    was, now = (tuple(map(int, re.split("[-.]", id)[:2])) for id in (before, after))
    return was < now or (was == now and "." in after and before != after)
