"""The queue seam: how a generation becomes an RQ job, and an RQ job a generation again.

Both sides use it: the service submits, reads and cancels, the worker claims (by `turns`). The names
of the queues, and what may stand in them, are in `queues`.
"""

import hashlib
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import RedisError
from rq import Retry
from rq.command import send_stop_execution_command
from rq.exceptions import DeserializationError, InvalidJobOperation
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import str_to_date

from safelatent import deliveries, errors, events
from safelatent.forecast import Pace, left_s, run_s
from safelatent.queues import PARKED_COUNTS, TASK, SafeJob, SafeQueue, place_of, queue
from safelatent.schema import (
    SCHEMA_VERSION,
    Generation,
    GenerationRequest,
    Model,
    Place,
    PolicyApplied,
    Result,
    Status,
)
from safelatent.turns import PACE, WORKERS, Share, Turns

OPEN = "open"
"""The one tenant of a service without a policy file."""

ONE_SHARE = Share()

KEPT_S = 24 * 3600
"""How long a finished generation can be fetched, unless its tenant's policy says otherwise."""
TIMEOUT_S = 3600
"""RQ stops a job that runs longer than this."""
RETRIES = 100
"""How often RQ puts a job back after a crash of its worker. The worker counts the crashes that
this very job may have caused, and gives up after `worker.tasks.MAX_ATTEMPTS`."""

MODELS = "safelatent:models"
CANCELLED = "safelatent:cancelled:{}"
OWNED = "safelatent:owned:{}"
"""A tenant's generations by the microsecond of their creation."""
DEADLINES = "safelatent:deadlines:{}"
"""Of a model: jobs by the time at which they are overdue, if they were not begun before."""
ONCE = "safelatent:once:{}:{}"
RESERVED_S = 30
"""How long an idempotency key is held for what is not queued yet: the frontend may die."""

NAME, COUNT = re.compile(rb"[a-z0-9]{1,20}"), re.compile(rb"[0-9]{1,18}")
"""What a hash of counts may have."""

STATUS = {
    JobStatus.STARTED: Status.RUNNING,
    JobStatus.FINISHED: Status.SUCCEEDED,
    JobStatus.FAILED: Status.FAILED,
    JobStatus.STOPPED: Status.CANCELLED,
    JobStatus.CANCELED: Status.CANCELLED,
}
"""RQ's words in ours; every other one means that the job still waits."""


class Once(NamedTuple):
    """What makes a repeated request the same one: the caller's key, and a hash of the body."""

    key: str
    fingerprint: str

    def name(self, tenant: str) -> str:
        """Its key in Redis; what a caller sends goes in as a hash."""
        return ONCE.format(tenant, hashlib.sha256(self.key.encode()).hexdigest())


class Jobs:
    """Generations in one Redis. Methods raise `QueueUnavailable` when it does not answer."""

    def __init__(self, connection: Redis):
        self.connection = connection
        self.turns = Turns(connection)

    def submit(
        self,
        request: GenerationRequest,
        tenant: str = OPEN,
        policy: PolicyApplied | None = None,
        once: Once | None = None,
        kept_s: int = KEPT_S,
        carried: dict[str, str] | None = None,
        share: Share = ONE_SHARE,
        admit: Callable[[], None] = lambda: None,
    ) -> Generation:
        """Queue a tenant's request, whose `model` and `seed` are filled in.

        With `once` the first request of several is queued, and all get its generation. `kept_s`
        is how long it can be fetched after its end. `carried` goes into the job's meta: the
        request's id and trace for the worker's log and spans, and the seal of its webhook. `admit`
        is called before anything new is queued; what it raises, the caller gets.
        """
        assert request.model is not None and request.seed is not None
        line = queue(request.model, tenant, request.priority, self.connection)
        id = str(uuid.uuid4())
        with redis_errors():
            if once and (first := self._reserve(once, tenant, id)):
                return self._generation(first)
            try:
                admit()
            except errors.SafelatentError:
                if once:
                    self.connection.delete(once.name(tenant))
                raise
            with self.connection.pipeline() as pipeline:
                job = line.enqueue(
                    TASK,
                    kwargs={"version": SCHEMA_VERSION, "request": request.model_dump(mode="json")},
                    job_id=id,
                    description=TASK,
                    job_timeout=TIMEOUT_S,
                    result_ttl=kept_s,
                    failure_ttl=kept_s,
                    retry=Retry(max=RETRIES),
                    meta={
                        **(carried or {}),
                        "tenant": tenant,
                        "policy": policy and policy.model_dump(),
                    },
                    pipeline=pipeline,
                )
                self.turns.enter(line, job, request.megapixel_steps, share, pipeline)
                owned = OWNED.format(tenant)
                pipeline.zadd(owned, {id: _microseconds(job)})
                listed_s = max(kept_s, KEPT_S)
                oldest = _microseconds(job) - listed_s * 1_000_000
                pipeline.zremrangebyscore(owned, "-inf", oldest)
                pipeline.expire(owned, 2 * listed_s)
                if request.deadline_s is not None:
                    due = job.created_at.timestamp() + request.deadline_s
                    pipeline.zadd(DEADLINES.format(request.model), {id: due})
                if request.webhook is not None:
                    deliveries.owe(pipeline, id, _microseconds(job))
                if once:
                    pipeline.set(once.name(tenant), f"{once.fingerprint} {id}", ex=KEPT_S)
                pipeline.execute()
            return self._generation(job)

    def _reserve(self, once: Once, tenant: str, id: str) -> SafeJob | None:
        """Hold a key for a job that will be queued, or the job that was queued under it.

        Raises KeyReused, KeyInUse, and NotFound for one that was deleted.
        """
        name = once.name(tenant)
        deadline = time.monotonic() + 1
        while not self.connection.set(name, f"{once.fingerprint} {id}", nx=True, ex=RESERVED_S):
            taken: Any = self.connection.get(name)
            if taken is None:
                continue  # it has just expired
            fingerprint, first = taken.decode().split(" ")
            if fingerprint != once.fingerprint:
                raise errors.KeyReused(
                    "this Idempotency-Key came with another body: a new request needs a new key"
                )
            left: Any = self.connection.ttl(name)
            try:
                return self._job(first, tenant)
            except errors.NotFound:
                if left > RESERVED_S:
                    raise
            if time.monotonic() > deadline:
                raise errors.KeyInUse(
                    "the first request with this Idempotency-Key is still being accepted",
                    retry_after_s=1,
                )
            time.sleep(0.05)
        return None

    def fetch(self, id: str, tenant: str = OPEN) -> Generation:
        """The generation as it stands; NotFound for an id that is unknown, expired or another's."""
        with redis_errors():
            return self._generation(self._job(id, tenant))

    def ended(self, id: str) -> tuple[str, str, Generation] | None:
        """Anybody's generation, for who delivers webhooks: its tenant, its seal, and itself; None
        while it goes on."""
        with redis_errors():
            job = self._job(id)
            if not STATUS.get(job.get_status(refresh=False), Status.QUEUED).is_terminal:
                return None
            tenant, seal = (str(job.meta.get(name)) for name in ("tenant", "seal"))
            return tenant, seal, self._generation(job)

    def owned(
        self, tenant: str, after: tuple[int, str] | None, before_us: int
    ) -> Iterator[tuple[tuple[int, str], Generation]]:
        """A tenant's generations with their places, newest first: those that come after a place and
        were created at `before_us` at the latest."""
        top = min(before_us, after[0]) if after else before_us
        start = 0
        while True:
            with redis_errors():
                members: Any = self.connection.zrevrangebyscore(
                    OWNED.format(tenant), top, "-inf", start, 100, withscores=True
                )
            if not members:
                return
            start += len(members)
            for member, score in members:
                place = int(score), member.decode()
                if after and place >= after:
                    continue  # also what a newer one has moved into this hundred
                after = place
                try:
                    yield place, self.fetch(place[1], tenant)
                except errors.NotFound:
                    pass  # expired

    def places(self, generations: Iterable[Generation]) -> dict[str, Place]:
        """Where each of them stands that still waits in a queue, by its id."""
        waiting = list(generations)
        with redis_errors():
            with self.connection.pipeline(transaction=False) as pipeline:
                for each in waiting:
                    pipeline.hget(SafeJob.key_for(each.id), "origin")
                origins = pipeline.execute()
            asked = [
                (each.id, origin.decode(), each.request.megapixel_steps)
                for each, origin in zip(waiting, origins, strict=True)
                if origin
            ]
            return {
                id: Place(position=position, eta_s=eta_s)
                for (id, _, _), (position, eta_s) in zip(
                    asked, self.turns.outlooks(asked), strict=True
                )
                if position is not None
            }

    def delete(self, id: str, tenant: str = OPEN) -> None:
        """Forget a generation that has ended."""
        with redis_errors():
            job = self._job(id, tenant)
            try:
                job.delete()
            except ValueError as error:  # RQ still misses a dead execution of it
                raise errors.NotFinished(
                    f"generation {id} is still being cancelled: try again in a minute",
                ) from error
            self.connection.zrem(OWNED.format(tenant), id)
            self.connection.delete(CANCELLED.format(id), events.IMAGES.format(id))
            deliveries.forget(self.connection, id)
            events.publish_finished(self.connection, id)

    def cancel(self, id: str, tenant: str = OPEN) -> Generation:
        """Cancel a queued or running generation; a finished one stays as it is.

        A running one ends within a step. The mark is for the moment in which a worker has taken
        the job from its queue and RQ does not yet call it started.
        """
        with redis_errors():
            job = self._job(id, tenant)
            self.connection.set(CANCELLED.format(id), 1, ex=KEPT_S)
            status = job.get_status()
            executions = job.execution_registry.get_execution_ids()
            if status == JobStatus.QUEUED or (status == JobStatus.STARTED and not executions):
                try:
                    job.cancel()
                except (ValueError, InvalidJobOperation):
                    pass  # it has just started or ended, or RQ still misses a dead execution of it
                else:
                    # RQ itself would keep it for ever.
                    self.connection.expire(job.key, job.result_ttl or KEPT_S)
                    events.publish_finished(self.connection, id)
            for execution in executions:
                try:
                    send_stop_execution_command(self.connection, id, execution)
                except InvalidJobOperation:
                    pass  # ended meanwhile
            return self._generation(self._job(id, tenant))

    def models(self) -> list[Model]:
        """Every model that a worker has ever announced here."""
        with redis_errors():
            cards = self.connection.hgetall(MODELS)
        return [Model.model_validate_json(card) for card in cards.values()]

    def loaded(self) -> dict[str, int]:
        """Model id -> number of worker processes that hold it warm now."""
        with redis_errors():
            now, _ = self.connection.time()
            alive: Any = self.connection.zrangebyscore(WORKERS, now, "+inf")
        counts: dict[str, int] = {}
        for member in alive:
            model = member.decode().split(" ", 1)[1]
            counts[model] = counts.get(model, 0) + 1
        return counts

    def slots(self) -> dict[str, int]:
        """Model id -> slots of the worker processes that hold it warm now."""
        with redis_errors():
            return {
                model: sum(pace.slots for pace in self.turns.picture(model, fresh=True).paces)
                for model in self.loaded()
            }

    def backlog(self) -> dict[tuple[str, str], tuple[int, datetime | None]]:
        """(Model id, priority) -> how many generations wait, and when the oldest was created."""
        found: dict[tuple[str, str], tuple[int, datetime | None]] = {}
        with redis_errors():
            for each in SafeQueue.all(self.connection, serializer=JSONSerializer):
                try:
                    model, _, priority = place_of(each.name)
                except ValueError:
                    continue  # somebody else's
                with self.connection.pipeline(transaction=False) as pipeline:
                    pipeline.llen(each.key)
                    pipeline.lindex(each.key, 0)
                    count, first = pipeline.execute()
                created = first and self.connection.hget(Job.key_for(first.decode()), "created_at")
                others, oldest = found.get((model, priority), (0, None))
                dates = [date for date in (oldest, _date(created)) if date]
                found[model, priority] = others + count, min(dates, default=None)
        return found

    def webhook_attempts(self) -> dict[str, int]:
        """Outcome -> how many attempts at webhooks ended so."""
        return self._counts(deliveries.OUTCOMES)

    def parked(self) -> dict[str, int]:
        """Schema version -> how often a worker that does not know it has set a job aside."""
        return self._counts(PARKED_COUNTS)

    def _counts(self, name: str) -> dict[str, int]:
        with redis_errors():
            found: Any = self.connection.hgetall(name)
        return {
            field.decode(): int(count)
            for field, count in found.items()
            if NAME.fullmatch(field) and COUNT.fullmatch(count)  # else it is forged
        }

    def announce(self, worker: str, model: Model, ttl_s: int, pace: Pace | None = None) -> None:
        """Say that a worker process holds a warm model. Redis' own clock decides when it lapses."""
        now, _ = self.connection.time()
        with self.connection.pipeline() as pipeline:
            pipeline.hset(MODELS, model.id, model.model_dump_json())
            pipeline.zadd(WORKERS, {f"{worker} {model.id}": now + ttl_s})
            pipeline.zremrangebyscore(WORKERS, "-inf", now - 3600)
            if pace:
                pipeline.set(PACE.format(worker), " ".join(map(str, pace)), ex=ttl_s)
            pipeline.execute()

    def withdraw(self, worker: str, model: Model) -> None:
        self.connection.zrem(WORKERS, f"{worker} {model.id}")

    def is_cancelled(self, id: str) -> bool:
        return bool(self.connection.exists(CANCELLED.format(id)))

    def _job(self, id: str, tenant: str | None = None) -> SafeJob:
        unknown = errors.NotFound(
            f"there is no generation {id!r}: it never was, or not for this key; it was deleted, or "
            "has expired; or Redis lost it in a failure, and then it must be submitted again"
        )
        try:
            job = SafeJob.fetch(id, self.connection, serializer=JSONSerializer)
        except RedisError:
            raise
        except Exception as error:  # there is none, or it is forged
            raise unknown from error
        if not isinstance(job.meta, dict) or tenant not in (None, job.meta.get("tenant")):
            raise unknown
        return job  # type: ignore[return-value]

    def _generation(self, job: Job) -> Generation:
        try:
            place_of(job.origin)
            request = GenerationRequest.model_validate(job.kwargs["request"])
            policy = job.meta.get("policy")
            policy = policy and PolicyApplied.model_validate(policy)
        except (DeserializationError, ValueError, KeyError, TypeError) as error:  # forged
            raise errors.NotFound(f"job {job.id!r} is no generation") from error
        status = STATUS.get(job.get_status(refresh=False), Status.QUEUED)
        generation = Generation(
            id=job.id,
            status=status,
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.ended_at if status.is_terminal else None,
            request=request,
            policy=policy,
        )
        if request.webhook is not None:
            generation.webhook = deliveries.delivery(self.connection, job.id, request.webhook)
        match status:
            case Status.QUEUED:
                asked = job.id, job.origin, request.megapixel_steps
                [(generation.position, generation.eta_s)] = self.turns.outlooks([asked])
            case Status.RUNNING:
                generation.progress = events.progress(self.connection, job.id)
                model, _, _ = place_of(job.origin)
                expected_s = run_s(self.turns.picture(model).paces, request.megapixel_steps)
                generation.eta_s = _left_s(generation, expected_s)
            case Status.SUCCEEDED:
                try:
                    result = Result.model_validate(job.return_value())
                except (ValueError, TypeError):  # forged, or of a version that is not known
                    generation.status = Status.FAILED
                    generation.error = errors.InternalError("its result cannot be read").problem
                    return generation
                for field in Result.model_fields:
                    setattr(generation, field, getattr(result, field))
            case Status.FAILED:
                generation.error = errors.InternalError(
                    "the worker failed unexpectedly; its log says more"
                ).problem
        if job.started_at and not generation.images:
            generation.images = events.images(self.connection, job.id)
        return generation


def _date(text: Any) -> datetime | None:
    try:
        return str_to_date(text) if text else None
    except ValueError:  # forged
        return None


def _left_s(generation: Generation, expected_s: float | None) -> float | None:
    """Seconds to the end of a running generation; None before its first step."""
    started_at, progress = generation.started_at, generation.progress
    if not started_at or not progress or not progress.step:
        return None
    spent_s = (datetime.now(UTC) - started_at.replace(tzinfo=UTC)).total_seconds()
    return left_s(max(0.0, spent_s), progress.step / progress.steps, expected_s)


def _microseconds(job: Job) -> int:
    return int(job.created_at.timestamp() * 1_000_000)


class redis_errors:
    """A `with` block that turns every error of Redis into QueueUnavailable."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RedisError):
            raise errors.QueueUnavailable(
                "Redis does not answer; try again shortly", retry_after_s=2
            ) from error
