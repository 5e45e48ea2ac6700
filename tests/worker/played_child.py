"""A GPU process that is played: no torch, one job, and an end as its first argument says.

It stands in the place of `worker.process` under a real supervisor, on a real Redis.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from redis import Redis
from rq import SimpleWorker

from safelatent.queues import SafeJob, SafeQueue
from safelatent.turns import Turns
from worker import leases
from worker.parent import end_with_parent, show_stacks_when_asked
from worker.pulse import Pulse
from worker.supervisor import NAME, UNUSABLE


class PlayedSlot(SimpleWorker):
    job_class = SafeJob
    queue_class = SafeQueue


def main(end: str, folder: str) -> None:
    end_with_parent()
    show_stacks_when_asked()
    with (Path(folder) / "lives").open("a") as lives:
        lives.write(f"{os.getpid()} {time.monotonic()}\n")
    if end == "unusable":
        print("safelatent worker: no such model", file=sys.stderr)
        sys.exit(UNUSABLE)
    if end == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "drain":
        asked = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
        (Path(folder) / "ready").touch()
        asked.wait()
        sys.exit(0)

    if end == "load":
        (Path(folder) / "ready").touch()
        while True:
            time.sleep(1)

    connection = Redis.from_url(os.environ["REDIS_URL"])
    slot = PlayedSlot(["tiny"], name=f"{os.environ[NAME]}-0", connection=connection)
    slot.register_birth()
    pulse = Pulse.of_environment()
    pulse.beat(is_idle=False)
    Turns(connection).claim("tiny", slot.name, leases.LEASE_S)
    (Path(folder) / "ready").touch()
    while True:
        time.sleep(0.05)
        if end == "work":
            pulse.beat(is_idle=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
