"""A stack at capacity and unhurt: what grows in it, grows for ever."""

import asyncio
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chaos.clients import Clients, audit
from chaos.stack import Stack
from tests.service.receiver import Receiver

LOOK_S = 5
WARMING = 0.25
"""The share of the time at the beginning that no slope is taken of: caches fill."""
OF_ONE = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-|^safelatent:once:")
"""Keys with a generation's id, and idempotency keys."""


class Look(NamedTuple):
    """One look at a process."""

    at_s: float
    rss_mb: float
    threads: int
    fds: int


async def run(stack: Stack, receiver: Receiver, minutes: float, count: int, seed: int) -> bool:
    began = time.monotonic()
    until = began + 60 * minutes
    clients = Clients(stack.urls, receiver, 1, count, seed, lambda: time.monotonic() > until)
    work = asyncio.create_task(clients.run())
    looks: dict[str, list[Look]] = {}
    keys: list[tuple[int, int]] = []
    while not work.done():
        await asyncio.wait({work}, timeout=LOOK_S)
        at_s = time.monotonic() - began
        for name, pid in _pids(stack).items():
            looks.setdefault(name, []).append(_look(at_s, pid))
        keys.append(_keys(stack))
        if len(keys) % 12 == 0:
            print(f"{at_s:5.0f} s {clients.done} requests", file=sys.stderr, flush=True)
    work.result()
    counts, wrong = await audit(clients, lambda id, problem: False)
    print(f"{minutes:g} minutes, {count} clients: {dict(counts)}, {len(clients.failed)} refused")
    print(f"{'process':<16} {'RSS at first, last, MB':>24} {'MB/min':>8} {'threads':>9} {'fds':>9}")
    for name, seen in looks.items():
        late = [look for look in seen if look.at_s > WARMING * seen[-1].at_s]
        slope = np.polyfit([one.at_s / 60 for one in late], [one.rss_mb for one in late], 1)[0]
        first, last = late[0], late[-1]
        print(
            f"{name:<16} {first.rss_mb:>15.1f} {last.rss_mb:>8.1f} {slope:>8.3f} "
            f"{first.threads:>4} {last.threads:>4} {first.fds:>4} {last.fds:>4}"
        )
    late_keys = keys[int(WARMING * len(keys)) :]
    print(f"Redis keys of no generation: {late_keys[0][0]} at first, {late_keys[-1][0]} at last")
    print(f"Redis keys of generations: {keys[-1][1] / len(clients.told):.2f} each, for 24 hours")
    for each in clients.failed[:3]:
        print(f"refused: {each}")
    for each in wrong:
        print(f"WRONG: {each}")
    return not wrong


def _pids(stack: Stack) -> dict[str, int]:
    pids = {name: process.pid for name, process in stack.processes.items()}
    children = {f"child of {name}": stack.child(name) for name in pids if "worker" in name}
    return pids | {name: pid for name, pid in children.items() if pid is not None}


def _look(at_s: float, pid: int) -> Look:
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE))
    fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Look(at_s, int(found["VmRSS"]) / 1024, int(found["Threads"]), fds)


def _keys(stack: Stack) -> tuple[int, int]:
    """Keys that belong to no generation, and those that do."""
    keys: Any = stack.connection.keys("*")
    of_one = sum(bool(OF_ONE.search(key)) for key in keys)
    return len(keys) - of_one, of_one
