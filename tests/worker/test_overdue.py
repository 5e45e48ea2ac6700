"""A queued generation whose deadline passes is told so, though no slot is free to claim it."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis

from safelatent import events
from safelatent.jobs import DEADLINES, Jobs
from safelatent.queues import SafeJob, queues
from safelatent.schema import GenerationRequest, Status
from tests.service.played import CARD
from worker import leases, overdue
from worker.tasks import Desk


@pytest.fixture
def desk(connection: Redis) -> Desk:
    engine: Any = SimpleNamespace(family=SimpleNamespace(model=CARD))
    store: Any = None
    return Desk(engine, store, Jobs(connection))


def submit(desk: Desk, deadline_s: float | None = 0.001) -> str:
    request = GenerationRequest(prompt="a cat", model="tiny", seed=1, deadline_s=deadline_s)
    id = desk.jobs.submit(request).id
    time.sleep(0.002)
    return id


def queued(connection: Redis) -> list[str]:
    return [id for queue in queues("tiny", connection) for id in queue.job_ids]


def test_only_what_waits_and_was_never_begun_is_overdue(desk: Desk, connection: Redis) -> None:
    claimed = submit(desk)
    assert desk.jobs.turns.claim("tiny", "busy-0", leases.LEASE_S)
    connection.hset(f"rq:job:{claimed}", "status", "queued")  # as a cleaner of RQ's may say
    late, suspect, cancelled, deleted, forged = (submit(desk) for _ in range(5))
    in_time, patient = submit(desk, 3600), submit(desk, None)
    connection.incr(leases.ATTEMPTS.format(suspect))
    desk.jobs.cancel(cancelled)
    connection.delete(f"rq:job:{deleted}")
    connection.hset(f"rq:job:{forged}", "created_at", "never")
    connection.zadd(DEADLINES.format("tiny"), {b"\xff": 0, "no job": 0})
    overdue.end(desk, "tiny", "busy")
    failed = desk.jobs.fetch(late)
    assert failed.status == Status.FAILED and failed.started_at is None
    assert failed.error is not None and failed.error.type == "/problems/deadline-exceeded"
    assert desk.jobs.fetch(claimed).status == Status.QUEUED
    assert desk.jobs.fetch(cancelled).status == Status.CANCELLED
    assert queued(connection) == [suspect, deleted, forged, in_time, patient]
    entries: Any = connection.xrange(events.STREAM)
    assert [fields[b"finished"].decode() for _, fields in entries] == [cancelled, late]
    assert connection.zrange(DEADLINES.format("tiny"), 0, -1) == [in_time.encode()]


def test_who_claims_it_in_the_same_moment_has_it(
    desk: Desk, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    id, real = submit(desk), SafeJob.cleanup

    def claim_meanwhile(*arguments: Any, **options: Any) -> Any:
        """The last but one of what the transaction is to do."""
        desk.jobs.turns.claim("tiny", "quick-0", leases.LEASE_S)
        return real(*arguments, **options)

    monkeypatch.setattr(SafeJob, "cleanup", claim_meanwhile)
    overdue.end(desk, "tiny", "busy")
    assert desk.jobs.fetch(id).status == Status.RUNNING


def test_a_sweep_takes_no_longer_than_a_beat_can_wait(
    desk: Desk, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [submit(desk) for _ in range(3)]
    monkeypatch.setattr(overdue, "AT_MOST_S", 0)
    overdue.end(desk, "tiny", "busy")
    assert queued(connection) == ids[1:]


def test_many_sweeps_and_claims_at_once_end_or_start_each_once(
    desk: Desk, connection: Redis
) -> None:
    ids = [submit(desk) for _ in range(40)]
    started: list[str] = []

    def claim() -> None:
        while taken := desk.jobs.turns.claim("tiny", "quick-0", leases.LEASE_S):
            started.append(taken[0].id)

    threads = [threading.Thread(target=overdue.end, args=(desk, "tiny", "busy")) for _ in range(3)]
    threads += [threading.Thread(target=claim) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended = [id for id in ids if desk.jobs.fetch(id).status == Status.FAILED]
    assert sorted(started + ended) == sorted(ids)
    assert queued(connection) == []
    assert connection.xlen(events.STREAM) == len(ended)
