"""What one tenant's flood costs another: real Redis, slots and claims, an engine that sleeps.

The flood is 20 times its share, of jobs of many lengths, and all queued before; the other tenant
asks for a part of its own share, now and then (a Poisson process). Then, whether ETAs came true,
and what a claim costs.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from redis import Redis

from benchmarks.service import until
from safelatent.jobs import Jobs
from safelatent.schema import GenerationRequest, Model, Result, Status
from safelatent.turns import Share
from worker import tasks
from worker.isolation import Isolation
from worker.meter import Meter
from worker.observing import Observer
from worker.slots import Slots

SLOTS = 8
STEP_S = 0.05
STEPS = 20
PHASE_S = 30
CARD = Model(
    id="sleeper",
    revision="1",
    family="none",
    prediction_type="epsilon",
    width=512,
    height=512,
    size_multiple=8,
    scheduler="ddim",
    max_tokens=77,
)


class Sleeper:
    """A desk whose engine takes a fixed time a step, however many are in the batch."""

    def __init__(self, jobs: Jobs):
        self.jobs = jobs
        self.meter = Meter()
        self.observer = Observer()
        self.isolation = Isolation()

    def cancel(self, id: str) -> None: ...

    def generate(self, id: str, request: GenerationRequest, created_at: datetime) -> Result:
        image: Any = SimpleNamespace(spec=request, calls=request.steps)
        for _ in range(request.steps):
            time.sleep(STEP_S)
            self.meter.count([image])
        return Result(status=Status.SUCCEEDED, request=request, model=CARD)


def run(model: str, repeats: int) -> list[dict[str, Any]]:
    with redis() as connection:
        jobs = Jobs(connection)
        tasks.desk = Sleeper(jobs)  # type: ignore[assignment]
        slots = Slots(SLOTS, CARD, tasks.desk, "bench")  # type: ignore[arg-type]
        slots.start()
        rate, chance = SLOTS / (STEPS * STEP_S), random.Random(2)
        alone = waits(jobs, PHASE_S, rate / 4)
        for _ in range(round(PHASE_S * 20 * rate / 2)):
            submit(jobs, "flood", chance.randrange(STEPS // 2, 3 * STEPS // 2))
        beside = {part: waits(jobs, PHASE_S, rate / 2 * part) for part in (0.25, 0.5)}
        drop_all(connection)
        at_once, later = promises(jobs)
        slots.close()
        slots.join()
        rows = [row("   p95 from request to result, alone", p(95, alone), "s")]
        for part, spent in beside.items():
            for at in (50, 95):
                said = f"a  p{at} beside the flood / alone, asking for {part:.0%} of its share"
                rows.append(row(said, p(at, spent) / p(at, alone)))
        for at in (5, 50, 95):
            rows.append(row(f"b  actual / eta_s as it is queued, p{at}", p(at, at_once)))
            rows.append(row(f"b  actual / eta_s once all are queued, p{at}", p(at, later)))
        for tenants in (1, 10, 100, 500):
            for held in (False, True):
                said = "all but one at max_running" if held and tenants > 1 else "all may start"
                if held <= (tenants > 1):
                    cost = claim_us(connection, tenants, held)
                    rows.append(row(f"c  claim, {tenants} tenants, {said}", cost, "us"))
        rows.append(row("c  a PING beside it", cpu_us(connection, connection.ping), "us"))
        return rows


def submit(jobs: Jobs, tenant: str, steps: int, share: Share = Share()) -> Any:  # noqa: B008
    body = {"model": CARD.id, "prompt": "a cat", "seed": 1, "width": 512, "height": 512}
    request = GenerationRequest.model_validate({**body, "steps": steps, "safety": {"level": "max"}})
    return jobs.submit(request, tenant, share=share)


def waits(jobs: Jobs, seconds: float, rate: float) -> list[float]:
    """From request to result, of a tenant that asks now and then."""
    chance, ids = random.Random(1), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ids.append(submit(jobs, "quiet", STEPS).id)
        time.sleep(chance.expovariate(rate))
    return [took(jobs, id, "quiet") for id in ids]


def took(jobs: Jobs, id: str, tenant: str) -> float:
    while not (done := jobs.fetch(id, tenant)).status.is_terminal:
        time.sleep(0.2)
    assert done.finished_at
    return (done.finished_at - done.created_at).total_seconds()


def promises(jobs: Jobs) -> tuple[list[float], list[float]]:
    """How long jobs took, over what eta_s said as they were queued, and when no more came.

    Two tenants share 1 to 3. What is queued after a promise, an eta_s cannot know.
    """
    chance, promised = random.Random(3), []
    for i in range(200):
        tenant, weight = (("one", 1), ("three", 3))[i % 2]
        said = submit(jobs, tenant, chance.randrange(STEPS // 2, 3 * STEPS // 2), Share(weight))
        promised.append((said, tenant))
        time.sleep(0.02)
    time.sleep(1)
    asked_at = datetime.now(UTC)
    later = [(jobs.fetch(said.id, tenant), tenant) for said, tenant in promised]
    at_once = [took(jobs, said.id, tenant) / said.eta_s for said, tenant in promised if said.eta_s]
    since = []
    for said, tenant in later:
        if said.position is not None and said.eta_s:
            passed_s = (asked_at - said.created_at).total_seconds()
            since.append((took(jobs, said.id, tenant) - passed_s) / said.eta_s)
    return at_once, since


def claim_us(connection: Redis, tenants: int, held: bool) -> float:
    """One claim, and the fetch of its job, with so many tenants that have jobs queued."""
    connection.flushall()
    jobs = Jobs(connection)
    for i in range(tenants):
        share = Share(1, 1 if held and i else None)
        for _ in range(2 if i else 200):
            submit(jobs, f"t{i:03}", STEPS, share)
    if held:
        while connection.zcard(f"rq:wip:{CARD.id}:t{tenants - 1:03}:normal") < 1:
            jobs.turns.claim(CARD.id, "worker-0", 600)
        jobs.turns.claim(CARD.id, "worker-0", 600)
    return cpu_us(connection, lambda: jobs.turns.claim(CARD.id, "worker-0", 600))


def cpu_us(connection: Redis, do: Callable[[], Any]) -> float:
    """Of Redis' own processor time: what else the machine does has no part in it."""

    def spent_s() -> float:
        info = connection.info("cpu")
        return float(info["used_cpu_user"] + info["used_cpu_sys"])

    before = spent_s()
    for _ in range(100):
        do()
    return 1e6 * (spent_s() - before) / 100


def drop_all(connection: Redis) -> None:
    for name in connection.keys("rq:queue:*"):
        connection.delete(name)


def p(percent: int, values: list[float]) -> float:
    return sorted(values)[min(len(values) * percent // 100, len(values) - 1)]


def row(what: str, value: float, unit: str = "") -> dict[str, Any]:
    return {"what": what, "value": value, "unit": unit}


@contextmanager
def redis() -> Iterator[Redis]:
    """A Redis of its own, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"unix://{folder}/redis.sock"
        environment = {**os.environ, "STATE": folder, "REDIS_URL": url}
        command = [sys.executable, "deploy/local/embedded_redis.py"]
        process = subprocess.Popen(command, env=environment)
        try:
            until(lambda: Path(folder, "redis.sock").exists(), [process])
            with Redis.from_url(url) as connection:
                yield connection
        finally:
            process.terminate()
            process.wait(60)
