"""Whose turn it is: the order in which a real Redis gives out jobs, whoever queued how many."""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job, JobStatus
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import utcformat

from safelatent import events
from safelatent.forecast import Pace, left_s
from safelatent.jobs import Jobs
from safelatent.queues import PRIORITIES, queue
from safelatent.schema import GenerationRequest, Model, Progress
from safelatent.turns import Share
from tests.service.played import CARD
from worker import leases

LEASE_S = 60


class Line:
    """Tenants who queue, and one worker who claims."""

    def __init__(self, connection: Redis, model: str = "tiny"):
        self.connection = connection
        self.jobs = Jobs(connection)
        self.model = model

    def submit(
        self,
        tenant: str,
        count: int = 1,
        weight: float = 1,
        max_running: int | None = None,
        **changed: object,
    ) -> list[str]:
        body = {"model": self.model, "prompt": "a cat", "seed": 1, "width": 64, "height": 64}
        request = GenerationRequest.model_validate(body | changed)
        share = Share(weight, max_running)
        return [self.jobs.submit(request, tenant, share=share).id for _ in range(count)]

    def claim(self) -> Job | None:
        claimed = self.jobs.turns.claim(self.model, "worker-0", LEASE_S)
        return claimed and claimed[0]

    def claims(self, count: int) -> list[Job]:
        claimed = [self.claim() for _ in range(count)]
        return [job for job in claimed if job]

    def tenants(self, count: int) -> Counter[str]:
        """Whose jobs the next ones are."""
        return Counter(job.meta["tenant"] for job in self.claims(count))

    def started(self, tenant: str) -> StartedJobRegistry:
        name = queue(self.model, tenant, "normal", self.connection).name
        return StartedJobRegistry(name, self.connection, serializer=JSONSerializer)

    def end(self, job: Job) -> None:
        """As RQ does, by another way."""
        job.delete()

    def lapse(self) -> None:
        """Every lease runs out."""
        for key in self.connection.keys("rq:execution:*"):
            self.connection.delete(key)

    def sweep(self) -> None:
        """As a worker does."""
        for each in self.jobs.turns.held(self.model):
            leases.hand_back_lapsed(each)
        self.jobs.turns.tidy(self.model)


@pytest.fixture
def line(connection: Redis) -> Line:
    return Line(connection)


@pytest.mark.parametrize(("weight", "shares"), [(1, (20, 20)), (3, (10, 30)), (0.25, (32, 8))])
def test_who_floods_gets_its_share_and_no_more(line: Line, weight: float, shares: tuple) -> None:
    line.submit("flood", 200)
    line.submit("other", 40, weight)
    got = line.tenants(40)
    assert abs(got["flood"] - shares[0]) <= 1
    assert abs(got["other"] - shares[1]) <= 1


def test_what_counts_is_the_cost_and_not_the_number(line: Line) -> None:
    line.submit("large", 40, steps=100, n=2)
    line.submit("small", 40, steps=50)
    assert abs(line.tenants(30)["small"] - 24) <= 1


def test_who_was_idle_has_saved_up_nothing_and_owes_nothing(line: Line) -> None:
    line.submit("early", 2)
    line.claims(2)
    line.submit("busy", 100)
    line.claims(50)
    line.submit("early", 20)
    line.submit("new", 20)
    got = line.tenants(15)
    assert all(abs(got[tenant] - 5) <= 1 for tenant in ("busy", "early", "new"))


def test_who_leaves_and_comes_back_at_once_has_not_shaken_off_what_it_used(line: Line) -> None:
    line.submit("steady", 100)
    got: Counter[str] = Counter()
    for _ in range(20):  # never more than one job in its queue
        if not line.jobs.turns.queued("tiny", "drips"):
            line.submit("drips", steps=100)
        got += line.tenants(1)
    assert abs(got["drips"] - 7) <= 1


def test_a_tenants_jobs_go_by_priority_and_then_by_age(line: Line) -> None:
    low, normal, high = (line.submit("a", 2, priority=p) for p in ("low", "normal", "high"))
    assert [job.id for job in line.claims(9)] == [*high, *normal, *low]


def test_a_tenant_runs_no_more_than_it_may_and_saves_up_nothing_by_that(line: Line) -> None:
    line.submit("held", 30, max_running=2)
    first = line.claims(5)
    assert len(first) == 2
    line.submit("free", 30)
    assert line.tenants(10) == {"free": 10}
    line.submit("held", 30, max_running=None)
    assert abs(line.tenants(10)["held"] - 5) <= 1
    line.submit("held", max_running=13)
    while line.claim():
        pass
    running = line.started("held")
    assert running.get_job_count(cleanup=False) == 13
    line.end(first[0])
    assert line.tenants(2) == {"held": 1}


@pytest.mark.parametrize("model", ["runwayml/sd-v1.5", "a:b", "100%s"])
def test_any_model_has_a_queue(connection: Redis, model: str) -> None:
    line = Line(connection, model)
    assert line.submit("acme") == [job.id for job in line.claims(2)]


def test_a_job_that_is_queued_many_times_is_started_once(line: Line, connection: Redis) -> None:
    """Nobody else may clean up, but an operator's `rq info` tries (RQ's cleaners have no lock)."""
    ids = line.submit("a", 6)
    line.claims(6)
    line.lapse()
    cleaners, together = 6, threading.Barrier(6)

    def clean(_: int) -> None:
        registry = line.started("a")
        together.wait()
        registry.cleanup()

    with ThreadPoolExecutor(cleaners) as pool:
        list(pool.map(clean, range(cleaners)))
    stock = Queue(queue("tiny", "a", "normal", connection).name, connection)
    for id in ids * 2:
        stock.push_job_id(id)
    assert len(stock.job_ids) == 12
    line.sweep()  # finds what RQ has queued by itself
    assert sorted(job.id for job in line.claims(40)) == sorted(ids)
    assert stock.job_ids == []


def test_a_cleaner_that_comes_late_starts_nothing_again(line: Line, connection: Redis) -> None:
    """It writes `queued` over a job that somebody has taken up meanwhile, and queues it."""
    [id] = line.submit("a")
    line.claim()
    job = Job.fetch(id, connection, serializer=JSONSerializer)
    queue("tiny", "a", "normal", connection)._enqueue_job(job)
    assert job.get_status() == JobStatus.QUEUED
    assert line.claim() is None
    assert job.get_status() == JobStatus.STARTED  # else it would be lost with its worker
    line.lapse()
    line.sweep()
    assert line.claim() is not None


def test_what_a_worker_took_and_died_with_is_queued_again(line: Line, connection: Redis) -> None:
    ids = line.submit("a", 2)
    line.claims(2)
    line.lapse()
    line.sweep()
    assert sorted(job.id for job in line.claims(3)) == sorted(ids)


def test_a_cancelled_job_leaves_its_queue_and_a_forged_one_harms_nobody(
    line: Line, connection: Redis
) -> None:
    cancelled, forged, genuine = line.submit("a", 3)
    line.jobs.cancel(cancelled, "a")
    connection.hset(f"rq:job:{forged}", "created_at", "never")
    assert [job.id for job in line.claims(3)] == [genuine]
    line.lapse()
    line.sweep()
    assert [job.id for job in line.claims(3)] == [genuine]


def test_each_of_many_workers_takes_another_job(line: Line) -> None:
    ids = [id for tenant in "abc" for id in line.submit(tenant, 30)]
    with ThreadPoolExecutor(8) as workers:
        taken = [job for jobs in workers.map(line.claims, [20] * 8) for job in jobs]
    assert sorted(job.id for job in taken) == sorted(ids)


@pytest.mark.parametrize("seed", range(5))
def test_the_position_is_the_place_in_the_order_of_claims(line: Line, seed: int) -> None:
    """With jobs that cost the same for each tenant, and weights that leave no ties."""
    chance = random.Random(seed)
    tenants = {name: (chance.uniform(0.5, 3), chance.choice([20, 50])) for name in "abcd"}
    ids = []
    for round in range(3):
        for name, (weight, steps) in tenants.items():
            for _ in range(chance.randrange(5)):
                priority = chance.choice(PRIORITIES)
                [id] = line.submit(name, 1, weight, steps=steps, priority=priority)
                ids.append((name, id))
        if round < 2:
            line.claims(chance.randrange(4))
    line.jobs.turns.picture("tiny", fresh=True)
    positions = {
        id: generation.position
        for tenant, id in ids
        if (generation := line.jobs.fetch(id, tenant)).position is not None
    }
    order = [job.id for job in line.claims(100)]
    assert [positions[id] for id in order] == list(range(len(order)))


def test_the_eta_is_told_by_the_workers_pace(line: Line) -> None:
    """64 x 64 pixels x 50 steps is 0.2 megapixel-steps."""
    line.submit("a", 7)
    line.claims(7)
    [id] = line.submit("a")
    assert line.jobs.fetch(id, "a").eta_s is None  # nothing was measured
    card = Model.model_validate(CARD.model_dump())
    line.jobs.announce("w1", card, 60, Pace(throughput=0.4, each=0.1, slots=4))
    line.jobs.announce("w2", card, 60, Pace(throughput=0.4, each=0.1, slots=4))
    [last] = line.submit("a", 8)[-1:]
    line.jobs.turns.picture("tiny", fresh=True)
    first, last = (line.jobs.fetch(each, "a").eta_s for each in (id, last))
    assert first == pytest.approx(2.05, abs=0.01)  # a slot is free: its own run
    # The ninth starts when the eighth job that is before it has ended, of which one starts at once.
    assert last == pytest.approx(2.05 + 8 * 0.2048 / 0.8, abs=0.01)


def test_a_running_one_goes_by_the_pace_at_first_and_by_its_own_rate_at_last(line: Line) -> None:
    """0.2048 megapixel-steps at 0.01 a second are 20.5 s."""
    [id] = line.submit("a")
    line.jobs.announce("w1", CARD, 60, Pace(throughput=0.04, each=0.01, slots=4))
    job = line.claim()
    assert job is not None and line.jobs.fetch(id, "a").eta_s is None
    began = datetime.now(UTC) - timedelta(seconds=3)
    line.connection.hset(job.key, "started_at", utcformat(began))
    events.publish_steps(line.connection, {id: Progress(step=1, steps=50)})
    line.jobs.turns.picture("tiny", fresh=True)
    assert line.jobs.fetch(id, "a").eta_s == pytest.approx(0.98 * (0.92 * 20.48 + 4 * 3), rel=0.2)
    assert left_s(spent_s=10, share=0.25, expected_s=1000) == 30
    assert left_s(spent_s=10, share=0.5, expected_s=None) == 10
