"""The RQ side of a worker: one stock RQ worker per batch slot, in threads, sharing one engine.

A slot takes a job, holds it under a lease (`worker.leases`), calls `worker.tasks.generate` and
stores the result, in RQ's own registries and with RQ's own loop. What it changes: signals belong to
the main thread, a job can be stopped while it runs, one beat renews the leases of all slots, only
one worker at a time looks for jobs whose worker died, and an end is written only by who still holds
the job, once Redis takes it.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ConnectionError, OutOfMemoryError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq import SimpleWorker
from rq.exceptions import StopRequested
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty
from rq.worker_registration import clean_worker_registry, register

from safelatent import events
from safelatent.errors import ServiceError
from safelatent.jobs import TIMEOUT_S
from safelatent.queues import SafeJob, SafeQueue
from safelatent.schema import SCHEMA_VERSION, Model, Progress
from worker import engine, leases, overdue
from worker.meter import Meter
from worker.tasks import Cancelled, Desk

log = logging.getLogger(__name__)

BEAT_S = 2
SWEEP_LOCK = "safelatent:sweep:queues:{}"
"""Of a model. If there were one for all, whoever beats first would keep it from the others."""
STORE_SWEEP_LOCK = "safelatent:sweep:store"
STORE_SWEEP_S = 3600
PAUSE_S = 0.5
"""Between two tries while Redis is away."""
PASSING = (ConnectionError, RedisTimeoutError, ReadOnlyError, OutOfMemoryError)
"""What Redis says while it is away, fails over or is full: the same command may work later."""
NO_REPLICAS = "NOREPLICAS"
"""So does the word of a master that lacks `min-replicas-to-write`; redis-py has no class for it."""


class Slot(SimpleWorker):
    """An RQ worker that runs one generation at a time, in a thread."""

    job_class = SafeJob
    queue_class = SafeQueue
    death_penalty_class = TimerDeathPenalty
    log_result_lifespan = False
    connection_timeout = 5
    """RQ would wait 415 s for a Redis that hangs, and never learn that another is master."""

    def __init__(self, model: str, desk: Desk, name: str):
        super().__init__(
            [model],  # what dashboards see; `turns` says in which queue the next job is
            name=name,
            connection=desk.jobs.connection,
            serializer=JSONSerializer,
            log_job_description=False,
        )
        self.desk = desk
        self.model = model
        self.stopping = threading.Event()
        self.claimed: Execution | None = None
        self.work_in_hand: tuple[Job, Execution] | None = None
        self.thread_id = 0

    def run(self) -> None:
        """Work until `stopping`, and come back when Redis does."""
        self.thread_id = threading.get_ident()
        while not self.stopping.is_set():
            try:
                self.work(logging_level="WARNING")
            except RedisError as error:
                log.warning("slot %s: Redis does not answer: %s", self.name, error)
            except Exception:
                log.exception("slot %s met a defect, and goes on", self.name)
            self.stopping.wait(PAUSE_S)

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue]:
        """The job whose turn it is (`safelatent.turns`)."""
        turns = self.desk.jobs.turns
        self.set_state("idle")
        while not self.stopping.is_set():
            self.heartbeat()
            if claimed := turns.claim(self.model, self.name, leases.LEASE_S):
                job, line, self.claimed = claimed
                return job, line
            turns.listen(self.model, 1)
        raise StopRequested

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Do a claimed job, unless it is for a worker of another version."""
        execution = self.claimed
        assert execution is not None
        if leases.park(job, execution, SCHEMA_VERSION):
            log.warning("job %s is of another schema version, and is left to who knows it", job.id)
            return
        self.executions[execution.id] = execution
        self.perform_job(job, queue, execution)

    def perform_job(self, job: Job, queue: Queue, execution: Execution) -> bool:
        self.work_in_hand = job, execution
        if self.desk.jobs.is_cancelled(job.id):  # while it was on its way here
            self._stopped_job_id = job.id
            self.desk.cancel(job.id)
        try:
            with self.desk.meter.busy():
                return bool(super().perform_job(job, queue, execution))
        finally:
            self.desk.isolation.leave()
            self.work_in_hand = None
            self.executions.pop(execution.id, None)

    def handle_execution_ended(self, job: Job, queue: Queue, heartbeat_ttl: int) -> None:
        """RQ's own would write to Redis, and forget the result if Redis is away."""
        job.ended_at = datetime.now(UTC)

    def handle_job_success(
        self, job: Job, queue: Queue, started_job_registry: Any, execution: Execution
    ) -> None:
        def write(pipeline: Pipeline) -> None:
            self.increment_successful_job_count(pipeline)
            ttl = job.get_result_ttl(self.default_result_ttl)
            job._handle_success(ttl, pipeline, **self._signature(job, execution))
            job.cleanup(ttl, pipeline, remove_from_queue=False)

        self._end(job, execution, write)

    def handle_job_failure(
        self,
        job: Job,
        queue: Queue,
        started_job_registry: Any = None,
        exc_string: str = "",
        execution: Execution | None = None,
    ) -> None:
        """Queue it again, or end it: a stopped one as stopped, any other as failed."""
        assert execution is not None
        is_stopped, retries = self._stopped_job_id == job.id, job.retries_left
        self._stopped_job_id = None

        def write(pipeline: Pipeline) -> None:
            self.increment_failed_job_count(pipeline)
            job.retries_left = retries
            job.enqueue_at_front_on_retry = True
            if job.should_retry and not is_stopped:
                job.retry(queue, pipeline)
                return
            status = JobStatus.STOPPED if is_stopped else JobStatus.FAILED
            job.set_status(status, pipeline=pipeline)
            job._handle_failure(exc_string, pipeline, **self._signature(job, execution))

        self._end(job, execution, write)

    def _end(self, job: Job, execution: Execution, write: Callable[[Pipeline], None]) -> None:
        """Write an end in one transaction, or drop it: it counts only if this execution still
        holds the job at that moment. While Redis is away the end is kept here."""
        fence = leases.fence(job.id)

        def transaction(pipeline: Pipeline) -> None:
            if pipeline.zscore(fence, execution.id) is None:
                raise LostLease
            pipeline.multi()
            write(pipeline)
            self.cleanup_execution(job, pipeline, execution)

        is_certain = True
        while True:
            try:
                self.connection.transaction(transaction, fence)
            except LostLease:
                if is_certain:
                    log.warning("job %s was handed back; what came of it is dropped", job.id)
                    return
                # The answer to the transaction may have got lost, and not the lease.
            except RedisError as error:
                if not isinstance(error, PASSING) and NO_REPLICAS not in str(error):
                    raise
                log.warning("the end of job %s waits for Redis: %s", job.id, error)
                is_certain = False
                time.sleep(PAUSE_S)
                continue
            break
        try:
            if JobStatus(job.get_status()) in ENDED:
                events.publish_finished(self.connection, job.id)
        except (RedisError, ValueError) as error:
            log.warning("the end of job %s is not announced: %s", job.id, error)

    def _signature(self, job: Job, execution: Execution) -> dict[str, Any]:
        return {
            "worker_name": self.name,
            "execution_id": execution.id,
            "execution_started_at": execution.created_at,
            "execution_ended_at": job.ended_at,
        }

    def kill_horse(self, sig: Any = None) -> None:
        """Called in the thread of RQ's commands, when the running job is to be stopped."""
        if self._stopped_job_id is not None:
            self.desk.cancel(self._stopped_job_id)

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """A cancelled generation is no error, and needs no traceback in the log."""
        if not isinstance(exc_info[1], Cancelled):
            super().handle_exception(job, *exc_info)

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        super().prepare_job_execution(job)  # it is in no list any more since it was claimed

    def _pubsub_exception_handler(self, error: Exception, *of: Any) -> None:
        """RQ subscribes again after a ConnectionError, and never after a timeout."""
        if isinstance(error, RedisTimeoutError):
            error = ConnectionError(str(error))
        super()._pubsub_exception_handler(error, *of)

    def unsubscribe(self) -> None:
        """RQ would wait a second for its thread, which waits for a message."""
        if self.pubsub_thread:
            self.pubsub_thread.stop()

    def register_birth(self) -> None:
        """RQ refuses a name that is registered: ours may be, after an outage, and is ours alone."""
        self.connection.delete(self.key)
        super().register_birth()  # type: ignore[no-untyped-call]

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """RQ forgets a worker, and what it held, when its leases have lapsed too."""
        super().heartbeat(leases.LEASE_S, pipeline)

    def run_maintenance_tasks(self) -> None:
        """Nothing: `Slots` does it for all."""

    def _install_signal_handlers(self) -> None:
        """Nothing: signals belong to the main thread."""


class LostLease(Exception):
    """Another worker has the job, or it was deleted."""


ENDED = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED)


class Slots:
    """All slots of a process, and the beat that keeps their leases and finds lost jobs."""

    def __init__(self, count: int, model: Model, desk: Desk, name: str):
        self.name = name
        self.model = model
        self.desk = desk
        self.connection = desk.jobs.connection
        self.slots = [Slot(model.id, desk, f"{self.name}-{i}") for i in range(count)]
        self._threads = [
            threading.Thread(target=slot.run, name=f"slot-{i}") for i, slot in enumerate(self.slots)
        ]
        self._stopping = threading.Event()
        self._beat = threading.Thread(target=self._beat_until_stopped, name="beat")
        self._renewed_at = time.monotonic()

    def start(self) -> None:
        for thread in (*self._threads, self._beat):
            thread.start()

    def close(self) -> None:
        """Take no new job."""
        for slot in self.slots:
            slot.stopping.set()

    @property
    def are_busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        """Wait for the slots, and say that this worker is gone."""
        for thread in self._threads:
            thread.join()
        self._stopping.set()
        self._beat.join()

    def hand_back(self, is_counted: bool) -> int:
        """Put what runs back at the front of its queue; no end of it can be written any more.

        `is_counted` says whether what had begun to run has used up an attempt. How many it were.
        """
        self.close()  # or an idle slot of ours would take at once what is handed back
        count = 0
        for slot in self.slots:
            if (work := slot.work_in_hand) is None:
                continue
            job, execution = work
            held = leases.Held(job.id, execution.id, job.origin)
            counts = is_counted or not self.desk.has_begun(slot.thread_id)
            try:
                count += leases.hand_back(self.connection, held, is_counted=counts)
            except RedisError as error:
                log.warning("job %s comes back when its lease lapses: %s", job.id, error)
        self._withdraw()
        return count

    def is_sure(self) -> bool:
        """Whether no lease of ours can have lapsed, by our own clock alone."""
        return time.monotonic() < self._renewed_at + leases.LEASE_S

    def _beat_until_stopped(self) -> None:
        # After an outage every worker must have time to renew its leases before anyone judges them.
        may_sweep_at = time.monotonic() + leases.LEASE_S
        while not self._stopping.is_set():
            try:
                self._renew()
                if time.monotonic() > may_sweep_at:
                    self._sweep()
            except RedisError as error:
                log.warning("beat: Redis does not answer: %s", error)
                may_sweep_at = time.monotonic() + leases.LEASE_S
            except Exception:  # whoever forges what a sweep reads must not end the leases
                log.exception("the beat met a defect, and goes on")
            self._stopping.wait(BEAT_S)
        self._withdraw()

    def _withdraw(self) -> None:
        try:
            self.desk.jobs.withdraw(self.name, self.model)
        except RedisError:
            pass  # the announcement lapses by itself

    def _renew(self) -> None:
        """Say that we are there, as if for the first time: Redis may have forgotten all."""
        began = time.monotonic()
        pace = self.desk.meter.pace(len(self.slots))
        self.desk.jobs.announce(self.name, self.model, ttl_s=leases.LEASE_S, pace=pace)
        held = [(slot, work) for slot in self.slots if (work := slot.work_in_hand) is not None]
        with self.connection.pipeline(transaction=False) as pipeline:
            for _, (_, execution) in held:
                leases.renew(pipeline, execution)
            for slot in self.slots:
                if slot.birth_date is not None and not slot.stopping.is_set():
                    register(slot, pipeline)
                    pipeline.hset(slot.key, mapping=slot.serialize())
                    slot.heartbeat(pipeline=pipeline)
            answers = pipeline.execute()
        self._renewed_at = began
        for (slot, work), is_held in zip(held, answers, strict=False):
            if not is_held and slot.work_in_hand is work:
                log.warning("job %s was handed back while it ran here", work[0].id)
                self.desk.abandon(slot.thread_id)

    def _sweep(self) -> None:
        """Queue again what dead workers held, and end what is overdue; one worker of a model does
        it for all of them."""
        lock = SWEEP_LOCK.format(self.model.id)
        if self.connection.set(lock, self.name, nx=True, px=BEAT_S * 1000):
            for each in self.desk.jobs.turns.held(self.model.id):
                leases.hand_back_lapsed(each)
            leases.unpark(self.connection, self.model.id, SCHEMA_VERSION)
            self.desk.jobs.turns.tidy(self.model.id)
            overdue.end(self.desk, self.model.id, self.name)
            clean_worker_registry(Queue(self.model.id, self.connection))
        if self.connection.set(STORE_SWEEP_LOCK, self.name, nx=True, ex=STORE_SWEEP_S):
            # A large store takes minutes to list, and a lease does not wait for it.
            threading.Thread(target=self._sweep_store, name="store-sweep", daemon=True).start()

    def _sweep_store(self) -> None:
        """Remove what generations have left that are no more: expired, deleted or lost."""
        try:
            for id in self.desk.store.older_than(TIMEOUT_S):
                if not self.connection.exists(Job.key_for(id)):
                    log.info("the store still had files of generation %s, which is gone", id)
                    self.desk.store.delete(id)
            for id in events.in_progress(self.connection):
                if not self.connection.exists(Job.key_for(id)):
                    events.forget_progress(self.connection, id)
        except (RedisError, ServiceError) as error:
            log.warning("the store is swept again in %d s: %s", STORE_SWEEP_S, error)
        except Exception:  # or the thread would end with a traceback that no log has
            log.exception("the sweep of the store met a defect, and comes again")


class ProgressReporter:
    """Publishes the engine's steps from a thread of its own, so that no step waits for Redis.

    While `is_sure` says no, somebody else may have the jobs, and nothing is published.
    """

    def __init__(self, connection: Redis, meter: Meter, is_sure: Callable[[], bool]):
        self.connection = connection
        self.meter = meter
        self.is_sure = is_sure
        self._steps: queue.SimpleQueue[dict[str, Progress] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._publish_until_stopped, name="progress")
        self._thread.start()

    def after_step(self, images: Sequence[engine.Image]) -> None:
        """The engine's callback: a generation is as far as the slowest of its images."""
        self.meter.count(images)
        steps: dict[str, Progress] = {}
        for image in images:
            step = round(image.call * image.spec.steps / image.calls)
            if image.owner not in steps or step < steps[image.owner].step:
                steps[image.owner] = Progress(step=step, steps=image.spec.steps)
        self._steps.put(steps)

    def stop(self) -> None:
        self._steps.put(None)
        self._thread.join()

    def _publish_until_stopped(self) -> None:
        while (steps := self._steps.get()) is not None:
            if not self.is_sure():
                continue
            try:
                events.publish_steps(self.connection, steps)
            except RedisError as error:
                log.warning("progress is not published, Redis does not answer: %s", error)
