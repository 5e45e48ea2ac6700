"""Whether the service is ready, what it answers without Redis, and what it never does."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from redis import Redis
from rq import Callback
from rq.exceptions import InvalidJobOperation
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.webhook import Webhook

from safelatent.jobs import Jobs
from safelatent.queues import SafeJob
from service.app import create_app
from service.settings import Settings
from tests.conftest import RedisServer
from tests.service.played import CARD, result, serving, work


def test_ready_only_with_a_worker_that_holds_the_model(
    http: httpx.Client, connection: Redis
) -> None:
    not_ready = http.get("/readyz")
    assert not_ready.status_code == 503
    assert "worker that holds the model 'tiny'" in not_ready.json()["detail"]
    Jobs(connection).announce("another", CARD.model_copy(update={"id": "other"}), ttl_s=60)
    assert http.get("/readyz").status_code == 503

    Jobs(connection).announce("one", CARD, ttl_s=60)
    Jobs(connection).announce("two", CARD, ttl_s=60)
    Jobs(connection).announce("dead", CARD, ttl_s=-1)
    assert http.get("/readyz").json() == {"status": "ready", "model": "tiny", "workers": 2}
    workers = {model["id"]: model["workers"] for model in http.get("/models").json()}
    assert workers == {"tiny": 2, "other": 1}


@pytest.fixture
def lonely(own_redis: RedisServer, tmp_path: Path) -> Iterator[httpx.Client]:
    """A service whose Redis the test may stop."""
    settings = Settings(redis_url=own_redis.url, model="tiny", store_url=f"file://{tmp_path}")
    with serving(create_app(settings)) as url, httpx.Client(base_url=url, timeout=20) as http:
        yield http


def test_without_redis_every_answer_comes_at_once(
    lonely: httpx.Client, own_redis: RedisServer
) -> None:
    id = lonely.post("/generate", json={"prompt": "a cat"}).json()["id"]
    own_redis.stop()
    for method, path in [
        ("POST", "/generate"),
        ("GET", f"/generations/{id}"),
        ("GET", f"/generations/{id}/images/0"),
        ("POST", f"/generations/{id}/cancel"),
        ("GET", "/models"),
        ("GET", "/readyz"),
    ]:
        body = {"prompt": "a cat"} if path == "/generate" else None
        answer = lonely.request(method, path, json=body, headers={"Prefer": "wait=60"})
        assert answer.status_code == 503, path
        assert answer.headers["content-type"] == "application/problem+json"
        assert "Redis" in answer.json()["detail"]
        assert 1 <= int(answer.headers["retry-after"]) <= 10
        assert answer.elapsed.total_seconds() < 2
    assert lonely.get("/healthz").status_code == 200


def test_a_redis_that_hangs_is_no_hang_of_ours(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        settings = Settings(redis_url=address, model="tiny", store_url=f"file://{tmp_path}")
        with serving(create_app(settings)) as url:
            answer = httpx.post(f"{url}/generate", json={"prompt": "a cat"}, timeout=20)
    assert answer.status_code == 503
    assert answer.elapsed.total_seconds() < 2


def test_who_waits_outlives_a_restart_of_redis(
    lonely: httpx.Client, own_redis: RedisServer
) -> None:
    here = lonely.post("/generate", json={"prompt": "a cat"}).headers["location"]
    answers: list[httpx.Response] = []
    waiting = threading.Thread(
        target=lambda: answers.append(lonely.get(here, headers={"Prefer": "wait=15"}))
    )
    waiting.start()
    time.sleep(0.3)
    own_redis.stop()
    time.sleep(0.5)
    own_redis.start()
    assert lonely.post(f"{here}/cancel").json()["status"] == "cancelled"
    waiting.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["status"] == "cancelled"
    assert answers[0].elapsed.total_seconds() < 10


@pytest.mark.parametrize(
    "forged",
    [
        {"data": '["os.mkdir", null, ["CANARY"], {}]'},
        {"data": '["os.mkdir", null, ["CANARY"], {"request": {"prompt": "a cat"}}]'},
        {"success_callback_name": "os.mkdir", "failure_callback_name": "os.mkdir"},
        {"webhooks": '[{"url": "http://127.0.0.1:9/", "job_status": "finished"}]'},
        {"data": "no json"},
        {"data": '["worker.tasks.generate", null, [], {"request": {"prompt": 1}}]'},
        {"data": '["worker.tasks.generate", null, [], []]'},
        {"status": "invented"},
        {"created_at": "yesterday"},
        {"meta": "no json"},
    ],
    ids=str,
)
def test_a_forged_job_runs_nothing_and_breaks_nothing(
    http: httpx.Client, connection: Redis, forged: dict[str, str], tmp_path: Path
) -> None:
    """Whoever can write to Redis must not be able to run code in whoever reads."""
    canary = tmp_path / "canary"
    here = http.post("/generate", json={"prompt": "a cat"}).headers["location"]
    forged = {name: value.replace("CANARY", str(canary)) for name, value in forged.items()}
    connection.hset(f"rq:job:{here.rsplit('/', 1)[1]}", mapping=forged)
    assert http.get(here).status_code in (200, 404)
    assert http.get(f"{here}/images/0").status_code in (404, 409)
    work(connection, result)
    assert http.get(here).status_code in (200, 404)
    assert http.post(f"{here}/cancel").status_code in (200, 404)
    assert not canary.exists()


def test_callbacks_and_webhooks_of_a_job_are_dropped(connection: Redis) -> None:
    forged = Job.create(
        "os.getpid",
        connection=connection,
        serializer=JSONSerializer,
        on_success=Callback("os.getpid"),
        on_failure=Callback("os.getpid"),
        on_stopped=Callback("os.getpid"),
        webhooks=[Webhook("http://127.0.0.1:9/", job_status="finished")],
    )
    forged.save()
    read = SafeJob.fetch(forged.id, connection, serializer=JSONSerializer)
    assert read.success_callback is read.failure_callback is read.stopped_callback is None
    assert read.webhooks == []
    with pytest.raises(InvalidJobOperation, match="os.getpid"):
        read.func  # noqa: B018


def test_the_service_knows_no_torch() -> None:
    program = (
        "import sys, service.__main__, safelatent.client; print(*sorted({name.split('.')[0] "
        "for name in sys.modules} & {'torch', 'diffusers', 'transformers', 'numpy', 'worker'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_asked_to_end_it_lets_who_waits_go_first(redis_url: str, connection: Redis) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {"REDIS_URL": redis_url, "SAFELATENT_PORT": str(port), "SAFELATENT_MODEL": "tiny"}
    process = subprocess.Popen(
        [sys.executable, "-m", "service"], env=environment, stderr=subprocess.DEVNULL
    )
    queue = "rq:queue:tiny:open:normal"
    transport = httpx.HTTPTransport(retries=10)  # of the connection, until it listens
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=60) as http:
        ending = threading.Thread(target=end_once_queued, args=(process, connection, queue))
        ending.start()
        body = {"prompt": "a cat"}
        waited = http.post("/generate", json=body, headers={"Prefer": "wait=50"})
        ending.join()
    assert waited.status_code == 202
    assert waited.elapsed.total_seconds() < 20
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "REDIS_URL is not set"),
        ({"REDIS_URL": "localhost"}, "redis://"),
        (
            {"REDIS_URL": "redis://localhost", "SAFELATENT_PORT": "http"},
            "SAFELATENT_PORT is 'http'",
        ),
        ({"REDIS_URL": "redis://localhost", "SAFELATENT_STORE_URL": "zz://x"}, "'zz://x'"),
        (
            {"REDIS_URL": "redis://localhost", "SAFELATENT_WEBHOOK_SECRET": "whsec_canary"},
            "SAFELATENT_WEBHOOK_SECRET: a webhook secret is",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(environment: dict[str, str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "canary" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_openapi_document_describes_every_operation(http: httpx.Client) -> None:
    document = http.get("/openapi.json").raise_for_status().json()
    for path, operations in document["paths"].items():
        errors = "application/json" if path.startswith("/v1/") else "application/problem+json"
        for method, operation in operations.items():
            assert operation["summary"] and operation["description"], (method, path)
            for status, answer in operation["responses"].items():
                if status >= "400":
                    assert list(answer["content"]) == [errors], (method, path)
    examples = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    for example in examples["examples"].values():
        assert http.post("/generate", json=example["value"]).status_code == 202


def end_once_queued(process: subprocess.Popen[bytes], connection: Redis, queue: str) -> None:
    while not connection.llen(queue):
        time.sleep(0.05)
    process.terminate()
