"""The store under stress: writers that die, generations that are gone."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from safelatent import events
from safelatent.errors import NotFound
from safelatent.jobs import KEPT_S, OPEN, Jobs
from safelatent.schema import GenerationRequest, Progress
from safelatent.store import Store, image_key
from tests.conftest import RedisServer
from tests.service.played import CARD
from worker import leases
from worker.slots import STORE_SWEEP_LOCK, SWEEP_LOCK, Slots

SIZE = 4 << 20
WRITER = f"""
import sys
from safelatent.store import Store
store = Store(sys.argv[1])
for i in range(10**6):
    store.put("f00/0.png", bytes([i % 251]) * {SIZE})
"""


def test_a_writer_that_is_killed_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    store, cut = Store(url), 0
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, url])
        deadline = time.monotonic() + 60
        while not (tmp_path / "f00" / "0.png").exists():
            assert time.monotonic() < deadline
        for _ in range(20):  # also while it writes
            content = store.get("f00/0.png")
            assert len(content) == SIZE and set(content) == {content[0]}
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        content = store.get("f00/0.png")
        assert len(content) == SIZE and set(content) == {content[0]}
        cut += len(list((tmp_path / "f00").iterdir())) - 1
    store.delete("f00")


FULL = f"""
import resource, sys
from safelatent.errors import StoreUnavailable
from safelatent.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, ({SIZE // 2}, {SIZE // 2}))  # as a full disk: half fits
try:
    Store(sys.argv[1]).put(sys.argv[2], b"1" * {SIZE})
except StoreUnavailable as error:
    print(error)
"""


def test_what_does_not_fit_into_the_store_is_an_error_and_leaves_what_was_there(
    tmp_path: Path,
) -> None:
    store = Store(f"file://{tmp_path}")
    store.put("f00/0.png", b"0")
    for key in ("f00/0.png", "f00/1.png"):
        command = [sys.executable, "-c", FULL, f"file://{tmp_path}", key]
        done = subprocess.run(command, capture_output=True, text=True)
        assert f"cannot write {key}" in done.stdout, done.stderr
    assert store.get("f00/0.png") == b"0"
    with pytest.raises(NotFound):
        store.get("f00/1.png")


def test_two_images_of_one_generation_never_share_a_name() -> None:
    """Whoever made it again, perhaps a bit apart, cannot overwrite what the first has reported."""
    older, newer = (image_key("f00", 0, letter * 64, "png") for letter in "ab")
    assert older != newer


def test_the_sweep_removes_what_is_gone_and_old_and_nothing_else(
    connection: Redis, tmp_path: Path
) -> None:
    store, jobs = Store(f"file://{tmp_path}"), Jobs(connection)
    alive = jobs.submit(GenerationRequest(prompt="a cat", model="tiny", seed=1)).id
    gone, fresh, others = str(uuid.uuid4()), str(uuid.uuid4()), "holiday"
    for id in (alive, gone, fresh, others):
        store.put(f"{id}/0.png", b"pixels")
    long_ago = time.time() - KEPT_S - 60
    for id in (alive, gone, others):
        os.utime(tmp_path / id / "0.png", (long_ago, long_ago))
    events.publish_steps(connection, dict.fromkeys((alive, gone), Progress(step=1, steps=2)))
    slots(store, jobs)._sweep_store()
    assert {folder.name for folder in tmp_path.iterdir()} == {alive, fresh, others}
    assert events.progress(connection, alive) and not events.progress(connection, gone)


def test_of_all_workers_of_a_model_one_sweeps_and_those_of_others_do_not_count(
    connection: Redis, tmp_path: Path
) -> None:
    jobs = Jobs(connection)
    jobs.submit(GenerationRequest(prompt="a cat", model="tiny", seed=1))
    jobs.turns.claim("tiny", "dead-0", 1)
    connection.delete(*connection.keys("rq:execution:*"))
    connection.set(SWEEP_LOCK.format("tiny"), "another of ours", ex=60)
    beating = slots(Store(f"file://{tmp_path}"), jobs)
    beating._sweep()
    assert not jobs.turns.queued("tiny", OPEN)
    connection.delete(SWEEP_LOCK.format("tiny"))
    connection.set(SWEEP_LOCK.format("other"), "one of theirs", ex=60)
    beating._sweep()
    assert jobs.turns.queued("tiny", OPEN) == 1


@pytest.mark.parametrize("since", ["its start", "an outage"])
def test_a_worker_judges_no_lease_before_all_had_the_time_to_renew_theirs(
    own_redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since: str
) -> None:
    connection = Redis.from_url(own_redis.url)
    jobs = Jobs(connection)
    jobs.submit(GenerationRequest(prompt="a cat", model="tiny", seed=1))
    beating = slots(Store(f"file://{tmp_path}"), jobs)
    beats, failed = threading.Semaphore(0), threading.Event()

    def renew() -> None:
        try:
            connection.ping()
        except RedisError:
            failed.set()
            raise
        beats.release()

    monkeypatch.setattr(beating, "_renew", renew)
    monkeypatch.setattr("worker.slots.BEAT_S", 1)
    monkeypatch.setattr("worker.leases.LEASE_S", 1 if since == "an outage" else 3600)
    beating.start()
    try:
        if since == "an outage":
            while not connection.exists(STORE_SWEEP_LOCK):  # it judges now
                assert beats.acquire(timeout=60)
            monkeypatch.setattr("worker.leases.LEASE_S", 3600)
            own_redis.kill()
            assert failed.wait(60)
            own_redis.start()
        taken = jobs.turns.claim("tiny", "other-0", 60)
        assert taken is not None
        connection.delete(taken[2].key)  # its lease
        while beats.acquire(blocking=False):
            pass
        for _ in range(3):
            assert beats.acquire(timeout=60)
        assert not jobs.turns.queued("tiny", OPEN)
    finally:
        beating.join()
        connection.close()


def test_a_worker_is_sure_of_its_leases_until_they_may_have_lapsed(connection: Redis) -> None:
    desk: Any = SimpleNamespace(jobs=Jobs(connection), meter=SimpleNamespace(pace=lambda n: None))
    beating = Slots(0, CARD, desk, "played")
    beating._renewed_at = time.monotonic() - leases.LEASE_S
    assert not beating.is_sure()
    beating._renew()
    assert beating.is_sure()


def test_leases_wait_neither_for_a_slow_store_nor_for_a_defect(
    connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept, is_over = threading.Event(), threading.Event()

    class Slow:
        def older_than(self, seconds: float) -> Iterator[str]:
            swept.set()
            is_over.wait(60)
            yield from ()

    monkeypatch.setattr("worker.leases.LEASE_S", 0.01)
    monkeypatch.setattr("worker.slots.BEAT_S", 1)
    beating, beats = slots(Slow(), Jobs(connection)), threading.Semaphore(0)

    def renew() -> None:
        if swept.is_set():
            beats.release()
            raise TypeError("a defect")

    monkeypatch.setattr(beating, "_renew", renew)
    beating.start()
    try:
        assert swept.wait(60)
        for _ in range(3):
            assert beats.acquire(timeout=60)
        assert not is_over.is_set()
    finally:
        is_over.set()
        beating.join()


def slots(store: Any, jobs: Jobs) -> Slots:
    """Of a worker without any slot: what is left is the beat."""
    desk: Any = SimpleNamespace(store=store, jobs=jobs)
    model: Any = SimpleNamespace(id="tiny")
    return Slots(0, model, desk, "played")
