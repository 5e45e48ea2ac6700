"""`python -m chaos --n 300 --seed 7`: hurt a stack, and count what comes out of it."""

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from chaos import soak
from chaos.clients import Clients, audit
from chaos.faults import HOSTS, KILLS, KINDS, ROLLING, Faults
from chaos.stack import Stack
from tests.service.receiver import Receiver

SETTLED_S = 60
MODES = {"chaos": KINDS, "kills": KILLS, "hosts": HOSTS, "rolling": ROLLING}
WORDS = {"worker process": "GPU process killed, supervisor lives", "supervisor": "host killed"}


async def run(asked: argparse.Namespace, folder: Path, receiver: Receiver) -> bool:
    stack = Stack(folder)
    began = time.monotonic()
    try:
        await stack.start()
        began = _say(began, "the stack is warm")
        if asked.mode == "soak":
            return await soak.run(stack, receiver, asked.minutes, asked.clients, asked.seed)
        faults = Faults(stack, asked.seed, asked.pause, MODES[asked.mode])
        clients = Clients(
            stack.urls,
            receiver,
            asked.n,
            asked.clients,
            asked.seed,
            lambda: faults.counts.total() >= asked.faults,
        )
        stop = asyncio.Event()
        hurting = asyncio.create_task(faults.run(stop))
        work = asyncio.create_task(clients.run())
        while not work.done():
            await asyncio.wait({work, hurting}, timeout=10, return_when=asyncio.FIRST_COMPLETED)
            _say(began, f"{clients.done} requests, {faults.counts.total()} faults")
            if hurting.done():
                hurting.result()
        work.result()
        took_s = time.monotonic() - began
        stop.set()
        await hurting
        failed = list(clients.failed)
        counts, wrong = await audit(clients, faults.may_fail)
        deadline = time.monotonic() + SETTLED_S
        while (left := stack.left()) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        wrong += faults.wrong + [f"left in Redis: {key}" for key in left]
        if asked.mode == "rolling":
            wrong += [f"failed: {request}" for request in failed]
        for watch in faults.watched:
            watch.cancel()
    finally:
        stack.end()
    print(
        f"{len(clients.told)} requests by {asked.clients} clients in {took_s:.0f} s: {dict(counts)}"
    )
    print(f"faults: {dict(faults.counts)}")
    for victim, words in WORDS.items():
        print(f"{words}: its jobs in the queue again after {_spread(faults.back_s[victim])}")
        print(f"{words}: its jobs at work again after {_spread(faults.again_s[victim])}")
    for each in wrong:
        print(f"WRONG: {each}")
    print(f"{len(wrong)} wrong; again: python -m chaos {' '.join(sys.argv[1:])} with {asked.seed=}")
    return not wrong


def _say(began: float, what: str) -> float:
    now = time.monotonic()
    print(f"{now - began:5.0f} s {what}", file=sys.stderr, flush=True)
    return now


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "- (0 times)"
    ordered = sorted(seconds)
    p50, p95 = ordered[len(ordered) // 2], ordered[int(0.95 * len(ordered))]
    return f"p50 {p50:.2f} s, p95 {p95:.2f} s, max {ordered[-1]:.2f} s ({len(ordered)} times)"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument(
        "mode",
        nargs="?",
        default="chaos",
        choices=[*MODES, "soak"],
        help="all faults, GPU processes or hosts killed, restarts one by one, or load alone",
    )
    parser.add_argument("--n", type=int, default=300, help="requests, at least")
    parser.add_argument("--faults", type=int, default=0, help="faults, at least")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=3, help="seconds between faults, about")
    parser.add_argument("--minutes", type=float, default=20, help="of a soak")
    parser.add_argument("--keep", type=Path, help="folder for logs and data, kept")
    asked = parser.parse_args()
    # Whatever ends us, what we have started is ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        with Receiver() as receiver:
            good = asyncio.run(run(asked, folder.resolve(), receiver))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
