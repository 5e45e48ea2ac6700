"""Leases and fences on a real Redis: who may end a job, and how it comes back into its queue."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from safelatent import events, queues
from safelatent.jobs import OPEN, Jobs
from safelatent.queues import SafeJob, SafeQueue
from safelatent.schema import GenerationRequest
from safelatent.turns import Turns
from tests.conftest import RedisServer
from worker import leases, slots, tasks
from worker.isolation import Isolation


def submit(connection: Redis, count: int = 1) -> list[SafeJob]:
    jobs = Jobs(connection)
    request = GenerationRequest(prompt="a cat", model="tiny", seed=1)
    ids = [jobs.submit(request).id for _ in range(count)]
    return [SafeJob.fetch(id, connection, serializer=JSONSerializer) for id in ids]


def queue(connection: Redis) -> SafeQueue:
    return queues.queue("tiny", OPEN, "normal", connection)


def status(job: Job) -> JobStatus:
    return JobStatus(job.get_status(refresh=True))


def claim(connection: Redis, worker: str = "dead-0") -> Execution:
    """Start the next job for an RQ worker."""
    claimed = Turns(connection).claim("tiny", worker, leases.LEASE_S)
    assert claimed is not None
    return claimed[2]


def lapse(connection: Redis, job: Job) -> None:
    for key in connection.keys(f"rq:execution:{job.id}:*"):
        connection.delete(key)


def slot(connection: Redis) -> slots.Slot:
    desk: Any = SimpleNamespace(
        jobs=Jobs(connection),
        cancel=lambda id: None,
        meter=SimpleNamespace(busy=nullcontext),
        isolation=Isolation(),
    )
    return slots.Slot("tiny", desk, "played-0")


def work(at_work: slots.Slot) -> None:
    """Claim the next job, and do it."""
    at_work.stopping.clear()
    job, line = at_work.dequeue_job_and_maintain_ttl(None)
    at_work.execute_job(job, line)


def results(connection: Redis, job: Job) -> list[Any]:
    return [result.type.name for result in job.results()]


def finished(connection: Redis) -> list[str]:
    entries: Any = connection.xrange(events.STREAM)
    return [fields[b"finished"].decode() for _, fields in entries if b"finished" in fields]


def test_a_job_is_started_once_however_often_it_stands_in_its_queue(connection):
    [job] = submit(connection)
    for _ in range(2):
        connection.rpush(queue(connection).key, job.id)
    turns = Turns(connection)
    assert turns.claim("tiny", "a-0", leases.LEASE_S) is not None
    assert turns.claim("tiny", "b-0", leases.LEASE_S) is None
    assert queue(connection).job_ids == []


def test_an_entry_of_a_job_that_has_ended_starts_nothing(connection):
    [job] = submit(connection)
    job.set_status(JobStatus.CANCELED)
    assert Turns(connection).claim("tiny", "a-0", leases.LEASE_S) is None
    assert status(job) == JobStatus.CANCELED and queue(connection).job_ids == []


def test_a_killed_slot_loses_no_job_that_it_had_just_taken(connection):
    """A claim is all that a slot ever did: the job is in its hands, and comes back."""
    [job] = submit(connection)
    claim(connection)
    assert queue(connection).job_ids == [] and status(job) == JobStatus.STARTED
    assert StartedJobRegistry(queue=queue(connection)).get_job_ids() == [job.id]
    lapse(connection, job)
    assert leases.hand_back_lapsed(queue(connection)) == 1
    assert queue(connection).job_ids == [job.id] and status(job) == JobStatus.QUEUED


def test_many_sweeps_at_once_queue_an_abandoned_job_once(connection):
    jobs = submit(connection, 6)
    for _ in jobs:
        claim(connection)
    assert leases.hand_back_lapsed(queue(connection)) == 0  # its leases are good
    for job in jobs:
        lapse(connection, job)
    gate = threading.Barrier(8)

    def sweep() -> None:
        gate.wait()
        leases.hand_back_lapsed(queue(connection))

    threads = [threading.Thread(target=sweep) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queue(connection).job_ids == [job.id for job in jobs]  # as old as they were


@pytest.mark.parametrize("forged", [b"no-colon", b"a:b:c", b"\xff", b"unknown:job"])
def test_a_forged_entry_hides_no_lapsed_lease_and_is_gone(connection, forged):
    [job] = submit(connection)
    claim(connection)
    lapse(connection, job)
    registry = StartedJobRegistry(queue=queue(connection)).key
    connection.zadd(registry, {forged: 2**40})  # the first that a sweep meets
    assert leases.hand_back_lapsed(queue(connection)) == 1
    assert queue(connection).job_ids == [job.id] and not connection.exists(registry)


def test_rqs_own_cleanup_judges_no_lease(connection):
    [job] = submit(connection)
    claim(connection)
    lapse(connection, job)
    for _ in range(3):
        assert StartedJobRegistry(queue=queue(connection)).count == 1
    assert queue(connection).job_ids == []
    assert leases.hand_back_lapsed(queue(connection)) == 1


def test_what_a_dead_worker_held_is_forgotten_with_its_leases(connection):
    submit(connection)
    execution = claim(connection, "dead-0")
    held = execution.worker_executions_key
    assert 0 < connection.ttl(held) <= leases.LEASE_S
    at_work = slot(connection)
    at_work.register_birth()
    at_work.heartbeat()
    assert 0 < connection.ttl(at_work.key) <= leases.LEASE_S
    connection.delete(held)  # as after an outage
    with connection.pipeline() as pipeline:
        leases.renew(pipeline, execution)
        pipeline.execute()
    assert connection.smembers(held) == {execution.composite_key.encode()}
    assert 0 < connection.ttl(held) <= leases.LEASE_S


def test_a_renewed_lease_is_no_prey_even_if_it_had_lapsed(connection):
    [job] = submit(connection)
    execution = claim(connection, "alive-0")
    lapse(connection, job)
    with connection.pipeline() as pipeline:
        leases.renew(pipeline, execution)
        assert pipeline.execute() == [1]
    assert leases.hand_back_lapsed(queue(connection)) == 0
    lapse(connection, job)
    assert leases.hand_back_lapsed(queue(connection)) == 1
    with connection.pipeline() as pipeline:
        leases.renew(pipeline, execution)
        assert pipeline.execute() == [0]


@pytest.mark.parametrize("outcome", ["success", "failure"])
def test_the_end_of_an_execution_that_was_handed_back_is_dropped(connection, monkeypatch, outcome):
    [job] = submit(connection)

    def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
        lapse(connection, job)
        assert leases.hand_back_lapsed(queue(connection)) == 1
        if outcome == "failure":
            raise tasks.Cancelled
        return {}

    monkeypatch.setattr(tasks, "generate", generate)
    work(slot(connection))
    assert status(job) == JobStatus.QUEUED
    assert queue(connection).job_ids == [job.id]
    assert results(connection, job) == []
    assert finished(connection) == []


def test_of_two_executions_only_the_one_that_holds_the_job_ends_it(connection, monkeypatch):
    [job] = submit(connection)

    def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
        monkeypatch.setattr(tasks, "generate", lambda version, request: {"from": "newer"})
        lapse(connection, job)
        leases.hand_back_lapsed(queue(connection))
        work(slot(connection))
        return {"from": "older"}

    monkeypatch.setattr(tasks, "generate", generate)
    work(slot(connection))
    assert status(job) == JobStatus.FINISHED
    assert job.return_value(refresh=True) == {"from": "newer"}
    assert results(connection, job) == ["SUCCESSFUL"]
    assert finished(connection) == [job.id]
    assert not connection.keys("rq:execution*") and not connection.keys("rq:wip:*")


def test_a_result_is_kept_while_redis_is_away_and_written_once(own_redis: RedisServer, monkeypatch):
    connection = Redis.from_url(own_redis.url)
    [job] = submit(connection)

    def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
        own_redis.kill()
        threading.Timer(2, own_redis.start).start()
        return {"kept": True}

    monkeypatch.setattr(tasks, "generate", generate)
    work(slot(connection))
    assert status(job) == JobStatus.FINISHED
    assert job.return_value(refresh=True) == {"kept": True}
    assert results(connection, job) == ["SUCCESSFUL"]
    assert finished(connection) == [job.id]


def test_an_answer_that_gets_lost_makes_no_second_result(connection, monkeypatch):
    [job] = submit(connection)
    monkeypatch.setattr(tasks, "generate", lambda version, request: {})
    at_work = slot(connection)
    real, losses = connection.transaction, []

    def transaction(*arguments: Any) -> Any:
        answer = real(*arguments)
        if not losses:
            losses.append(answer)
            raise slots.ConnectionError("it is written, and nobody says so")
        return answer

    monkeypatch.setattr(connection, "transaction", transaction)
    work(at_work)
    assert losses
    assert results(connection, job) == ["SUCCESSFUL"]
    assert finished(connection) == [job.id]


@pytest.mark.parametrize(("is_counted", "attempts"), [(True, b"1"), (False, b"0")])
def test_a_hand_back_goes_to_the_front_and_may_give_the_attempt_back(
    connection, is_counted, attempts
):
    first, second = submit(connection, 2)
    execution = claim(connection, "a-0")
    connection.incr(leases.ATTEMPTS.format(first.id))
    held = leases.Held(first.id, execution.id, first.origin)
    assert leases.hand_back(connection, held, is_counted=is_counted)
    assert not leases.hand_back(connection, held, is_counted=is_counted)
    assert queue(connection).job_ids == [first.id, second.id]
    assert connection.get(leases.ATTEMPTS.format(first.id)) == attempts


def test_what_is_in_other_hands_since_is_not_handed_back_by_who_held_it(connection):
    [job] = submit(connection)
    old = leases.Held(job.id, claim(connection, "old-0").id, job.origin)
    assert leases.hand_back(connection, old)
    claim(connection, "new-0")
    connection.incr(leases.ATTEMPTS.format(job.id))
    assert not leases.hand_back(connection, old, is_counted=False)
    assert status(job) == JobStatus.STARTED and queue(connection).job_ids == []
    assert connection.get(leases.ATTEMPTS.format(job.id)) == b"1"


def test_a_job_that_was_cancelled_or_deleted_meanwhile_is_not_queued_again(connection):
    cancelled, deleted = submit(connection, 2)
    for _ in range(2):
        claim(connection)
    cancelled.set_status(JobStatus.CANCELED)
    deleted.delete()
    for job in (cancelled, deleted):
        lapse(connection, job)
    assert leases.hand_back_lapsed(queue(connection)) == 0
    assert queue(connection).job_ids == []


def test_a_cancel_right_after_a_crash_meets_no_dead_execution(connection):
    """Trap 5 of RQ: `cancel` raises while an execution is registered whose hash has expired."""
    [job] = submit(connection)
    claim(connection)
    lapse(connection, job)
    leases.hand_back_lapsed(queue(connection))
    job.cancel()
    assert status(job) == JobStatus.CANCELED
    assert queue(connection).job_ids == []


def test_a_job_of_another_version_waits_for_who_knows_it(connection, monkeypatch):
    here, at_work = queue(connection), slot(connection)
    unknown, known = submit(connection, 2)
    unknown.kwargs = {**unknown.kwargs, "version": 99}
    unknown.save()
    monkeypatch.setattr(tasks, "generate", lambda version, request: {})
    work(at_work)
    assert status(unknown) == JobStatus.QUEUED and here.job_ids == [known.id]
    assert not connection.keys("rq:execution*")
    work(at_work)
    assert status(known) == JobStatus.FINISHED
    leases.unpark(connection, "tiny", 1)
    assert here.job_ids == []
    connection.hset("rq:job:forged", "origin", "no place")
    connection.rpush(leases.PARKED.format("tiny", 99), "forged", b"\xff")
    leases.unpark(connection, "tiny", 99)
    assert not connection.exists(leases.PARKED.format("tiny", 99))
    assert here.job_ids == [unknown.id]
    monkeypatch.setattr(slots, "SCHEMA_VERSION", 99)
    work(at_work)
    assert status(unknown) == JobStatus.FINISHED


def test_a_worker_that_is_not_sure_of_its_leases_publishes_no_step(connection):
    answers = iter([False, True])
    meter: Any = SimpleNamespace(count=lambda images: None)
    reporter = slots.ProgressReporter(connection, meter, lambda: next(answers))
    for call in (1, 2):
        spec = SimpleNamespace(steps=4)
        image: Any = SimpleNamespace(call=call, calls=4, owner="f00", spec=spec)
        reporter.after_step([image])
    reporter.stop()
    entries: Any = connection.xrange(events.STREAM)
    assert [fields[b"steps"] for _, fields in entries] == [b'{"f00": [2, 4]}']


def test_redis_errors_that_do_not_pass_are_not_waited_for(connection, monkeypatch):
    [job] = submit(connection)
    monkeypatch.setattr(tasks, "generate", lambda version, request: {})

    def transaction(*arguments: Any) -> Any:
        raise RedisError("WRONGTYPE")

    monkeypatch.setattr(connection, "transaction", transaction)
    with pytest.raises(RedisError, match="WRONGTYPE"):
        work(slot(connection))


def test_a_slot_that_comes_back_after_an_outage_takes_its_name_again(connection):
    at_work = slot(connection)
    at_work.register_birth()
    at_work.register_birth()  # nobody has written down that it had gone
    assert connection.smembers("rq:workers") == {b"rq:worker:played-0"}
