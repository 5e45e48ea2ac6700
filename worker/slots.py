"""The RQ side of a worker: one stock RQ worker per batch slot, in threads, sharing one engine.

A slot takes a job, holds it in the StartedJobRegistry under a short lease, calls
`worker.tasks.generate` and stores the result, all with RQ's own code. What it changes: signals
belong to the main thread, a job can be stopped while it runs, one beat renews the leases of all
slots, and only one worker at a time looks for jobs whose worker died.
"""

import logging
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import SimpleWorker
from rq.exceptions import StopRequested
from rq.executions import Execution
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty

from safelatent import events
from safelatent.queues import SafeJob, SafeQueue
from safelatent.schema import Model, Progress
from worker import engine
from worker.meter import Meter
from worker.tasks import Cancelled, Desk

log = logging.getLogger(__name__)

LEASE_S = 10
"""A job whose lease ran out was lost with its worker, and is queued again."""
BEAT_S = 2
SWEEP_LOCK = "safelatent:sweep"


class Slot(SimpleWorker):
    """An RQ worker that runs one generation at a time, in a thread."""

    job_class = SafeJob
    queue_class = SafeQueue
    death_penalty_class = TimerDeathPenalty
    log_result_lifespan = False

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
        self.work_in_hand: tuple[Job, Execution] | None = None

    def run(self) -> None:
        """Work until `stopping`, and come back when Redis does."""
        while not self.stopping.is_set():
            try:
                self.work(logging_level="WARNING")
            except RedisError as error:
                log.warning("slot %s: Redis does not answer: %s", self.name, error)
            self.stopping.wait(0.5)

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue]:
        """The job whose turn it is (`safelatent.turns`)."""
        turns = self.desk.jobs.turns
        self.set_state("idle")
        while not self.stopping.is_set():
            self.heartbeat()
            if claimed := turns.claim(self.model, LEASE_S):
                return claimed
            turns.listen(self.model, 1)
        raise StopRequested

    def prepare_execution(self, job: Job) -> Execution:
        execution: Execution = super().prepare_execution(job)
        self.desk.jobs.turns.confirm(job)
        return execution

    def perform_job(self, job: Job, queue: Queue, execution: Execution) -> bool:
        self.work_in_hand = job, execution
        if self.desk.jobs.is_cancelled(job.id):  # while it was on its way here
            self._stopped_job_id = job.id
            self.desk.cancel(job.id)
        try:
            with self.desk.meter.busy():
                return bool(super().perform_job(job, queue, execution))
        finally:
            self.work_in_hand = None
            events.publish_finished(self.connection, job.id)

    def kill_horse(self, sig: Any = None) -> None:
        """Called in the thread of RQ's commands, when the running job is to be stopped."""
        if self._stopped_job_id is not None:
            self.desk.cancel(self._stopped_job_id)

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """A cancelled generation is no error, and needs no traceback in the log."""
        if not isinstance(exc_info[1], Cancelled):
            super().handle_exception(job, *exc_info)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        return LEASE_S

    def run_maintenance_tasks(self) -> None:
        """Nothing: `Slots` does it for all."""

    def _install_signal_handlers(self) -> None:
        """Nothing: signals belong to the main thread."""


class Slots:
    """All slots of a process, and the beat that keeps their leases and finds lost jobs."""

    def __init__(self, count: int, model: Model, desk: Desk):
        self.name = uuid.uuid4().hex[:12]
        self.model = model
        self.desk = desk
        self.connection = desk.jobs.connection
        self.slots = [Slot(model.id, desk, f"{self.name}-{i}") for i in range(count)]
        self._threads = [
            threading.Thread(target=slot.run, name=f"slot-{i}") for i, slot in enumerate(self.slots)
        ]
        self._stopping = threading.Event()
        self._beat = threading.Thread(target=self._beat_until_stopped, name="beat")

    def start(self) -> None:
        for thread in (*self._threads, self._beat):
            thread.start()

    def drain(self) -> None:
        """Take no new job, let the running ones end, go."""
        for slot in self.slots:
            slot.stopping.set()
        for thread in self._threads:
            thread.join()
        self._stopping.set()
        self._beat.join()

    def _beat_until_stopped(self) -> None:
        # After an outage every worker must have time to renew its leases before anyone judges them.
        may_sweep_at = time.monotonic() + LEASE_S
        while not self._stopping.is_set():
            try:
                self._renew()
                if time.monotonic() > may_sweep_at:
                    self._sweep()
            except RedisError as error:
                log.warning("beat: Redis does not answer: %s", error)
                may_sweep_at = time.monotonic() + LEASE_S
            self._stopping.wait(BEAT_S)
        try:
            self.desk.jobs.withdraw(self.name, self.model)
        except RedisError:
            pass  # the announcement lapses by itself

    def _renew(self) -> None:
        pace = self.desk.meter.pace(len(self.slots))
        self.desk.jobs.announce(self.name, self.model, ttl_s=LEASE_S, pace=pace)
        for slot in self.slots:
            if slot.work_in_hand is not None:
                slot.maintain_heartbeats(*slot.work_in_hand)

    def _sweep(self) -> None:
        """Queue again what dead workers held. One worker at a time is enough: so, a lock."""
        if self.connection.set(SWEEP_LOCK, self.name, nx=True, px=BEAT_S * 1000):
            self.desk.jobs.turns.sweep(self.model.id)


class ProgressReporter:
    """Publishes the engine's steps from a thread of its own, so that no step waits for Redis."""

    def __init__(self, connection: Redis, meter: Meter):
        self.connection = connection
        self.meter = meter
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
            try:
                events.publish_steps(self.connection, steps)
            except RedisError as error:
                log.warning("progress is not published, Redis does not answer: %s", error)
