"""A suspect of a crash runs alone, from before its attempt is counted until its end is written."""

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from redis import Redis
from rq import get_current_job
from rq.timeouts import JobTimeoutException

from safelatent.jobs import Jobs
from safelatent.schema import GenerationRequest
from worker import slots, tasks
from worker.isolation import Isolation

PATIENCE_S = 60


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_suspect_waits_for_what_runs_and_who_comes_later_behind_it():
    isolation, order = Isolation(), []

    def run(name: str, alone: bool) -> None:
        isolation.enter(alone)
        order.append(name)
        isolation.leave()

    with ThreadPoolExecutor(3) as pool:
        isolation.enter(alone=False)
        suspect = pool.submit(run, "suspect", True)
        wait(lambda: isolation._suspects)
        later = pool.submit(run, "later", False)
        time.sleep(0.1)
        assert order == []
        isolation.leave()
        suspect.result(PATIENCE_S)
        later.result(PATIENCE_S)
    assert order == ["suspect", "later"]


def test_a_suspect_that_gives_up_waiting_leaves_the_way_free():
    """As when RQ stops it, because it has waited for longer than a job may run."""
    isolation, gave_up = Isolation(), threading.Event()

    def suspect() -> None:
        try:
            isolation.enter(alone=True)
        except JobTimeoutException:
            gave_up.set()
        finally:
            isolation.leave()

    isolation.enter(alone=False)
    thread = threading.Thread(target=suspect)
    thread.start()
    wait(lambda: isolation._suspects)
    identity, error = ctypes.c_long(thread.ident), ctypes.py_object(JobTimeoutException)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, error)
    assert gave_up.wait(PATIENCE_S)
    thread.join()
    innocent = threading.Thread(target=isolation.enter, args=(False,), daemon=True)
    innocent.start()
    innocent.join(PATIENCE_S)
    assert not innocent.is_alive()


def test_the_next_suspect_does_not_run_before_the_end_of_the_last_is_written(
    connection: Redis, monkeypatch
):
    """Else it could end the process then, and the one that was made would count an attempt more."""
    isolation, order = Isolation(), []
    desk: Any = SimpleNamespace(
        jobs=Jobs(connection), meter=SimpleNamespace(busy=nullcontext), isolation=isolation
    )
    request = GenerationRequest(prompt="a cat", model="tiny", seed=1)
    ids = [desk.jobs.submit(request).id for _ in range(2)]

    def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
        isolation.enter(alone=True)
        order.append(("made", get_current_job().id))
        wait(lambda: len(isolation._suspects) == 2)  # the other one stands at the door
        return {}

    written = slots.Slot._end

    def end(self: slots.Slot, job: Any, execution: Any, write: Any) -> None:
        time.sleep(0.3)
        written(self, job, execution, write)
        order.append(("written", job.id))

    monkeypatch.setattr(tasks, "generate", generate)
    monkeypatch.setattr(slots.Slot, "_end", end)

    def work(name: str) -> None:
        slot = slots.Slot("tiny", desk, name)
        job, line = slot.dequeue_job_and_maintain_ttl(None)
        slot.execute_job(job, line)

    threads = [threading.Thread(target=work, args=(f"played-{i}",)) for i in range(2)]
    for thread in threads:
        thread.start()
    wait(lambda: len(order) >= 2)
    isolation._suspects.add(0)  # so that the last one meets a second, too
    for thread in threads:
        thread.join(PATIENCE_S)
    first, last = order[0][1], order[-1][1]
    assert {first, last} == set(ids)
    assert order == [("made", first), ("written", first), ("made", last), ("written", last)]
