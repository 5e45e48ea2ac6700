"""What HTTP, the queue and the store add to the engine's own time, for one request after another.

The engine's time is the worker's own account of the same requests, so both sides are one run.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from safelatent.client import Client

REQUESTS = 20


def run(model: str, repeats: int) -> list[dict[str, Any]]:
    with stack(model) as client:
        fields = {"steps": 25, "scheduler": "ddim", "seed": 1}
        for _ in range(3):
            client.generate("a cat", **fields)
        walls, engines = [], []
        for _ in range(max(REQUESTS, 4 * repeats)):
            started = time.perf_counter()
            generation = client.generate("a cat", **fields)
            generation.images[0].bytes()
            walls.append(1000 * (time.perf_counter() - started))
            spent = generation.timings
            assert spent is not None
            seconds = spent.encode_s + spent.denoise_s + spent.decode_s + spent.check_s
            engines.append(1000 * seconds)
    overhead = [wall - engine for wall, engine in zip(walls, engines, strict=True)]
    return [
        {"what": what, "value": median(values), "unit": "ms"}
        for what, values in (
            ("   a request over HTTP with its picture, p50", walls),
            ("   of it in the engine, p50", engines),
            ("d  over HTTP more than in the engine, p50", overhead),
        )
    ]


@contextmanager
def stack(model: str) -> Iterator[Client]:
    """Redis, a frontend and a worker as processes of their own, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        environment = {
            **os.environ,
            "STATE": folder,
            "REDIS_URL": f"unix://{folder}/redis.sock",
            "SAFELATENT_PORT": str(port),
            "SAFELATENT_MODEL": model,
            "SAFELATENT_STORE_URL": f"file://{folder}/store",
        }
        commands = (["deploy/local/embedded_redis.py"], ["-m", "service"], ["-m", "worker"])
        processes = []
        try:
            for command in commands:
                processes.append(subprocess.Popen([sys.executable, *command], env=environment))
                if len(processes) == 1:
                    until(lambda: Path(folder, "redis.sock").exists(), processes)
            url = f"http://127.0.0.1:{port}"
            until(lambda: _is_ready(url), processes)
            with Client(url, http_client=httpx.Client(trust_env=False)) as client:
                yield client
        finally:
            for process in reversed(processes):  # Redis last: a worker that drains still writes
                process.terminate()
                process.wait(60)


def until(condition: Any, processes: list[subprocess.Popen[bytes]]) -> None:
    while not condition():
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a process of the stack has ended; its words are above")
        time.sleep(0.1)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", trust_env=False).is_success
    except httpx.TransportError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
