"""Who holds which job: the lease, the fence, and the ways back into the queue, each one Lua step.

A slot that starts a job gets an execution of it. `rq:executions:<job>` names the executions that
may still publish an end: that is the fence. The hash `rq:execution:<job>:<execution>` lives for
`LEASE_S` from its last renewal, by Redis' own clock: that is the lease. When it is gone anyone may
hand the job back, which takes the fence away in the same step. So no decision compares the clocks
of two machines, and a job is queued once, however many hand it back at the same time.
"""

import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from redis import Redis
from redis.client import Pipeline
from rq.exceptions import DeserializationError
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job
from rq.queue import Queue
from rq.registry import StartedJobRegistry
from rq.utils import parse_composite_key
from rq.worker_registration import REDIS_WORKER_KEYS, WORKERS_BY_QUEUE_KEY

from safelatent.jobs import WORKERS

ATTEMPTS = "safelatent:attempts:{}"
"""How often a job has entered an engine."""

PARKED_COUNTS = "safelatent:parked"
"""How often a job of a schema version was met by a worker that does not know it."""

LEASE_S = 10
START_S = 0.2
"""A living worker starts what it has taken from a queue within this time, nearly always."""
REGISTERED_S = 2 * 3600
"""How long RQ's own registries believe in an execution: longer than any job may run, so that only
`hand_back` ends one early, and never RQ's clean-up, which goes by the clock of who asks for it."""

START = """
-- KEYS: job, intermediate list, started registry, executions of the job, execution, of the worker
-- ARGV: job id, execution id, lease in ms, registry's seconds, now + registry's seconds, fields...
redis.call('LREM', KEYS[2], 1, ARGV[1])
local status = redis.call('HGET', KEYS[1], 'status')
if status ~= 'queued' and status ~= 'started' then return 0 end
if status == 'started' and redis.call('ZCARD', KEYS[4]) > 0 then return 0 end
redis.call('HSET', KEYS[1], 'status', 'started')
local held = ARGV[1] .. ':' .. ARGV[2]
redis.call('ZADD', KEYS[3], ARGV[5], held)
redis.call('ZADD', KEYS[4], ARGV[5], ARGV[2])
redis.call('EXPIRE', KEYS[4], ARGV[4])
redis.call('HSET', KEYS[5], unpack(ARGV, 6))
redis.call('PEXPIRE', KEYS[5], ARGV[3])
redis.call('SADD', KEYS[6], held)
redis.call('EXPIRE', KEYS[6], ARGV[4])
return 1
"""

RENEW = """
-- KEYS: executions of the job, execution; ARGV: execution id, lease in ms, fields...
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
redis.call('HSET', KEYS[2], unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
"""

HAND_BACK = """
-- KEYS: job, queue, started registry, executions of the job, execution, attempts
-- ARGV: job id, execution id, "lapsed" to leave a lease alone that was renewed,
--       "uncounted" to take the attempt back
local held = ARGV[1] .. ':' .. ARGV[2]
if ARGV[3] == 'lapsed' and redis.call('EXISTS', KEYS[5]) == 1 then return 0 end
if redis.call('ZREM', KEYS[3], held) == 0 then return 0 end
redis.call('ZREM', KEYS[4], ARGV[2])
redis.call('DEL', KEYS[5])
if redis.call('HGET', KEYS[1], 'status') ~= 'started' then return 0 end
if redis.call('ZCARD', KEYS[4]) > 0 then return 0 end
redis.call('HSET', KEYS[1], 'status', 'queued')
redis.call('HDEL', KEYS[1], 'started_at')
redis.call('LPUSH', KEYS[2], ARGV[1])
if ARGV[4] == 'uncounted' then redis.call('DECR', KEYS[6]) end
return 1
"""

PUT_BACK = """
-- KEYS: job, queue, intermediate list; ARGV: job id
if redis.call('LREM', KEYS[3], 1, ARGV[1]) == 0 then return 0 end
if redis.call('HGET', KEYS[1], 'status') ~= 'queued' then return 0 end
redis.call('LPUSH', KEYS[2], ARGV[1])
return 1
"""


class Held(NamedTuple):
    """An execution as the registries name it, and the queue that its job came from."""

    job_id: str
    execution_id: str
    queue: str


def start(connection: Redis, job: Job, worker: str) -> Execution | None:
    """An execution of a queued job for an RQ worker; None if the job is not queued any more.

    A job's id may stand in a queue more than once, or in none of ours: its status decides.
    """
    execution = Execution(uuid.uuid4().hex, job.id, connection, worker)
    execution._job = job
    fields = execution.serialize()
    started = connection.register_script(START)(
        keys=[
            job.key,
            Queue(job.origin, connection).intermediate_queue_key,
            _registry(job.origin),
            fence(job.id),
            execution.key,
            execution.worker_executions_key,
        ],
        args=[
            job.id,
            execution.id,
            LEASE_S * 1000,
            REGISTERED_S,
            time.time() + REGISTERED_S,
            *_flat(fields),
        ],
    )
    return execution if started else None


def renew(pipeline: Pipeline, execution: Execution) -> None:
    """Another `LEASE_S` for an execution; the pipeline's answer is 0 if it was handed back.

    A lease that lapsed while Redis was away is good again, unless somebody noticed.
    """
    pipeline.register_script(RENEW)(
        keys=[fence(execution.job_id), execution.key],
        args=[execution.id, LEASE_S * 1000, *_flat(execution.serialize())],
        client=pipeline,
    )


def hand_back(
    connection: Redis, held: Held, only_lapsed: bool = False, is_counted: bool = True
) -> bool:
    """Put a job at the front of its queue, and take its fence from the execution that held it.

    `is_counted` is whether an attempt that had begun counts as one.
    """
    job_key = Job.key_for(held.job_id)
    execution = Execution(held.execution_id, held.job_id, connection)
    return bool(
        connection.register_script(HAND_BACK)(
            keys=[
                job_key,
                Queue(held.queue, connection).key,
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
    )


def hand_back_lapsed(queue: Queue) -> int:
    """Hand back what nobody renews any more, oldest last, so that it comes first again."""
    held: Any = queue.connection.zrange(_registry(queue.name), 0, -1)
    lapsed = [Held(*parse_composite_key(entry.decode()), queue.name) for entry in reversed(held)]
    return sum(hand_back(queue.connection, one, only_lapsed=True) for one in lapsed)


def taken(queue: Queue) -> set[str]:
    """Jobs between a queue and a slot that starts them; nobody stays there for long."""
    ids: Any = queue.connection.lrange(queue.intermediate_queue_key, 0, -1)
    return {id.decode() for id in ids}


def put_back(queue: Queue, ids: set[str]) -> int:
    """Queue jobs again that were taken and never started.

    If their taker is slow and not dead, `start` lets only one of two have the job.
    """
    script = queue.connection.register_script(PUT_BACK)
    keys = [queue.key, queue.intermediate_queue_key]
    return sum(bool(script([Job.key_for(id), *keys], [id])) for id in ids)


def park(connection: Redis, job: Job, version: int) -> bool:
    """Set a job aside that is of another schema version than ours, for a worker of that version.

    It stays queued, and is no more in the way of those that we know.
    """
    try:
        wanted = job.kwargs["version"]
    except (DeserializationError, KeyError, TypeError):
        wanted = None
    if type(wanted) is not int or wanted == version:
        return False  # ours, or nonsense that it will fail for when it is performed
    queue = Queue(job.origin, connection)
    with connection.pipeline() as pipeline:
        pipeline.lrem(queue.intermediate_queue_key, 1, job.id)
        pipeline.rpush(_parked(queue, wanted), job.id)
        pipeline.hincrby(PARKED_COUNTS, str(wanted), 1)
        pipeline.execute()
    return True


def unpark(queue: Queue, version: int) -> None:
    """Queue what others have set aside for workers of our version."""
    while queue.connection.lmove(_parked(queue, version), queue.key, "RIGHT", "LEFT"):
        pass


def bury(connection: Redis, name: str) -> int:
    """Hand back all that a dead worker process held, and strike it from every list.

    `name` is the process's; its RQ workers are called `<name>-<number>`.
    """
    keys: Any = connection.smembers(REDIS_WORKER_KEYS)
    workers = [key.decode() for key in keys if key.startswith(f"rq:worker:{name}-".encode())]
    held = [one for worker in workers for one in _held_by(connection, worker)]
    count = sum(hand_back(connection, one) for _, one in sorted(held, reverse=True))
    queues = {queue for worker in workers for queue in _queues_of(connection, worker)}
    count += _put_back_what_stays(connection, queues)
    with connection.pipeline() as pipeline:
        for worker in workers:
            pipeline.srem(REDIS_WORKER_KEYS, worker)
            for queue in queues:
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
    for entry in entries:
        job_id, execution_id = parse_composite_key(entry.decode())
        execution = Execution(execution_id, job_id, connection)
        origin: Any = connection.hget(Job.key_for(job_id), "origin")
        began: Any = connection.hget(execution.key, "created_at")
        if origin is not None:
            yield float(began or 0), Held(job_id, execution_id, origin.decode())


def _queues_of(connection: Redis, worker: str) -> list[str]:
    names: Any = connection.hget(worker, "queues")
    return names.decode().split(",") if names else []


def _put_back_what_stays(connection: Redis, queues: set[str]) -> int:
    """Of the jobs that were taken and not started, those that nobody starts in a moment."""
    places = [Queue(name, connection) for name in queues]
    seen = {place.name: taken(place) for place in places}
    if not any(seen.values()):
        return 0
    time.sleep(START_S)
    return sum(put_back(place, seen[place.name] & taken(place)) for place in places)


def _parked(queue: Queue, version: int) -> str:
    return f"{queue.key}:version:{version}"


def _registry(queue: str) -> str:
    return StartedJobRegistry.key_template.format(queue)


def fence(job_id: str) -> str:
    """The key of the executions that may end a job, a sorted set."""
    return ExecutionRegistry.key_template.format(job_id)


def _flat(fields: dict[str, Any]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]
