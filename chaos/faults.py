"""What goes wrong, in an order that a seed decides."""

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress

from redis.exceptions import RedisError

from chaos.stack import Stack

KINDS = {
    "kill worker process": 6,
    "kill supervisor": 2,
    "kill frontend": 3,
    "kill redis": 2,
    "kill deliverer": 2,
    "freeze worker process": 1,
    "freeze supervisor": 1,
    "freeze frontend": 1,
    "freeze redis": 1,
    "cut connections": 3,
    "delay connections": 2,
    "take store away": 2,
}
"""Each kind of fault, and how often it comes for one of the rarest."""
KILLS = {"kill worker process": 1}
HOSTS = {"kill supervisor": 1}
ROLLING = {"restart worker": 1, "restart frontend": 1}
"""No faults: what an operator does on purpose."""

BUSY_S = 10
"""How long a fault waits for a worker that has jobs."""


class Faults:
    """One after another until `stop`: each kind in turn, shuffled, as often as `kinds` has it.

    Whoever kills a worker waits until it holds jobs, and counts the seconds until nobody believes
    that it holds them (`back_s`), and until each is in another's hands or has ended (`again_s`).
    """

    def __init__(self, stack: Stack, seed: int, pause_s: float, kinds: Mapping[str, int] = KINDS):
        self.stack, self.pause_s, self.kinds = stack, pause_s, kinds
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.back_s: dict[str, list[float]] = {"worker process": [], "supervisor": []}
        self.again_s: dict[str, list[float]] = {"worker process": [], "supervisor": []}
        self.hit: Counter[str] = Counter()
        """How often a worker was killed or frozen, or the store taken away, by its jobs."""
        self.wrong: list[str] = []
        self.watched: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        deck: list[str] = []
        while not stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self.pause_s * self.random.uniform(0.5, 1.5))
                return
            if not deck:
                deck = [kind for kind, count in self.kinds.items() for _ in range(count)]
                self.random.shuffle(deck)
            number, seconds = self.random.randrange(2), self.random.uniform(0.5, 3)
            if await self._do(deck[-1], number, seconds):
                self.counts[deck.pop()] += 1
            else:  # nobody is there to be hurt; something else meanwhile
                deck.insert(0, deck.pop())

    async def _do(self, kind: str, number: int, seconds: float) -> bool:
        verb, victim = kind.split(" ", 1)
        if kind == "cut connections":
            self.stack.proxy.cut()
        elif kind == "delay connections":
            self.stack.proxy.may_pass.clear()
            await asyncio.sleep(seconds)
            self.stack.proxy.may_pass.set()
        elif kind == "take store away":
            with self.stack.store_is_away():
                await asyncio.sleep(seconds / 2)
        elif victim in ("worker process", "supervisor"):
            return await self._hurt_worker(verb, victim, number, seconds)
        elif verb == "restart":
            return await self._restart(victim)
        else:
            name = f"frontend-{number}" if victim == "frontend" else victim
            if verb == "freeze":
                await self._freeze(self.stack.processes[name].pid, seconds)
            else:
                self.stack.kill(name)
                await asyncio.sleep(seconds / 2)
                self.stack.launch(name)
        return True

    async def _hurt_worker(self, verb: str, victim: str, number: int, seconds: float) -> bool:
        # One worker is always there, or a slow machine would get nothing done.
        deadline = time.monotonic() + BUSY_S
        while self.stack.warm() < 2 or not (found := self.stack.busy(f"worker-{number}")):
            if time.monotonic() > deadline:
                return False
            number = 1 - number
            await asyncio.sleep(0.02)
        name, (child, held) = f"worker-{number}", found
        if verb == "freeze":
            # A worker longer than its lease: another does its jobs meanwhile.
            is_worker = victim == "worker process"
            self._count(held if is_worker else set())
            pid = child if is_worker else self.stack.processes[name].pid
            await self._freeze(pid, 13 if is_worker else seconds)
            return True
        self._count(held)
        killed_at = time.monotonic()
        if victim == "supervisor":
            self.stack.kill(name)
            self.stack.launch(name)  # as if the host had come back
        else:
            os.kill(child, signal.SIGKILL)
        watch = asyncio.create_task(self._watch(victim, held, killed_at))
        self.watched.add(watch)
        watch.add_done_callback(self.watched.discard)
        return True

    def _count(self, held: set[str]) -> None:
        self.hit.update(execution.split(":")[0] for execution in held)

    async def _freeze(self, pid: int, seconds: float) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(seconds)
            os.kill(pid, signal.SIGCONT)

    async def _restart(self, victim: str) -> bool:
        """One of two after the other, each when the one before it works again."""
        name = f"{victim}-{self.counts[f'restart {victim}'] % 2}"
        if code := await self.stack.restart(name):
            self.wrong.append(f"{name} ended with {code} when it was asked to end")
        await self.stack.await_ready(name)
        return True

    async def _watch(self, victim: str, held: set[str], killed_at: float) -> None:
        back_s = None
        while True:
            with suppress(RedisError):
                if back_s is None and not held & self.stack.running():
                    back_s = time.monotonic() - killed_at
                    self.back_s[victim].append(back_s)
                if back_s is not None and all(map(self.stack.goes_on, held)):
                    again_s = time.monotonic() - killed_at
                    self.again_s[victim].append(again_s)
                    took = f"queued {back_s:.2f} s, at work {again_s:.2f} s"
                    print(f"{len(held)} jobs of a killed {victim}: {took}", file=sys.stderr)
                    return
            await asyncio.sleep(0.02)

    def may_fail(self, id: str, problem: str) -> bool:
        """A generation is given up when three of its workers ended, and when the store was away
        so often; nothing else may make one fail."""
        if problem == "store-unavailable":
            return self.counts["take store away"] > 0
        return problem == "worker-crashed" and self.hit[id] >= 3
