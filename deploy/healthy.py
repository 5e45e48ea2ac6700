"""The images' health checks: exit code 0 when this container does what it is there for.

    python healthy.py service    the frontend answers /healthz (whether it can work is /readyz)
    python healthy.py playground the page is served
    python healthy.py worker     a worker of this container has lately told Redis that it is warm

A worker is unhealthy while Redis is away: it cannot work then. Restarting it would not help, so do
not make this a liveness check.
"""

import os
import socket
import sys
import urllib.request


def service() -> None:
    port = os.environ.get("SAFELATENT_PORT", "8000")
    open_url(f"http://127.0.0.1:{port}/healthz")


def playground() -> None:
    port = os.environ.get("SAFELATENT_PLAYGROUND_PORT", "7860")
    open_url(f"http://127.0.0.1:{port}/")


def open_url(url: str) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    direct.open(url, timeout=4).close()


def worker() -> None:
    from rq import Worker

    from safelatent.connecting import connect
    from safelatent.turns import WORKERS

    connection = connect(os.environ["REDIS_URL"], socket_timeout=2, socket_connect_timeout=2)
    # RQ knows the host of each slot, the announcement knows that the model is warm; a slot is
    # named <worker>-<number>, an announcement "<worker> <model>".
    slots = Worker.all(connection)
    here = {slot.name.rpartition("-")[0] for slot in slots if slot.hostname == socket.gethostname()}
    now, _ = connection.time()
    warm = connection.zrangebyscore(WORKERS, now, "+inf")
    if not here & {member.decode().split(" ")[0] for member in warm}:
        sys.exit(f"no worker of {socket.gethostname()} has announced a warm model lately")


if __name__ == "__main__":
    try:
        {"service": service, "playground": playground, "worker": worker}[sys.argv[1]]()
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
