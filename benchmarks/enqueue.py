"""POST /generate under load, beside a bare FastAPI route in the same run: wrk, 16 connections.

Nobody works meanwhile: this is what accepting costs. It needs `wrk` (apt install wrk).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from benchmarks.service import free_port, until

SECONDS = 10
SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"prompt": "a cat", "seed": 1, "width": 512, "height": 512}'
"""

bare = FastAPI()


@bare.post("/generate")
async def nothing(body: dict[str, Any]) -> dict[str, Any]:
    return body


def run(model: str, repeats: int) -> list[dict[str, Any]]:
    if not shutil.which("wrk"):
        raise RuntimeError("this benchmark needs wrk: apt install wrk")
    rows = []
    with tempfile.TemporaryDirectory() as folder, serving(folder) as urls:
        Path(folder, "post.lua").write_text(SCRIPT)
        for name, url in urls.items():
            for key, (value, unit) in load(f"{url}/generate", f"{folder}/post.lua").items():
                rows.append({"what": f"   {name}, {key}", "value": value, "unit": unit})
    return rows


def load(url: str, script: str) -> dict[str, tuple[float, str]]:
    command = ["wrk", "-t1", "-c16", f"-d{SECONDS}s", "--latency", "-s", script, url]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said:
        raise RuntimeError(said)
    figures = {"requests": (float(re.findall(r"Requests/sec:\s+([\d.]+)", said)[0]), "1/s")}
    for at in (50, 99):
        number, unit = re.findall(rf"{at}%\s+([\d.]+)(us|ms|s)\b", said)[0]
        figures[f"p{at}"] = (float(number) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit], "ms")
    return figures


@contextmanager
def serving(folder: str) -> Iterator[dict[str, str]]:
    """Redis, a frontend and a bare app as processes of their own."""
    ports = {"a bare route": free_port(), "POST /generate": free_port()}
    bare, ours = (str(port) for port in ports.values())
    environment = {
        **os.environ,
        "STATE": folder,
        "REDIS_URL": f"unix://{folder}/redis.sock",
        "SAFELATENT_PORT": ours,
        "SAFELATENT_STORE_URL": f"file://{folder}/store",
        "SAFELATENT_MAX_QUEUED": "1000000",
    }
    quiet = ["--port", bare, "--log-level", "warning"]
    commands = (
        ["deploy/local/embedded_redis.py"],
        ["-m", "uvicorn", "benchmarks.enqueue:bare", *quiet],
        ["-m", "service"],
    )
    processes = []
    try:
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, *command], env=environment, stderr=subprocess.DEVNULL
            )
            processes.append(process)
            until(lambda: Path(folder, "redis.sock").exists(), processes)
        urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        for url in urls.values():
            until(lambda url=url: _answers(url), processes)
        yield urls
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", trust_env=False).status_code < 500
    except httpx.TransportError:
        return False
