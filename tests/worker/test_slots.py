"""Real worker processes on a real Redis: what happens to jobs when something dies."""

import hashlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from redis import Redis
from rq import Callback, Queue
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.webhook import Webhook

from safelatent import events
from safelatent.jobs import Jobs
from safelatent.queues import PARKED_COUNTS, TASK, queues
from safelatent.schema import Generation, GenerationRequest, Status
from safelatent.store import Store, image_key
from tests.worker import process
from tests.worker.running import NOTES
from worker.leases import ATTEMPTS, LEASE_S
from worker.supervisor import POISONED

PATIENCE_S = 120


class House:
    """A Redis, a store, worker processes on them, and the frontend's view of its jobs."""

    def __init__(self, redis: Any, checkpoint: Path, folder: Path):
        self.redis = redis
        self.connection = Redis.from_url(redis.url)
        self.jobs = Jobs(self.connection)
        self.store = Store(f"file://{folder}/store")
        self.log = folder / "worker.log"
        self.trace = folder / "trace"
        self.workers: list[BaseProcess] = []
        self.environment = {
            "REDIS_URL": redis.url,
            "SAFELATENT_MODEL": str(checkpoint),
            "SAFELATENT_STORE_URL": f"file://{folder}/store",
            "SAFELATENT_SLOTS": "4",
            "TRACE": str(self.trace),
        }

    def start_worker(self, **bent: Any) -> BaseProcess:
        worker = process.start(self.environment, self.log, **bent)
        self.workers.append(worker)
        return worker

    def await_warm(self, count: int = 1) -> None:
        self.wait(lambda: self.jobs.loaded() == {"tiny": count}, "a warm worker")

    def submit(self, seed: int, **changed: Any) -> str:
        defaults = {"steps": 12, "scheduler": "ddim", "safety": {"level": "max"}}
        body = {"model": "tiny", "prompt": "a cat", "seed": seed, **defaults, **changed}
        return self.jobs.submit(GenerationRequest.model_validate(body)).id

    def wait(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"no {what}:\n{self.log.read_text()[-5000:]}"
            time.sleep(0.05)

    def await_steps(self, *ids: str) -> None:
        """Until each of these is in the middle of its denoising."""
        self.wait(lambda: all(self.progress(id) for id in ids), f"progress of {ids}")

    def progress(self, id: str) -> int:
        latest = events.progress(self.connection, id)
        return latest.step if latest else 0

    def await_end(self, *ids: str) -> list[Generation]:
        self.wait(
            lambda: all(self.jobs.fetch(id).status.is_terminal for id in ids), f"end of {ids}"
        )
        return [self.jobs.fetch(id) for id in ids]

    def pixels(self, generation: Generation) -> list[np.ndarray]:
        """The pictures of a success, which are whole."""
        assert generation.status == Status.SUCCEEDED, generation.error
        pictures = []
        for image in generation.images:
            content = self.store.get(image_key(generation.id, image.index, image.sha256, "png"))
            assert hashlib.sha256(content).hexdigest() == image.sha256
            pictures.append(np.asarray(Image.open(io.BytesIO(content))))
            assert pictures[-1].shape == (image.height, image.width, 3)
        assert len(pictures) == generation.request.n
        return pictures

    def assert_succeeded_once(self, *ids: str) -> None:
        for generation in self.await_end(*ids):
            self.pixels(generation)
            job = self.job(generation.id)
            assert [result.type for result in job.results()] == [Result.Type.SUCCESSFUL]
            assert generation.id not in self.queued()

    def job(self, id: str) -> Job:
        return Job.fetch(id, self.connection, serializer=JSONSerializer)

    def finished(self) -> set[str]:
        entries = self.connection.xrange(events.STREAM)
        return {fields[b"finished"].decode() for _, fields in entries if b"finished" in fields}

    def attempts(self, id: str) -> int:
        return int(self.connection.get(ATTEMPTS.format(id)) or 0)

    def queued(self) -> list[str]:
        return [id for queue in queues("tiny", self.connection) for id in queue.job_ids]

    def end(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
        self.connection.close()


@pytest.fixture
def house(own_redis: Any, checkpoint: Path, tmp_path: Path) -> Iterator[House]:
    house = House(own_redis, checkpoint, tmp_path)
    yield house
    house.end()


def test_the_most_urgent_job_is_done_first_and_the_least_urgent_too(house):
    house.environment["SAFELATENT_SLOTS"] = "1"
    low = [house.submit(i, priority="low", steps=3) for i in range(2)]
    normal = [house.submit(i, priority="normal", steps=3) for i in range(2)]
    high = [house.submit(i, priority="high", steps=3, n=2) for i in range(2)]
    house.start_worker()
    in_order = [*high, *normal, *low]
    house.assert_succeeded_once(*in_order)
    assert sorted(in_order, key=lambda id: house.job(id).started_at) == in_order
    # Image i of a request is the image of seed + i, in whatever company it is made.
    pair, single = house.jobs.fetch(high[0]), house.jobs.fetch(high[1])
    assert [image.seed for image in pair.images] == [0, 1]
    apart = house.pixels(pair)[1].astype(int) - house.pixels(single)[0]
    assert abs(apart).max() <= 1


def test_when_a_worker_is_killed_another_does_its_jobs_once_each(house):
    victim = house.start_worker(step_s=1.5)
    held = [house.submit(i, steps=20) for i in range(4)]
    house.await_steps(*held)
    waiting = house.submit(9)
    house.start_worker()
    house.await_warm(2)
    house.assert_succeeded_once(waiting)
    victim.kill()
    killed_at = time.time()
    house.assert_succeeded_once(*held)
    taken = [house.job(id).started_at.timestamp() - killed_at for id in held]
    ended = [house.job(id).ended_at.timestamp() - killed_at for id in held]
    NOTES.append(
        f"kill -9 with 4 jobs in flight, lease {LEASE_S} s: taken over after "
        f"{min(taken):.1f} to {max(taken):.1f} s, all finished after {max(ended):.1f} s"
    )


def test_a_deadline_is_told_while_every_slot_is_busy(house):
    house.environment["SAFELATENT_SLOTS"] = "1"
    house.start_worker(lease_s=2, step_s=0.2)
    busy = house.submit(1, steps=500)
    house.await_steps(busy)
    [late] = house.await_end(house.submit(2, deadline_s=1))
    assert late.error.type == "/problems/deadline-exceeded"
    assert house.queued() == [] and house.jobs.fetch(busy).status == Status.RUNNING
    waited_s = (late.finished_at - late.created_at).total_seconds()
    NOTES.append(f"a deadline of 1 s, with the only slot busy: told after {waited_s:.1f} s")


def test_on_sigterm_a_worker_finishes_what_runs_takes_nothing_new_and_leaves_with_0(house):
    worker = house.start_worker(step_s=0.05)
    running = [house.submit(i, steps=40) for i in range(4)]
    house.await_steps(*running)
    queued = [house.submit(i) for i in range(2)]
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(PATIENCE_S)
    assert worker.exitcode == 0
    house.assert_succeeded_once(*running)
    assert house.queued() == queued
    assert house.jobs.loaded() == {}


def test_an_idle_worker_ends_on_sigterm_without_delay(house):
    worker = house.start_worker()
    house.await_warm()
    took_s = leave(worker, signals=1)
    assert house.jobs.loaded() == {}
    NOTES.append(f"SIGTERM to an idle worker: gone after {took_s:.2f} s")


def test_a_second_sigterm_hands_back_what_runs_and_costs_no_attempt(house):
    worker = house.start_worker(step_s=0.05)
    running = [house.submit(i, steps=500) for i in range(4)]
    house.await_steps(*running)
    later = house.submit(5)
    took_s = leave(worker, signals=2)
    NOTES.append(f"second SIGTERM with 4 jobs at work: gone after {took_s:.2f} s")
    assert sorted(house.queued()[:4]) == sorted(running) and house.queued()[4:] == [later]
    assert [house.attempts(id) for id in running] == [0] * 4


def test_what_outlasts_the_grace_period_is_handed_back(house):
    house.environment["SAFELATENT_GRACE_S"] = "1"
    worker = house.start_worker(step_s=0.05)
    running = house.submit(1, steps=500)
    house.await_steps(running)
    leave(worker, signals=1)
    assert house.queued() == [running]
    assert house.attempts(running) == 0


def test_a_worker_that_was_frozen_longer_than_its_lease_publishes_nothing(house):
    frozen = house.start_worker(lease_s=2, step_s=0.1)
    jobs = [house.submit(i, steps=60) for i in range(2)]
    house.await_steps(*jobs)
    os.kill(frozen.pid, signal.SIGSTOP)
    house.start_worker(lease_s=2)
    house.assert_succeeded_once(*jobs)
    images = {id: [image.sha256 for image in house.jobs.fetch(id).images] for id in jobs}
    house.wait(lambda: house.finished() >= set(jobs), "news of the end")
    seen = house.connection.xlen(events.STREAM)
    os.kill(frozen.pid, signal.SIGCONT)
    house.wait(lambda: house.log.read_text().count("was handed back; what came") == 2, "two drops")
    house.assert_succeeded_once(*jobs)
    assert images == {id: [i.sha256 for i in house.jobs.fetch(id).images] for id in jobs}
    # At most the step that was on its way to Redis when everything stood still.
    assert house.connection.xlen(events.STREAM) <= seen + 1
    assert not house.connection.keys("rq:execution*") and not house.connection.keys("rq:wip:*")


def test_when_redis_has_lost_all_a_worker_says_again_that_it_is_there(house):
    house.start_worker()
    house.await_warm()
    house.connection.flushall()
    flushed_at = time.monotonic()
    house.await_warm()
    took_s = time.monotonic() - flushed_at
    house.wait(lambda: house.connection.scard("rq:workers") == 4, "RQ workers")
    house.assert_succeeded_once(*[house.submit(i) for i in range(4)])
    NOTES.append(f"FLUSHALL: the worker was announced again after {took_s:.2f} s")


def leave(worker: BaseProcess, signals: int) -> float:
    """Ask a worker to end, so many times; how long that took it."""
    asked_at = time.monotonic()
    for _ in range(signals):
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.1)
    worker.join(PATIENCE_S)
    assert worker.exitcode == 0
    return time.monotonic() - asked_at


def test_a_cancelled_generation_stops_between_two_steps_and_its_neighbours_go_on(house):
    house.start_worker(step_s=0.05)
    stopped = house.submit(1, steps=500, n=2)
    neighbours = [house.submit(i, steps=40) for i in range(2, 5)]
    house.await_steps(stopped, *neighbours)
    queued = house.submit(6)
    house.jobs.cancel(queued)
    house.jobs.cancel(stopped)
    for generation in house.await_end(stopped, queued):
        assert generation.status == Status.CANCELLED
        assert generation.images == []
    house.assert_succeeded_once(*neighbours)
    entries = house.connection.xrange(events.STREAM)
    assert not any(
        f'"{stopped}": [500,'.encode() in fields.get(b"steps", b"") for _, fields in entries
    )
    finished = [fields[b"finished"].decode() for _, fields in entries if b"finished" in fields]
    assert finished.index(stopped) < min(finished.index(id) for id in neighbours)


def test_a_job_that_kills_its_workers_is_given_up_and_takes_no_other_with_it(house):
    bent = {"lease_s": 2, "step_s": 0.05, "poison_seed": 666}
    house.start_worker(**bent)
    innocents = [house.submit(i, steps=20) for i in range(3)]
    house.await_steps(*innocents)
    poison = house.submit(666)
    everybody = [poison, *innocents]
    crashes = 0

    def all_ended() -> bool:
        return all(house.jobs.fetch(id).status.is_terminal for id in everybody)

    while not all_ended():
        worker = house.workers[-1]
        house.wait(lambda worker=worker: all_ended() or not worker.is_alive(), "crash or end")
        if not worker.is_alive():
            crashes += 1
            assert crashes <= 3, house.log.read_text()[-5000:]
            house.start_worker(**bent)
    [failed] = house.await_end(poison)
    assert crashes == 3
    assert failed.status == Status.FAILED
    assert failed.error.type == "/problems/worker-crashed"
    house.assert_succeeded_once(*innocents)


def test_a_device_that_computes_no_more_ends_its_process_and_the_jobs_come_back(house):
    """The error is injected at the model: there is no broken device to test on."""
    says = "CUDA error: device-side assert triggered"
    worker = house.start_worker(step_s=0.05, poison_seed=666, says=says)
    innocent = house.submit(1, steps=500)
    house.await_steps(innocent)
    poison = house.submit(666)
    worker.join(PATIENCE_S)
    assert worker.exitcode == POISONED
    assert sorted(house.queued()) == sorted([innocent, poison])
    assert [house.attempts(id) for id in (innocent, poison)] == [1, 1]  # both are suspects


def test_when_redis_is_killed_and_comes_back_every_job_is_done_once(house):
    house.start_worker(lease_s=2, step_s=0.05)
    jobs = [house.submit(i, steps=steps) for i, steps in enumerate((10, 20, 40, 60, 20, 20, 20))]
    house.await_steps(*jobs[2:4])
    house.redis.kill()
    time.sleep(2.5)  # longer than a lease, and some end meanwhile
    house.redis.start()
    house.assert_succeeded_once(*jobs)
    assert [house.attempts(id) for id in jobs[2:4]] == [1, 1]  # what ran then has run once
    house.await_warm()
    again = [house.submit(i, steps=40) for i in range(10, 14)]
    house.await_steps(*again)  # at the same time: every slot has come back
    house.assert_succeeded_once(*again)


def test_an_end_waits_for_a_master_that_lacks_its_replicas(house):
    house.start_worker(step_s=0.05)
    id = house.submit(1, steps=40)
    house.await_steps(id)
    house.connection.config_set("min-replicas-to-write", 1)
    house.wait(lambda: f"the end of job {id} waits" in house.log.read_text(), "end that waits")
    house.connection.config_set("min-replicas-to-write", 0)
    house.assert_succeeded_once(id)
    assert house.attempts(id) == 1


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *anything: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_forged_job_runs_nothing_and_calls_nobody(house, webhook):
    """Whoever can write to Redis can put any job there; only generations are ever done."""
    url, asked = webhook
    trace = "tests.worker.process.trace"
    forger = Queue("tiny:open:high", house.connection, serializer=JSONSerializer)
    genuine = house.submit(1)
    extras = {
        "on_success": Callback(trace),
        "on_failure": Callback(trace),
        "on_stopped": Callback(trace),
        "webhooks": [Webhook(f"{url}/done", "finished"), Webhook(f"{url}/failed", "failed")],
    }
    kwargs = house.job(genuine).kwargs
    unknown = forger.enqueue(TASK, kwargs={**kwargs, "version": 99}, **extras)
    forged = [
        forger.enqueue("os.system", f"touch {house.trace}"),
        forger.enqueue(trace, **extras),
        forger.enqueue(TASK, kwargs={"version": 1, "request": {"prompt": 5}}, **extras),
        forger.enqueue(TASK, kwargs={**kwargs, "version": "99"}, **extras),
        forger.enqueue(TASK, kwargs=kwargs, **extras),
    ]
    house.start_worker()
    house.assert_succeeded_once(genuine)

    def statuses() -> list[str]:
        return [job.get_status().value for job in forged]

    house.wait(lambda: set(statuses()) <= {"finished", "failed"}, "end of the forged jobs")
    assert statuses() == ["failed"] * 4 + ["finished"]
    assert unknown.get_status() == "queued"
    assert unknown.id not in house.queued()
    assert house.connection.hgetall(PARKED_COUNTS) == {b"99": b"1"}
    assert not house.trace.exists()
    assert asked == []
