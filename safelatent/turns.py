"""Whose turn it is: tenants share a model's workers by weight, whatever they queue.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). Each tenant with queued jobs has a
virtual time at which its next job may start, and the least is next; a job moves its tenant's time
on by its cost over the tenant's weight. The model's clock is the time at which the last job was
started, and nobody starts before it: whoever was idle, or held back, has saved up nothing. Inside
a tenant a higher priority goes first, then the older job.
"""

import logging
import random
import time
import uuid
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError
from rq.exceptions import NoSuchJobError
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job, JobStatus
from rq.registry import StartedJobRegistry, clean_registries
from rq.serializers import JSONSerializer
from rq.utils import as_text

from safelatent.forecast import Line, Pace, ahead, run_s, until_start_s
from safelatent.queues import (
    BELL,
    PRIORITIES,
    TENANTS,
    TURNS,
    SafeJob,
    SafeQueue,
    place_of,
    queue,
    queue_name,
    queues,
)

log = logging.getLogger(__name__)

WORKERS = "safelatent:workers"
"""Worker processes that hold a model warm, by the time at which that lapses."""
PACE = "safelatent:pace:{}"
"""Of a worker: how fast it was lately."""
CLOCK = "safelatent:clock:{}"
SHARE = "safelatent:share:{}:{}"
"""Of a model and a tenant: weight, max_running, cost (mean of a job's)."""
COST = "cost"
"""The field of a job's hash in which its cost stands; RQ leaves it alone."""
REGISTERED_S = 2 * 3600
"""How long RQ's own registries believe in an execution: longer than any job may run, so that only
who sees that its lease has lapsed ends one early, and never RQ's clean-up, which goes by the clock
of who asks for it."""

PICTURE_S = 0.5
"""How old a picture of the queue may be that positions, ETAs and bounds are told by."""


class Share(NamedTuple):
    """What a tenant may have of a model's workers."""

    weight: float = 1
    max_running: int | None = None


class Picture(NamedTuple):
    """A model's queue at a moment."""

    running: int
    """Its jobs in workers' hands."""
    lines: dict[str, Line]
    """The tenants with queued jobs."""
    paces: list[Pace]
    """Of the live workers."""

    @property
    def queued(self) -> int:
        return sum(line.queued for line in self.lines.values())


class Turns:
    """The queues of all models in one Redis."""

    def __init__(self, connection: Redis):
        here = files("safelatent")
        self.connection = connection
        self._claim = connection.register_script((here / "claim.lua").read_text())
        self._look = connection.register_script((here / "look.lua").read_text())
        self._pictures: dict[str, tuple[float, Picture]] = {}
        self._entered: dict[str, int] = {}

    def enter(
        self, line: SafeQueue, job: Job, cost: float, share: Share, pipeline: Pipeline
    ) -> None:
        """Note what a job costs that is being queued, and what its tenant may have."""
        model, tenant, _ = place_of(line.name)
        name = SHARE.format(model, tenant)
        pipeline.hset(job.key, COST, str(cost))
        pipeline.hset(name, "weight", str(share.weight))
        pipeline.hset(name, "max_running", str(share.max_running or ""))
        pipeline.hsetnx(name, "cost", str(cost))
        self._entered[model] = self._entered.get(model, 0) + 1

    def claim(
        self, model: str, worker: str, lease_s: int
    ) -> tuple[Job, SafeQueue, Execution] | None:
        """Start the job whose turn it is, or None when there is none that may start.

        One script takes it from its queue and starts an execution of it for an RQ worker, so that
        a job is never in two hands and never in none. Who does not renew the execution's hash
        within `lease_s` has lost it.
        """
        execution = Execution(uuid.uuid4().hex, "", self.connection, worker)
        keys = [*(key.format(model) for key in (TURNS, CLOCK, BELL))]
        any_queue = queue_name(_literal(model), "%s", "%s")
        names = [
            SafeQueue(any_queue, self.connection).key,
            StartedJobRegistry(any_queue, self.connection).key,
            as_text(SafeJob.key_for("%s")),
            ExecutionRegistry("%s", self.connection).key,
            Execution.from_composite_key("%s:", self.connection).key.rstrip(":"),
            SHARE.format(_literal(model), "%s"),
        ]
        lease: list[str | int] = [execution.id, worker, lease_s, REGISTERED_S]
        while taken := self._claim(
            [*keys, execution.worker_executions_key], [*names, *lease, *PRIORITIES]
        ):
            id, tenant, priority = (each.decode() for each in taken)
            execution.job_id = id
            where = queue(model, tenant, priority, self.connection)
            try:
                job = SafeJob.fetch(id, self.connection, serializer=JSONSerializer)
                execution._job = job
                return job, where, execution
            except NoSuchJobError:
                pass  # deleted in this moment
            except RedisError:
                raise  # the lease will lapse, and the job is queued again
            except Exception:  # forged: no sweep may stumble over it again
                log.exception("job %s cannot be read, and is dropped", id)
                self.connection.hset(SafeJob.key_for(id), "status", JobStatus.FAILED)
            with self.connection.pipeline() as pipeline:
                gone = SafeJob(id, self.connection)
                gone.origin = where.name
                execution.delete(gone, pipeline)
                pipeline.execute()
        return None

    def listen(self, model: str, seconds: float) -> None:
        """Sleep until a job is queued, or so long. A ring that is lost costs no more than that."""
        self.connection.blpop([BELL.format(model)], seconds)

    def held(self, model: str) -> list[SafeQueue]:
        """The queues of which jobs are in workers' hands."""
        known = queues(model, self.connection)
        with self.connection.pipeline(transaction=False) as pipeline:
            for each in known:
                pipeline.exists(StartedJobRegistry(each.name, self.connection).key)
            return [each for each, exists in zip(known, pipeline.execute(), strict=True) if exists]

    def tidy(self, model: str) -> None:
        """Line up what RQ has queued by itself, and shorten RQ's lists of ended jobs: of one queue
        in turn, or they would grow for ever."""
        known = queues(model, self.connection)
        if known:
            clean_registries(random.choice(known))
        with self.connection.pipeline(transaction=False) as pipeline:
            for each in known:
                pipeline.exists(each.key)
            for each, exists in zip(known, pipeline.execute(), strict=True):
                if exists:
                    each.line_up(pipeline)
            pipeline.execute()

    def picture(self, model: str, fresh: bool = False) -> Picture:
        """The model's queue now, or up to `PICTURE_S` ago."""
        now = time.monotonic()
        seen_at, picture = self._pictures.get(model, (0.0, None))
        if picture is None or fresh or now - seen_at > PICTURE_S:
            any_queue = queue_name(_literal(model), "%s", "%s")
            names = [
                SafeQueue(any_queue, self.connection).key,
                StartedJobRegistry(any_queue, self.connection).key,
                SHARE.format(_literal(model), "%s"),
                PACE.format("%s"),
            ]
            keys = [TURNS.format(model), CLOCK.format(model), TENANTS.format(model), WORKERS]
            picture = _picture(self._look(keys, [model, *names, *PRIORITIES]))
            self._pictures[model] = now, picture
            self._entered[model] = 0
        return picture

    def queued(self, model: str, tenant: str | None = None) -> int:
        """Queued jobs of a tenant now, or of all as the last picture has them and as this process
        has queued since."""
        if tenant is None:
            return self.picture(model).queued + self._entered.get(model, 0)
        with self.connection.pipeline(transaction=False) as pipeline:
            for priority in PRIORITIES:
                pipeline.llen(queue(model, tenant, priority, self.connection).key)
            return sum(pipeline.execute())

    def outlooks(
        self, jobs: Sequence[tuple[str, str, float]]
    ) -> list[tuple[int | None, float | None]]:
        """Position and ETA in seconds of queued jobs, each given by its id, its queue's name and
        its cost: how many jobs start before it, and when it will have ended.

        Its own tenant's are counted; of the others' it is how many fair queueing lets go first,
        as `forecast.ahead` says and up to `PICTURE_S` ago. Both are None while the job is in no
        queue, and the ETA before any worker has been measured. Of 200 jobs of two tenants half took
        1.06 times the ETA that they were told as they were queued, or less, and 95 % took 0.9 to
        2.3 times (`python -m benchmarks fairness`); what others queue later, it cannot know.
        """
        with self.connection.pipeline(transaction=False) as pipeline:
            for id, origin, _ in jobs:
                model, tenant, priority = place_of(origin)
                for each in PRIORITIES:
                    pipeline.llen(queue(model, tenant, each, self.connection).key)
                here = queue(model, tenant, priority, self.connection).key
                pipeline.lpos(here, id, rank=-1)  # from the end, where a new one is
            answers = iter(pipeline.execute())
        found: list[tuple[int | None, float | None]] = []
        for _, origin, cost in jobs:
            model, tenant, priority = place_of(origin)
            lengths = [next(answers) for _ in PRIORITIES]
            place = next(answers)
            if place is None:
                found.append((None, None))
            else:
                own = sum(lengths[: PRIORITIES.index(priority)]) + place
                found.append(self._outlook(model, tenant, own, cost))
        return found

    def _outlook(
        self, model: str, tenant: str, own: int, cost: float
    ) -> tuple[int | None, float | None]:
        picture = self.picture(model)
        if tenant not in picture.lines:
            picture = self.picture(model, fresh=True)
        if tenant not in picture.lines:
            return None, None  # it has just been taken
        jobs, before = ahead(picture.lines, tenant, own)
        start_s = until_start_s(picture.paces, picture.running, jobs, before, cost)
        spent_s = run_s(picture.paces, cost)
        if start_s is None or spent_s is None:
            return jobs, None
        if most := picture.lines[tenant].max_running:
            start_s = max(start_s, (own // most) * spent_s)
        return jobs, start_s + spent_s


def _literal(text: str) -> str:
    """Text in a pattern of Lua's `string.format`, as it stands."""
    return text.replace("%", "%%")


def _picture(seen: Any) -> Picture:
    clock, running, lines, paces = seen
    return Picture(
        running=running,
        lines={
            tenant.decode(): Line(
                may_start=max(float(clock), float(may_start)),
                weight=float(weight),
                max_running=int(max_running or 0) or None,
                cost=float(cost),
                queued=queued,
            )
            for tenant, may_start, weight, max_running, cost, queued in lines
        },
        paces=[_pace(each.decode()) for each in paces],
    )


def _pace(text: str) -> Pace:
    """A worker that does not say how fast it is, is not measured."""
    throughput, each, slots = text.split(" ") if text else ("0", "0", "0")
    return Pace(float(throughput), float(each), int(slots))
