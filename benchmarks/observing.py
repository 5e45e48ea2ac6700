"""What seeing inside costs: of a denoiser step, and of a request to the frontend.

Both are measured on nothing else: an engine's calls that return at once, an application that
answers at once. No line is written, because a log is wanted with and without metrics.
"""

import asyncio
import logging
import time
from types import SimpleNamespace
from typing import Any

from redis import Redis

from safelatent.jobs import Jobs
from service.metrics import Metrics
from service.observing import Observed
from worker.observing import Observer

CALLS = 20_000


def run(model: str, repeats: int) -> list[dict[str, Any]]:
    logging.getLogger("service.http").setLevel(logging.ERROR)
    step, request = [], []
    for _ in range(repeats):
        step.append(_steps(watched=True) - _steps(watched=False))
        request.append(asyncio.run(_requests(True)) - asyncio.run(_requests(False)))
    return [
        {"what": "metrics, more a denoiser step", "value": min(step), "unit": "us"},
        {"what": "metrics, more a request over HTTP", "value": min(request), "unit": "us"},
    ]


def _steps(watched: bool) -> float:
    nothing: Any = lambda *arguments: None  # noqa: E731
    card = SimpleNamespace(id="bench", revision="0")
    family = SimpleNamespace(model=card, encode=nothing, decode=nothing, predict=nothing)
    checks = SimpleNamespace(judge=nothing)
    engine: Any = SimpleNamespace(family=family, checks=checks, after_step=nothing)
    if watched:
        Observer().watch(engine)
    rows, images = [None] * 24, [SimpleNamespace(owner="a", call=1)] * 8
    began = time.perf_counter()
    for _ in range(CALLS):
        family.predict(rows)
        engine.after_step(images)
    return 1e6 * (time.perf_counter() - began) / CALLS


async def _requests(watched: bool) -> float:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["route"] = SimpleNamespace(path_format="/generations/{id}")
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None: ...

    metrics = Metrics(Jobs(Redis.from_url("unix:///nowhere")))
    called: Any = Observed(app, metrics) if watched else app
    began = time.perf_counter()
    for _ in range(CALLS):
        await called({"type": "http", "method": "GET"}, None, send)
    return 1e6 * (time.perf_counter() - began) / CALLS
