"""A real supervisor over children that are played: what it starts again, and what it hands back."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis import Redis
from rq.job import JobStatus

from safelatent.jobs import OPEN, Jobs
from safelatent.queues import queue
from safelatent.schema import GenerationRequest
from tests.worker.running import NOTES
from worker.supervisor import UNUSABLE

PATIENCE_S = 60
SCRIPT = """
import logging, signal, sys
from redis import Redis
from worker.supervisor import Supervisor
logging.basicConfig(level="INFO")
url, stall, load_timeout, pause, *command = sys.argv[1:]
connection = Redis.from_url(url, socket_connect_timeout=2)
stall_s = float(stall) if float(stall) else None
pauses_s = [float(pause), 2 * float(pause)]
supervisor = Supervisor(connection, stall_s, float(load_timeout), command, pauses_s)
signal.signal(signal.SIGTERM, supervisor.forward)
sys.exit(supervisor.run())
"""


class Watch:
    """Supervisors that a test starts, and what they and their children leave behind."""

    def __init__(self, redis_url: str, connection: Redis, folder: Path):
        self.redis_url, self.connection, self.folder = redis_url, connection, folder
        self.log = folder / "log"
        self.started: list[subprocess.Popen[bytes]] = []

    def start(
        self, end: str, stall_s: float = 0, load_timeout_s: float = 1800, pause_s: float = 0
    ) -> subprocess.Popen[bytes]:
        """A supervisor whose child ends as told; see `tests.worker.played_child`."""
        child = [sys.executable, "-m", "tests.worker.played_child", end, str(self.folder)]
        options = [self.redis_url, str(stall_s), str(load_timeout_s), str(pause_s)]
        with self.log.open("a") as log:
            self.started.append(
                subprocess.Popen(
                    [sys.executable, "-c", SCRIPT, *options, *child],
                    env={**os.environ, "REDIS_URL": self.redis_url},
                    stderr=log,
                )
            )
        return self.started[-1]

    def start_real(self) -> subprocess.Popen[bytes]:
        """`python -m worker`, with a child that imports all that it needs."""
        environment = {**os.environ, "REDIS_URL": self.redis_url}
        with self.log.open("a") as log:
            command = [sys.executable, "-m", "worker"]
            self.started.append(subprocess.Popen(command, env=environment, stderr=log))
        return self.started[-1]

    def await_imports(self, supervisor: subprocess.Popen[bytes]) -> int:
        """Until a real child imports torch; its process id."""
        children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
        found: list[int] = []

        def at_its_imports() -> list[int]:
            for pid in children.read_text().split():
                if "libtorch" in Path(f"/proc/{pid}/maps").read_text():
                    found.append(int(pid))
            return found

        self.wait(at_its_imports, "child that imports torch")
        return found[0]

    def lives(self) -> list[tuple[int, float]]:
        """Process id and start of every child until now."""
        path = self.folder / "lives"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(pid), float(start)) for pid, start in map(str.split, lines)]

    def await_ready(self) -> int:
        """Until a child does what it was told; its process id."""
        self.wait((self.folder / "ready").exists, "child that is ready")
        (self.folder / "ready").unlink()
        return self.lives()[-1][0]

    def wait(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"no {what}:\n{self.log.read_text()}"
            time.sleep(0.01)

    def submit(self) -> str:
        request = GenerationRequest(prompt="a cat", model="tiny", seed=1)
        return Jobs(self.connection).submit(request).id

    def is_queued(self, id: str) -> bool:
        return id in queue("tiny", OPEN, "normal", self.connection).job_ids

    def status(self, id: str) -> JobStatus:
        return JobStatus(self.connection.hget(f"rq:job:{id}", "status").decode())


@pytest.fixture
def watch(redis_url: str, connection: Redis, tmp_path: Path) -> Iterator[Watch]:
    watch = Watch(redis_url, connection, tmp_path)
    yield watch
    for supervisor in watch.started:
        supervisor.kill()
        supervisor.wait()


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_the_supervisor_knows_nothing_of_torch() -> None:
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers'}"
    script = f"import sys, worker.supervisor, worker.__main__; print(sys.modules.keys() & {heavy})"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert said.stdout == "set()\n", said.stderr


def test_the_job_of_a_killed_child_is_queued_again_at_once_and_the_child_started(watch):
    id, later = watch.submit(), watch.submit()
    watch.start("work", pause_s=0.5)
    took_s = []
    for life in range(1, 6):
        child = watch.await_ready()
        assert watch.status(id) == JobStatus.STARTED
        killed_at = time.monotonic()
        os.kill(child, signal.SIGKILL)
        watch.wait(lambda: watch.status(id) == JobStatus.QUEUED, "hand-back")
        took_s.append(time.monotonic() - killed_at)
        assert queue("tiny", OPEN, "normal", watch.connection).job_ids == [id, later]
        watch.wait(lambda life=life: len(watch.lives()) > life, "next child")
    took_s.sort()
    NOTES.append(
        f"child killed, its job in the queue again: {took_s[2]:.2f} s median of 5, "
        f"{took_s[-1]:.2f} s at most"
    )


def test_of_a_dead_child_nothing_stays_in_the_registries(watch):
    id = watch.submit()
    watch.start("work", pause_s=60)
    os.kill(watch.await_ready(), signal.SIGKILL)
    watch.wait(lambda: watch.is_queued(id), "hand-back")
    watch.wait(lambda: not watch.connection.keys("rq:worker*"), "end of its registrations")
    assert not watch.connection.keys("rq:execution*")
    assert not watch.connection.keys("rq:wip:*")


def test_what_is_forged_in_redis_ends_no_supervisor(watch):
    ids = [watch.submit() for _ in range(2)]
    watch.start("work")
    os.kill(watch.await_ready(), signal.SIGSTOP)
    [name] = watch.connection.keys("rq:worker:*:executions")
    watch.connection.sadd(name, b"no-colon", b"a:b:c")
    os.kill(watch.lives()[-1][0], signal.SIGKILL)
    watch.await_ready()  # the first one was handed back, and is at work again
    [held] = watch.connection.keys(f"rq:execution:{ids[0]}:*")
    watch.connection.hset(held, "created_at", "never")
    os.kill(watch.lives()[-1][0], signal.SIGKILL)
    watch.await_ready()
    assert watch.status(ids[1]) == JobStatus.STARTED


def test_crashes_in_a_row_are_restarted_ever_later(watch):
    watch.start("crash", pause_s=1)
    watch.wait(lambda: len(watch.lives()) >= 4, "fourth life")
    starts = [start for _, start in watch.lives()]
    pauses = [later - earlier for earlier, later in zip(starts, starts[1:], strict=False)]
    assert pauses[0] >= 1 and pauses[1] >= 2 and pauses[2] >= 2


def test_what_cannot_be_used_is_not_tried_again_and_its_sentence_comes_last(watch):
    supervisor = watch.start("unusable")
    assert supervisor.wait(PATIENCE_S) == UNUSABLE
    assert len(watch.lives()) == 1
    assert watch.log.read_text().splitlines()[-1] == "safelatent worker: no such model"


def test_sigterm_reaches_the_child_and_a_drain_is_the_end(watch):
    supervisor = watch.start("drain")
    watch.await_ready()
    supervisor.terminate()
    assert supervisor.wait(PATIENCE_S) == 0
    assert len(watch.lives()) == 1


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_while_the_child_loads_is_the_end_of_both_at_once_and_no_failure(watch, signals):
    supervisor = watch.start_real()
    child = watch.await_imports(supervisor)
    for _ in range(signals):
        supervisor.terminate()
    assert supervisor.wait(PATIENCE_S) == 0
    assert not is_alive(child)


def test_a_child_that_takes_no_step_says_where_it_is_and_is_killed(watch):
    id = watch.submit()
    watch.start("hang", stall_s=1, pause_s=60)
    child = watch.await_ready()
    watch.wait(lambda: watch.is_queued(id), "hand-back")
    assert not is_alive(child)
    said = watch.log.read_text()
    assert "no step for" in said
    assert 'played_child.py", line' in said  # its stack


def test_a_child_that_never_gets_warm_says_where_it_is_and_is_started_again_ever_later(watch):
    watch.start("load", load_timeout_s=1.5, pause_s=1)
    child = watch.await_ready()
    watch.wait(lambda: len(watch.lives()) >= 3, "third life")
    assert not is_alive(child)
    said = watch.log.read_text()
    assert "not warm after" in said and 'played_child.py", line' in said
    starts = [start for _, start in watch.lives()]
    assert starts[1] - starts[0] >= 1.5 + 1 and starts[2] - starts[1] >= 1.5 + 2


def test_a_supervisor_that_was_frozen_does_not_blame_its_child(watch):
    supervisor = watch.start("work", stall_s=5)
    child = watch.await_ready()
    for pid in (supervisor.pid, child):  # as when their whole container is frozen
        os.kill(pid, signal.SIGSTOP)
    time.sleep(6)
    for pid in (supervisor.pid, child):
        os.kill(pid, signal.SIGCONT)
    time.sleep(1.5)
    assert is_alive(child) and "no step" not in watch.log.read_text()


def test_a_killed_supervisor_takes_its_child_along(watch):
    supervisor = watch.start("work")
    child = watch.await_ready()
    supervisor.kill()
    watch.wait(lambda: not is_alive(child), "end of the child")


def test_a_child_that_stands_still_in_its_imports_dies_with_its_supervisor(watch):
    supervisor = watch.start_real()
    child = watch.await_imports(supervisor)
    os.kill(child, signal.SIGSTOP)
    supervisor.kill()
    try:
        watch.wait(lambda: not is_alive(child), "end of the child")
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
