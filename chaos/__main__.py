"""`python -m chaos --n 300 --seed 7`: hurt a stack, and count what comes out of it."""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from chaos.clients import Clients, audit
from chaos.faults import Faults
from chaos.stack import Stack

SETTLED_S = 60


async def run(n: int, seed: int, count: int, pause_s: float, folder: Path) -> bool:
    stack = Stack(folder)
    try:
        await stack.start()
        clients, faults = Clients(stack.urls, n, count, seed), Faults(stack, seed, pause_s)
        began, stop = time.monotonic(), asyncio.Event()
        hurting = asyncio.create_task(faults.run(stop))
        work = asyncio.create_task(clients.run())
        while not work.done():
            await asyncio.wait({work, hurting}, timeout=10, return_when=asyncio.FIRST_COMPLETED)
            print(f"{time.monotonic() - began:5.0f} s {clients.done}/{n}", file=sys.stderr)
            if hurting.done():
                hurting.result()
        work.result()
        took_s = time.monotonic() - began
        stop.set()
        await hurting
        counts, wrong = await audit(clients)
        deadline = time.monotonic() + SETTLED_S
        while (left := stack.left()) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        wrong += [f"left in Redis: {key}" for key in left]
        for watch in faults.watched:
            watch.cancel()
    finally:
        stack.end()
    print(f"{n} requests by {count} clients in {took_s:.0f} s: {dict(counts)}")
    print(f"faults: {dict(faults.counts)}")
    for victim, seconds in faults.recoveries_s.items():
        if seconds := sorted(seconds):
            p50, p95 = seconds[len(seconds) // 2], seconds[int(0.95 * len(seconds))]
            print(
                f"jobs of a killed {victim} back in the queue after: "
                f"p50 {p50:.2f} s, p95 {p95:.2f} s, max {seconds[-1]:.2f} s ({len(seconds)})"
            )
    for each in wrong:
        print(f"WRONG: {each}")
    print(f"{len(wrong)} wrong; again: python -m chaos --n {n} --seed {seed} --clients {count}")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--n", type=int, default=300, help="requests")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=3, help="seconds between faults, about")
    parser.add_argument("--keep", type=Path, help="folder for logs and data, kept")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        good = asyncio.run(run(asked.n, asked.seed, asked.clients, asked.pause, folder.resolve()))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
