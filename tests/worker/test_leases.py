"""Leases and fences on a real Redis: who may end a job, and how it comes back into its queue."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError
from rq.job import Job, JobStatus
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from safelatent import events
from safelatent.jobs import Jobs, SafeJob, SafeQueue, queues
from safelatent.schema import GenerationRequest
from tests.conftest import RedisServer
from worker import leases, slots, tasks


def submit(connection: Redis, count: int = 1) -> list[SafeJob]:
    jobs = Jobs(connection)
    request = GenerationRequest(prompt="a cat", model="tiny", seed=1)
    ids = [jobs.submit(request).id for _ in range(count)]
    return [SafeJob.fetch(id, connection, serializer=JSONSerializer) for id in ids]


def queue(connection: Redis) -> SafeQueue:
    return queues("tiny", connection)[1]


def status(job: Job) -> JobStatus:
    return JobStatus(job.get_status(refresh=True))


def take(connection: Redis, count: int = 1) -> None:
    """What a slot does before it starts a job."""
    for _ in range(count):
        SafeQueue.dequeue_any([queue(connection)], None, connection=connection)


def lapse(connection: Redis, job: Job) -> None:
    for key in connection.keys(f"rq:execution:{job.id}:*"):
        connection.delete(key)


def slot(connection: Redis) -> slots.Slot:
    desk: Any = SimpleNamespace(jobs=Jobs(connection), cancel=lambda id: None)
    return slots.Slot(queues("tiny", connection), desk, queue(connection), "played-0")


def results(connection: Redis, job: Job) -> list[Any]:
    return [result.type.name for result in job.results()]


def finished(connection: Redis) -> list[str]:
    entries: Any = connection.xrange(events.STREAM)
    return [fields[b"finished"].decode() for _, fields in entries if b"finished" in fields]


def test_a_job_is_started_once_however_often_it_stands_in_its_queue(connection):
    [job] = submit(connection)
    for _ in range(2):
        connection.rpush(queue(connection).key, job.id)
    take(connection, 3)
    assert leases.start(connection, job, "a-0") is not None
    assert leases.start(connection, job, "b-0") is None
    assert leases.start(connection, job, "c-0") is None
    assert leases.taken(queue(connection)) == set()


def test_many_sweeps_at_once_queue_an_abandoned_job_once(connection):
    jobs = submit(connection, 6)
    take(connection, 6)
    for job in jobs:
        leases.start(connection, job, "dead-0")
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


def test_rqs_own_cleanup_judges_no_lease(connection):
    [job] = submit(connection)
    take(connection)
    leases.start(connection, job, "dead-0")
    lapse(connection, job)
    for _ in range(3):
        assert StartedJobRegistry(queue=queue(connection)).count == 1
    assert queue(connection).job_ids == []
    assert leases.hand_back_lapsed(queue(connection)) == 1


def test_a_renewed_lease_is_no_prey_even_if_it_had_lapsed(connection):
    [job] = submit(connection)
    take(connection)
    execution = leases.start(connection, job, "alive-0")
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
    take(connection)

    def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
        lapse(connection, job)
        assert leases.hand_back_lapsed(queue(connection)) == 1
        if outcome == "failure":
            raise tasks.Cancelled
        return {}

    monkeypatch.setattr(tasks, "generate", generate)
    slot(connection).execute_job(job, queue(connection))
    assert status(job) == JobStatus.QUEUED
    assert queue(connection).job_ids == [job.id]
    assert results(connection, job) == []
    assert finished(connection) == []


def test_of_two_executions_only_the_one_that_holds_the_job_ends_it(connection, monkeypatch):
    [job] = submit(connection)
    take(connection)
    newer = SafeJob.fetch(job.id, connection, serializer=JSONSerializer)

    def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
        monkeypatch.setattr(tasks, "generate", lambda version, request: {"from": "newer"})
        lapse(connection, job)
        leases.hand_back_lapsed(queue(connection))
        take(connection)
        slot(connection).execute_job(newer, queue(connection))
        return {"from": "older"}

    monkeypatch.setattr(tasks, "generate", generate)
    slot(connection).execute_job(job, queue(connection))
    assert status(job) == JobStatus.FINISHED
    assert job.return_value(refresh=True) == {"from": "newer"}
    assert results(connection, job) == ["SUCCESSFUL"]
    assert finished(connection) == [job.id]
    assert not connection.keys("rq:execution*") and not connection.keys("rq:wip:*")


def test_a_result_is_kept_while_redis_is_away_and_written_once(own_redis: RedisServer, monkeypatch):
    connection = Redis.from_url(own_redis.url)
    [job] = submit(connection)
    take(connection)

    def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
        own_redis.kill()
        threading.Timer(2, own_redis.start).start()
        return {"kept": True}

    monkeypatch.setattr(tasks, "generate", generate)
    slot(connection).execute_job(job, queue(connection))
    assert status(job) == JobStatus.FINISHED
    assert job.return_value(refresh=True) == {"kept": True}
    assert results(connection, job) == ["SUCCESSFUL"]
    assert finished(connection) == [job.id]


def test_an_answer_that_gets_lost_makes_no_second_result(connection, monkeypatch):
    [job] = submit(connection)
    take(connection)
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
    at_work.execute_job(job, queue(connection))
    assert losses
    assert results(connection, job) == ["SUCCESSFUL"]
    assert finished(connection) == [job.id]


@pytest.mark.parametrize(("is_counted", "attempts"), [(True, b"1"), (False, b"0")])
def test_a_hand_back_goes_to_the_front_and_may_give_the_attempt_back(
    connection, is_counted, attempts
):
    first, second = submit(connection, 2)
    take(connection)
    execution = leases.start(connection, first, "a-0")
    connection.incr(leases.ATTEMPTS.format(first.id))
    held = leases.Held(first.id, execution.id, first.origin)
    assert leases.hand_back(connection, held, is_counted=is_counted)
    assert not leases.hand_back(connection, held, is_counted=is_counted)
    assert queue(connection).job_ids == [first.id, second.id]
    assert connection.get(leases.ATTEMPTS.format(first.id)) == attempts


def test_a_job_that_was_cancelled_or_deleted_meanwhile_is_not_queued_again(connection):
    cancelled, deleted = submit(connection, 2)
    take(connection, 2)
    for job in (cancelled, deleted):
        leases.start(connection, job, "dead-0")
    cancelled.set_status(JobStatus.CANCELED)
    deleted.delete()
    for job in (cancelled, deleted):
        lapse(connection, job)
    assert leases.hand_back_lapsed(queue(connection)) == 0
    assert queue(connection).job_ids == []


def test_a_cancel_right_after_a_crash_meets_no_dead_execution(connection):
    """Trap 5 of RQ: `cancel` raises while an execution is registered whose hash has expired."""
    [job] = submit(connection)
    take(connection)
    leases.start(connection, job, "dead-0")
    lapse(connection, job)
    leases.hand_back_lapsed(queue(connection))
    job.cancel()
    assert status(job) == JobStatus.CANCELED
    assert queue(connection).job_ids == []


def test_a_job_of_another_version_waits_for_who_knows_it(connection):
    here = queue(connection)
    known, unknown = submit(connection, 2)
    unknown.kwargs = {**unknown.kwargs, "version": 99}
    unknown.save()
    take(connection, 2)
    assert not leases.park(connection, known, 1)
    assert leases.park(connection, unknown, 1)
    leases.unpark(here, 1)
    assert here.job_ids == []
    assert status(unknown) == JobStatus.QUEUED
    leases.unpark(here, 99)
    assert here.job_ids == [unknown.id]
    assert not leases.park(connection, unknown, 99)


def test_a_worker_that_is_not_sure_of_its_leases_publishes_no_step(connection):
    answers = iter([False, True])
    reporter = slots.ProgressReporter(connection, lambda: next(answers))
    for call in (1, 2):
        spec = SimpleNamespace(steps=4)
        image: Any = SimpleNamespace(call=call, calls=4, owner="f00", spec=spec)
        reporter.after_step([image])
    reporter.stop()
    entries: Any = connection.xrange(events.STREAM)
    assert [fields[b"steps"] for _, fields in entries] == [b'{"f00": [2, 4]}']


def test_redis_errors_that_do_not_pass_are_not_waited_for(connection, monkeypatch):
    [job] = submit(connection)
    take(connection)
    monkeypatch.setattr(tasks, "generate", lambda version, request: {})

    def transaction(*arguments: Any) -> Any:
        raise RedisError("WRONGTYPE")

    monkeypatch.setattr(connection, "transaction", transaction)
    with pytest.raises(RedisError, match="WRONGTYPE"):
        slot(connection).execute_job(job, queue(connection))


def test_a_slot_that_comes_back_after_an_outage_takes_its_name_again(connection):
    at_work = slot(connection)
    at_work.register_birth()
    at_work.register_birth()  # nobody has written down that it had gone
    assert connection.smembers("rq:workers") == {b"rq:worker:played-0"}
