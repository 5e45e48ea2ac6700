"""The parent of a GPU process: starts it, watches it, buries it, starts it again.

It imports neither torch nor CUDA, so what kills its child cannot kill it. When the child dies its
jobs go back to the front of their queues at once; nobody has to wait for the leases.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from types import FrameType

from redis import Redis
from redis.exceptions import RedisError

from safelatent import logs
from safelatent.connecting import connect
from worker import leases
from worker import settings as environment
from worker.parent import PARENT
from worker.pulse import PULSE_FD, Phase, Pulse, Sign

log = logging.getLogger("worker.supervisor")


COMMAND = (sys.executable, "-m", "worker.child")
NAME = "SAFELATENT_WORKER_NAME"
"""Environment variable: what the child calls itself, so that its jobs can be found."""

UNUSABLE = os.EX_CONFIG
"""Exit code for a model or a setting that cannot be used: starting again would not help."""
POISONED = os.EX_TEMPFAIL
"""Exit code for a device that computes no more, after the jobs were handed back."""

PAUSES_S = (0, 1, 2, 4, 8, 16, 30)
"""Before the restarts after crashes in a row; the last one repeats."""
RAN_WELL_S = 60
"""Whoever lived so long after it was warm begins a new row."""
POLL_S = 0.5
LEAST_STALL_S = 60
STALL_STEPS = 50


class Supervisor:
    """`command` runs the child. `stall_s` is for how long a step may take; None goes by its mean:
    `STALL_STEPS` of them, and never less than `LEAST_STALL_S`. A child that is not warm after
    `load_timeout_s` hangs."""

    def __init__(
        self,
        connection: Redis,
        stall_s: float | None = None,
        load_timeout_s: float = math.inf,
        command: Sequence[str] = COMMAND,
        pauses_s: Sequence[float] = PAUSES_S,
    ):
        self.connection = connection
        self.stall_s = stall_s
        self.load_timeout_s = load_timeout_s
        self.command = command
        self.pauses_s = pauses_s
        self._child: subprocess.Popen[bytes] | None = None
        self._asked_to_end = threading.Event()
        self._dead: list[str] = []
        """Names of processes whose jobs are still to be handed back."""

    def run(self) -> int:
        """Until a child ends well or cannot be helped; its exit code."""
        crashes = 0
        while True:
            code, was_warm_s = self._live()
            self._bury()
            if code == -signal.SIGTERM and self._asked_to_end.is_set():
                return 0  # it was loading still, and had nothing to lose
            if code in (0, UNUSABLE) or self._asked_to_end.is_set():
                return code if code >= 0 else 128 - code
            crashes = 1 if was_warm_s > RAN_WELL_S else crashes + 1
            pause_s = self.pauses_s[min(crashes, len(self.pauses_s)) - 1]
            log.error("the worker process ended with %s; again in %g s", _how(code), pause_s)
            self._sleep(pause_s)
            if self._asked_to_end.is_set():
                return 0

    def forward(self, number: int, frame: FrameType | None = None) -> None:
        """A signal handler: the child drains, and is asked twice if we are."""
        self._asked_to_end.set()
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def _live(self) -> tuple[int, float]:
        """One life of the child: its exit code, and how long it was warm."""
        name = uuid.uuid4().hex[:12]
        pulse = Pulse.create()
        self._child = child = subprocess.Popen(
            self.command,
            env={**os.environ, NAME: name, PARENT: str(os.getpid()), PULSE_FD: str(pulse.fd)},
            pass_fds=[pulse.fd],
            # Signals to our group must not reach it beside those that we pass on.
            start_new_session=True,
        )
        if self._asked_to_end.is_set():  # while it was being started
            child.send_signal(signal.SIGTERM)
        ended = threading.Event()

        def wait() -> None:
            child.wait()
            ended.set()

        threading.Thread(target=wait, daemon=True).start()
        warm_s = still_s = 0.0
        seen = Sign()
        looked_at = time.monotonic()
        while not ended.wait(POLL_S):
            self._bury()
            sign, now = pulse.look(), time.monotonic()
            # If we were stopped ourselves, that was no stall of the child.
            passed_s, looked_at = min(now - looked_at, 2 * POLL_S), now
            warm_s += passed_s if sign.phase is not Phase.LOADING else 0
            still_s = still_s + passed_s if sign == seen else 0.0
            seen = sign
            if still_s > self._limit_s(sign):
                missing = "not warm after" if sign.phase is Phase.LOADING else "no step for"
                log.error("%s %.0f s: the worker process is killed", missing, still_s)
                self._kill(child, ended)
        if pulse.look().phase is not Phase.LOADING:  # else it cannot hold any job
            self._dead.append(name)
        pulse.close()
        self._child = None
        return child.returncode, warm_s

    def _limit_s(self, sign: Sign) -> float:
        """How long a sign may stay the same."""
        match sign.phase:
            case Phase.LOADING:
                return self.load_timeout_s
            case Phase.STEPPING:
                return self.stall_s or max(LEAST_STALL_S, STALL_STEPS * sign.step_s)
        return math.inf

    def _kill(self, child: subprocess.Popen[bytes], ended: threading.Event) -> None:
        """Have it say where each of its threads is, and end it."""
        child.send_signal(signal.SIGUSR1)
        ended.wait(1)
        child.kill()
        ended.wait()

    def _bury(self) -> None:
        """Hand back the jobs of the dead; without Redis, later."""
        while self._dead:
            try:
                count = leases.bury(self.connection, self._dead[0])
            except RedisError as error:
                log.warning("jobs wait to be handed back, Redis does not answer: %s", error)
                return
            except Exception:  # forged
                log.exception("jobs of the worker process come back when their leases lapse")
                count = 0
            if count:
                log.warning("%d jobs of the worker process are queued again", count)
            del self._dead[0]

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self._asked_to_end.wait(
            min(left, POLL_S)
        ):
            self._bury()


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def main() -> int:
    settings = environment.read()
    if settings is None:
        return UNUSABLE
    logs.configure(settings.log_level, settings.log_format)
    connection = connect(settings.redis_url, socket_timeout=2, socket_connect_timeout=2)
    supervisor = Supervisor(connection, settings.stall_s, settings.load_timeout_s)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, supervisor.forward)
    code = supervisor.run()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python would give it its own end back
    return code
