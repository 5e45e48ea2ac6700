"""What a caller sends stays between it and its generation: no log, metric or error has it."""

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from redis import Redis

from safelatent.queues import TASK, queue
from safelatent.schema import SCHEMA_VERSION
from tests.checkpoint import build
from tests.conftest import RedisServer
from tests.worker import process

PATIENCE_S = 120
KEY = "slk_canary-of-a-key"
SENT = {
    "prompt": "canary-of-a-prompt",
    "negative_prompt": "canary-of-a-negative-prompt",
    "metadata": {"canary-of-a-name": "canary-of-a-value"},
    "safety": {"level": "max", "concepts": ["canary-of-a-concept"]},
    "steps": 4,
}


def test_no_canary_is_in_a_log_a_metric_or_an_error(own_redis: RedisServer, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    sha256 = hashlib.sha256(KEY.encode()).hexdigest()
    policy.write_text(f'[tenants.alice]\nkeys = [{{ id = "key1", sha256 = "{sha256}" }}]\n')
    port, frontends, workers = free_port(), free_port(), free_port()
    environment = {
        "REDIS_URL": own_redis.url,
        "SAFELATENT_MODEL": str(build(tmp_path / "tiny")),
        "SAFELATENT_STORE_URL": f"file://{tmp_path}/store",
        "SAFELATENT_LOG_LEVEL": "DEBUG",
        "SAFELATENT_LOG_FORMAT": "json",
    }
    worker_log, service_log = tmp_path / "worker.log", tmp_path / "service.log"
    worker = process.start({**environment, "SAFELATENT_METRICS_PORT": str(workers)}, worker_log)
    with service_log.open("w") as log:
        service = subprocess.Popen(
            [sys.executable, "-m", "service"],
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                **environment,
                "SAFELATENT_PORT": str(port),
                "SAFELATENT_METRICS_PORT": str(frontends),
                "SAFELATENT_POLICY_FILE": str(policy),
            },
        )
    http = httpx.Client(
        base_url=f"http://127.0.0.1:{port}",
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=PATIENCE_S,
    )
    errors: list[str] = []

    def refused(status: int, path: str = "/generate", **changed: Any) -> None:
        headers = changed.pop("headers", {})
        answer = http.post(path, json=SENT | changed, headers=headers)
        assert answer.status_code == status, answer.text
        errors.append(f"{answer.headers} {answer.text}")

    try:
        wait(lambda: ready(http), "a warm worker", worker_log, service_log)
        once = {"Idempotency-Key": "canary-of-an-idempotency-key", "Prefer": f"wait={PATIENCE_S}"}
        done = http.post("/generate?canary-of-a-query=1", json=SENT, headers=once)
        assert done.json()["status"] == "succeeded", done.text
        refused(422, headers=once, seed=5)
        refused(422, steps=0)
        refused(422, width=-1, path="/generate?canary-of-a-query=1")
        refused(401, headers={"Authorization": "Bearer slk_canary-of-another-key"})
        refused(404, path="/nothing?canary-of-a-query=1")
        refused(415, headers={"Content-Type": "text/plain"})
        forge(own_redis, SENT | {"steps": "canary-of-a-number"})
        wait(lambda: "ValidationError" in worker_log.read_text(), "its end", worker_log)
        scrapes = [httpx.get(f"http://127.0.0.1:{at}/metrics").text for at in (frontends, workers)]
        assert 'safelatent_generations_submitted_total{level="max",model="tiny"' in scrapes[0]
        assert 'status="succeeded",tenant="alice"} 1.0' in scrapes[1]
    finally:
        http.close()
        service.terminate()
        service.wait(PATIENCE_S)
        worker.terminate()
        worker.join(PATIENCE_S)
    logs = [service_log.read_text(), worker_log.read_text()]
    assert '"logger": "service.http"' in logs[0] and '"logger": "worker.jobs"' in logs[1]
    assert '"logger": "uvicorn.error"' in logs[0]
    for seen in (*logs, *scrapes, *errors):
        assert "canary" not in seen


def forge(redis: RedisServer, request: dict[str, Any]) -> None:
    """Queue what no frontend lets through."""
    with Redis.from_url(redis.url) as connection:
        line = queue("tiny", "alice", "normal", connection)
        line.enqueue(TASK, kwargs={"version": SCHEMA_VERSION, "request": request})


def wait(condition: Callable[[], object], what: str, *logs: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        said = "\n".join(log.read_text()[-3000:] for log in logs)
        assert time.monotonic() < deadline, f"no {what}:\n{said}"
        time.sleep(0.1)


def ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").is_success
    except httpx.TransportError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
