"""Queued generations whose deadline has passed end here, while every slot has something else to do.

A slot that claims one would tell it too. But with long ones at work that may be long after.
"""

import logging
import time
from datetime import UTC, datetime
from typing import Any

from redis.client import Pipeline
from redis.exceptions import RedisError
from rq.exceptions import NoSuchJobError
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from safelatent import events
from safelatent.jobs import DEADLINES, KEPT_S
from safelatent.queues import SafeJob, SafeQueue
from safelatent.schema import SCHEMA_VERSION, GenerationRequest
from worker import leases
from worker.tasks import Cancelled, Desk, unheard

log = logging.getLogger(__name__)

AT_MOST_S = 1
"""How long one sweep may take for it, as it holds up the beat that renews leases. One takes some
2 ms of processor time."""


def end(desk: Desk, model: str, worker: str) -> None:
    """End what is overdue among a model's queued jobs, in the name of a worker.

    What has been claimed meanwhile is its slot's.
    """
    connection, deadlines = desk.jobs.connection, DEADLINES.format(model)
    until = time.monotonic() + AT_MOST_S
    due: Any = connection.zrangebyscore(deadlines, "-inf", time.time(), 0, 1000)
    for id in due:
        try:
            _end(desk, id.decode(), worker)
        except RedisError:
            raise
        except NoSuchJobError:
            pass  # deleted
        except Exception:  # forged; it is looked at once
            log.exception("the deadline of job %s cannot be judged", id)
        connection.zrem(deadlines, id)
        if time.monotonic() > until:
            break


def _end(desk: Desk, id: str, worker: str) -> None:
    connection = desk.jobs.connection
    job = SafeJob.fetch(id, connection, serializer=JSONSerializer)
    if job.kwargs["version"] != SCHEMA_VERSION:
        return  # for who knows it
    request = GenerationRequest.model_validate(job.kwargs["request"])
    result = desk.overdue(id, request, job.created_at.replace(tzinfo=UTC))
    if result is None:
        return
    job._result, job.ended_at = result.model_dump(mode="json"), datetime.now(UTC)
    ttl = job.get_result_ttl(KEPT_S)

    def write(pipeline: Pipeline) -> None:
        status: Any = pipeline.hget(job.key, "status")
        if status != JobStatus.QUEUED.encode() or pipeline.exists(leases.fence(id)):
            raise Taken
        pipeline.multi()
        job._handle_success(ttl, pipeline, worker_name=worker)
        job.cleanup(ttl, pipeline, remove_from_queue=False)
        SafeQueue(job.origin, connection).remove(id, pipeline)

    try:
        connection.transaction(write, job.key)  # which a claim changes
    except Taken:
        return
    with desk.observer.job(job, Cancelled) as watched:
        watched.result = result
    with unheard(id):
        events.publish_finished(connection, id)


class Taken(Exception):
    """It is queued no more."""
