"""Who holds which job: the lease, the fence, and the ways back into the queue, each one Lua step.

A slot that claims a job (`safelatent.turns`) gets an execution of it. `rq:executions:<job>` names
the executions that may still publish an end: that is the fence. The hash
`rq:execution:<job>:<execution>` lives for `LEASE_S` from its last renewal, by Redis' own clock:
that is the lease. When it is gone anyone may hand the job back, which takes the fence away in the
same step. So no decision compares the clocks of two machines, and a job is queued once, however
many hand it back at the same time.
"""

import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from redis import Redis
from redis.client import Pipeline
from rq.exceptions import DeserializationError
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.registry import StartedJobRegistry
from rq.worker_registration import REDIS_WORKER_KEYS, WORKERS_BY_QUEUE_KEY

from safelatent.queues import PARKED_COUNTS, SafeQueue, place_of
from safelatent.turns import WORKERS

log = logging.getLogger(__name__)

ATTEMPTS = "safelatent:attempts:{}"
"""How often a job has entered an engine."""

PARKED = "safelatent:parked:{}:{}"
"""Of a model: jobs of a schema version that nobody here knows yet."""

LEASE_S = 10

RENEW = """
-- KEYS: executions of the job, execution, executions of the worker
-- ARGV: job id, execution id, lease in s, fields...
if not redis.call('ZSCORE', KEYS[1], ARGV[2]) then return 0 end
redis.call('HSET', KEYS[2], unpack(ARGV, 4))
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('SADD', KEYS[3], ARGV[1] .. ':' .. ARGV[2])
redis.call('EXPIRE', KEYS[3], ARGV[3])
return 1
"""

HAND_BACK = """
-- KEYS: job, queue, started registry, executions of the job, execution, attempts
-- ARGV: job id, execution id, "lapsed" to leave a lease alone that was renewed,
--       "uncounted" to take the attempt back
local held = ARGV[1] .. ':' .. ARGV[2]
if ARGV[3] == 'lapsed' and redis.call('EXISTS', KEYS[5]) == 1 then return 0 end
redis.call('ZREM', KEYS[3], held)
redis.call('ZREM', KEYS[4], ARGV[2])
redis.call('DEL', KEYS[5])
if redis.call('HGET', KEYS[1], 'status') ~= 'started' then return 0 end
if redis.call('ZCARD', KEYS[4]) > 0 then return 0 end  -- in other hands since
redis.call('HSET', KEYS[1], 'status', 'queued')
redis.call('HDEL', KEYS[1], 'started_at')
redis.call('LPUSH', KEYS[2], ARGV[1])
if ARGV[4] == 'uncounted' then redis.call('DECR', KEYS[6]) end
return 1
"""


class Held(NamedTuple):
    """An execution as the registries name it, and the queue that its job came from."""

    job_id: str
    execution_id: str
    queue: str


def renew(pipeline: Pipeline, execution: Execution) -> None:
    """Another `LEASE_S` for an execution; the pipeline's answer is 0 if it was handed back.

    A lease that lapsed while Redis was away is good again, unless somebody noticed.
    """
    pipeline.register_script(RENEW)(
        keys=[fence(execution.job_id), execution.key, execution.worker_executions_key],
        args=[execution.job_id, execution.id, LEASE_S, *_flat(execution.serialize())],
        client=pipeline,
    )


def hand_back(
    connection: Redis, held: Held, only_lapsed: bool = False, is_counted: bool = True
) -> bool:
    """Put a job at the front of its queue, and take its fence from the execution that held it.

    `is_counted` is whether an attempt that had begun counts as one.
    """
    execution = Execution(held.execution_id, held.job_id, connection)
    queue = SafeQueue(held.queue, connection)
    is_back = connection.register_script(HAND_BACK)(
        keys=[
            Job.key_for(held.job_id),
            queue.key,
            _registry(held.queue),
            fence(held.job_id),
            execution.key,
            ATTEMPTS.format(held.job_id),
        ],
        args=[
            held.job_id,
            held.execution_id,
            "lapsed" if only_lapsed else "",
            "" if is_counted else "uncounted",
        ],
    )
    if is_back:
        queue.line_up()  # if we die before it, a sweep does it
    return bool(is_back)


def hand_back_lapsed(queue: Queue) -> int:
    """Hand back what nobody renews any more, oldest last, so that it comes first again."""
    registry, count = _registry(queue.name), 0
    held: Any = queue.connection.zrange(registry, 0, -1)
    for entry in reversed(held):
        if names := _names(entry):
            count += hand_back(queue.connection, Held(*names, queue.name), only_lapsed=True)
        else:
            log.error("%s had an entry that names no execution: %r", registry, entry)
            queue.connection.zrem(registry, entry)
    return count


def park(job: Job, execution: Execution, version: int) -> bool:
    """Set a claimed job aside that is of another schema version than ours, for who knows that one.

    It stays queued, and is no more in the way of those that we know.
    """
    try:
        wanted = job.kwargs["version"]
    except (DeserializationError, KeyError, TypeError):
        wanted = None
    if type(wanted) is not int or wanted == version:
        return False  # ours, or nonsense that it will fail for when it is performed
    model, _, _ = place_of(job.origin)
    with job.connection.pipeline() as pipeline:
        execution.delete(job, pipeline)
        job.set_status(JobStatus.QUEUED, pipeline=pipeline)
        pipeline.rpush(PARKED.format(model, wanted), job.id)
        pipeline.hincrby(PARKED_COUNTS, str(wanted), 1)
        pipeline.execute()
    return True


def unpark(connection: Redis, model: str, version: int) -> None:
    """Queue what others have set aside for workers of our version."""
    parked = PARKED.format(model, version)
    while last := connection.lindex(parked, -1):
        entry: Any = last
        id = entry.decode(errors="replace")
        origin: Any = connection.hget(Job.key_for(id), "origin")
        with connection.pipeline() as pipeline:
            if origin is not None:
                with suppress(ValueError):  # forged
                    SafeQueue(origin.decode(), connection).push_job_id(id, pipeline, True)
            pipeline.lrem(parked, -1, entry)
            pipeline.execute()


def bury(connection: Redis, name: str) -> int:
    """Hand back all that a dead worker process held, and strike it from every list.

    `name` is the process's; its RQ workers are called `<name>-<number>`.
    """
    keys: Any = connection.smembers(REDIS_WORKER_KEYS)
    workers = [key.decode() for key in keys if key.startswith(f"rq:worker:{name}-".encode())]
    held = [one for worker in workers for one in _held_by(connection, worker)]
    count = sum(hand_back(connection, one) for _, one in sorted(held, reverse=True))
    with connection.pipeline() as pipeline:
        for worker in workers:
            queues: Any = connection.hget(worker, "queues")
            pipeline.srem(REDIS_WORKER_KEYS, worker)
            for queue in queues.decode().split(",") if queues else []:
                pipeline.srem(WORKERS_BY_QUEUE_KEY % queue, worker)
            pipeline.delete(worker, f"{worker}:executions")
        pipeline.execute()
    warm: Any = connection.zrange(WORKERS, 0, -1)
    if gone := [member for member in warm if member.startswith(f"{name} ".encode())]:
        connection.zrem(WORKERS, *gone)
    return count


def _held_by(connection: Redis, worker: str) -> Iterator[tuple[float, Held]]:
    """What an RQ worker was at, with the time at which it began."""
    entries: Any = connection.smembers(f"{worker}:executions")
    for job_id, execution_id in filter(None, map(_names, entries)):
        execution = Execution(execution_id, job_id, connection)
        origin: Any = connection.hget(Job.key_for(job_id), "origin")
        began: Any = connection.hget(execution.key, "created_at")
        if origin is not None:
            yield float(began or 0), Held(job_id, execution_id, origin.decode())


def _names(entry: bytes) -> tuple[str, str] | None:
    """The ids of a job and its execution; None for an entry that is forged."""
    job_id, _, execution_id = entry.decode(errors="replace").partition(":")
    return (job_id, execution_id) if execution_id and ":" not in execution_id else None


def _registry(queue: str) -> str:
    return StartedJobRegistry.key_template.format(queue)


def fence(job_id: str) -> str:
    """The key of the executions that may end a job, a sorted set."""
    return ExecutionRegistry.key_template.format(job_id)


def _flat(fields: dict[str, Any]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]
