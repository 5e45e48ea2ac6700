"""What goes wrong, in an order that a seed decides."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress

from redis.exceptions import RedisError

from chaos.stack import Stack

KINDS = {
    "kill worker process": 6,
    "kill supervisor": 2,
    "kill frontend": 3,
    "kill redis": 2,
    "freeze worker process": 1,
    "freeze supervisor": 1,
    "freeze frontend": 1,
    "freeze redis": 1,
    "cut connections": 3,
    "delay connections": 2,
}
"""Each kind of fault, and how often it comes for one of the rarest."""


class Faults:
    """A fault after another until `stop`; counts them, and how long hand-backs took."""

    def __init__(self, stack: Stack, seed: int, pause_s: float):
        self.stack, self.pause_s = stack, pause_s
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.recoveries_s: dict[str, list[float]] = {"worker process": [], "supervisor": []}
        self.watched: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self.pause_s * self.random.uniform(0.5, 1.5))
                return
            [kind] = self.random.choices(list(KINDS), list(KINDS.values()))
            number, seconds = self.random.randrange(2), self.random.uniform(0.5, 3)
            if await self._do(kind, number, seconds):
                self.counts[kind] += 1

    async def _do(self, kind: str, number: int, seconds: float) -> bool:
        verb, victim = kind.split(" ", 1)
        if victim in self.recoveries_s and self.stack.warm() < 2:
            return False  # one worker is always there, or a slow machine would get nothing done
        if kind == "cut connections":
            self.stack.proxy.cut()
        elif kind == "delay connections":
            self.stack.proxy.may_pass.clear()
            await asyncio.sleep(seconds)
            self.stack.proxy.may_pass.set()
        elif verb == "freeze":
            pid = self._pid(victim, number)
            if pid is None:
                return False
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                # A worker longer than its lease: another does its jobs meanwhile.
                await asyncio.sleep(13 if victim == "worker process" else seconds)
                os.kill(pid, signal.SIGCONT)
        elif victim == "worker process" or victim == "supervisor":
            child = self.stack.child(f"worker-{number}")
            if child is None:
                return False
            try:
                held = self.stack.held(child)
            except (OSError, KeyError, RedisError):
                held = set()
            killed_at = time.monotonic()
            if victim == "supervisor":
                self.stack.kill(f"worker-{number}")
                self.stack.launch(f"worker-{number}")  # as if the host had come back
            else:
                os.kill(child, signal.SIGKILL)
            if held:
                watch = asyncio.create_task(self._await_hand_back(victim, held, killed_at))
                self.watched.add(watch)
                watch.add_done_callback(self.watched.discard)
        else:
            name = "redis" if victim == "redis" else f"frontend-{number}"
            self.stack.kill(name)
            await asyncio.sleep(seconds / 2)
            self.stack.launch(name)
        return True

    def _pid(self, victim: str, number: int) -> int | None:
        if victim == "worker process":
            return self.stack.child(f"worker-{number}")
        name = {"supervisor": f"worker-{number}", "frontend": f"frontend-{number}"}
        return self.stack.processes[name.get(victim, "redis")].pid

    async def _await_hand_back(self, victim: str, held: set[str], killed_at: float) -> None:
        """Until nobody believes that the dead one holds its jobs."""
        while True:
            with suppress(RedisError):
                if not held & self.stack.running():
                    self.recoveries_s[victim].append(time.monotonic() - killed_at)
                    return
            await asyncio.sleep(0.02)
