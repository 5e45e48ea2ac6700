"""RQ's job and queue as this service uses them: one queue for each model, tenant and priority.

JSON only, and `SafeJob` on both sides: whoever can write to Redis can forge a job, and must not
be able to run code with it.
"""

from collections.abc import Callable
from typing import Any

from redis import Redis
from redis.client import Pipeline
from rq import Queue
from rq.exceptions import InvalidJobOperation
from rq.job import Job
from rq.serializers import JSONSerializer

from safelatent.schema import Priority

TASK = "worker.tasks.generate"
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")

TENANTS = "safelatent:tenants:{}"
"""Of a model: every tenant that has ever queued for it."""
TURNS = "safelatent:turns:{}"
"""Of a model: its tenants with queued jobs, by the virtual time at which their next job may start;
0 for one that has just lined up."""
BELL = "safelatent:bell:{}"
"""Of a model: a list that grows by an entry for each job that is queued, to wake a worker."""
RINGS = 64
PARKED_COUNTS = "safelatent:parked"
"""A hash that counts, by schema version, how often a worker that does not know it has met a job of
it and set it aside."""


class SafeJob(Job):
    """A job that can only be `worker.tasks.generate`: no other function, callback or webhook."""

    @property
    def func(self) -> Callable[..., Any]:
        if self.func_name != TASK:
            raise InvalidJobOperation(f"job {self.id} asks for {self.func_name!r}, not {TASK!r}")
        return super().func  # type: ignore[no-any-return]

    def restore(self, raw_data: Any) -> None:
        super().restore(raw_data)
        self._success_callback_name = None
        self._failure_callback_name = None
        self._stopped_callback_name = None
        self.webhooks = []


class SafeQueue(Queue):
    """RQ's queue, of `SafeJob`s. Whatever is pushed also lines its tenant up for a turn."""

    job_class = SafeJob

    def push_job_id(
        self, job_id: str, pipeline: Pipeline | None = None, at_front: bool = False
    ) -> None:
        super().push_job_id(job_id, pipeline, at_front)
        self.line_up(pipeline)

    def line_up(self, pipeline: Pipeline | None = None) -> None:
        """Give the tenant a place among the model's tenants, and ring for a worker."""
        model, tenant, _ = place_of(self.name)
        connection = self.connection if pipeline is None else pipeline
        connection.sadd(TENANTS.format(model), tenant)
        connection.zadd(TURNS.format(model), {tenant: 0}, nx=True)
        connection.lpush(BELL.format(model), 1)
        connection.ltrim(BELL.format(model), 0, RINGS - 1)


def queue_name(model: str, tenant: str, priority: str) -> str:
    return f"{model}:{tenant}:{priority}"


def place_of(queue_name: str) -> tuple[str, str, Priority]:
    """Model, tenant and priority of a queue. Raises ValueError for a name that is none of ours."""
    model, tenant, priority = queue_name.rsplit(":", 2)
    if priority not in PRIORITIES:
        raise ValueError(f"{queue_name!r} is no queue of a model, a tenant and a priority")
    return model, tenant, priority


def queue(model: str, tenant: str, priority: str, connection: Redis) -> SafeQueue:
    return SafeQueue(queue_name(model, tenant, priority), connection, serializer=JSONSerializer)


def queues(model: str, connection: Redis) -> list[SafeQueue]:
    """The queues of all tenants of a model, most urgent first."""
    tenants: Any = connection.smembers(TENANTS.format(model))
    return [
        queue(model, tenant.decode(), priority, connection)
        for priority in PRIORITIES
        for tenant in sorted(tenants)
    ]
