"""Webhooks: what is owed arrives, genuine, whatever dies; and calls nobody that it should not."""

import base64
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from standardwebhooks.webhooks import Webhook

from safelatent import deliveries, errors, webhooks
from safelatent.queues import TASK
from safelatent.schema import Status
from service.app import create_app
from service.settings import Settings
from service.webhooks import deliverer
from tests.service.played import CARD, result, serving, work
from tests.service.receiver import (
    PATIENCE_S,
    SECRET,
    Receiver,
    ask,
    await_,
    await_delivery,
    delivering,
)

OLDER = "whsec_" + base64.b64encode(b"older-one" * 3).decode()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def test_what_arrives_is_the_generation_signed_by_standard_webhooks(
    http: httpx.Client, connection: Redis, redis_url: str, receiver: Receiver
) -> None:
    with delivering(redis_url, [SECRET, OLDER]):
        id = ask(http, f"{receiver.url}/hook?token=1")
        work(connection, result)
        [(path, headers, body)] = receiver.await_calls(1)
        state = await_delivery(http, id, "delivered")
    assert path == "/hook?token=1"
    assert state == {
        "url": f"{receiver.url}/hook?token=1",
        "status": "delivered",
        "attempts": 1,
        "last_status": 204,
        "last_error": None,
        "next_attempt_at": None,
    }
    for secret in (SECRET, OLDER):
        event = Webhook(secret).verify(body, headers)
        assert webhooks.verify(body, headers, secret).id == id
    assert event["type"] == "generation.succeeded"
    looked_at = http.get(f"/generations/{id}").json() | {"webhook": None}
    assert event["data"] == looked_at and event["timestamp"] == looked_at["finished_at"]


def test_each_end_is_told_once_by_several_deliverers(
    http: httpx.Client, connection: Redis, redis_url: str, receiver: Receiver
) -> None:
    def some_fail(version: int, request: dict[str, Any]) -> dict[str, Any]:
        problem = errors.OutOfMemory("too large").problem
        failed = {"status": Status.FAILED, "images": [], "error": problem}
        return result(version, request, **(failed if request["seed"] % 2 else {}))

    with delivering(redis_url, [SECRET]), delivering(redis_url, [SECRET]):
        ids = [ask(http, receiver.url, seed=seed) for seed in range(12)]
        cancelled = ask(http, receiver.url)
        http.post(f"/generations/{cancelled}/cancel").raise_for_status()
        work(connection, some_fail)
        for id in (*ids, cancelled):
            await_delivery(http, id, "delivered")
        time.sleep(0.5)
    told = {}
    for _, headers, body in receiver.calls:
        event = json.loads(body)
        told[event["data"]["id"]] = event["type"]
        assert headers["webhook-id"] == f"msg_{event['data']['id']}"
    assert len(receiver.calls) == len(told) == 13
    assert told[cancelled] == "generation.cancelled"
    assert [told[id] for id in ids] == ["generation.succeeded", "generation.failed"] * 6
    assert connection.zcard(deliveries.DUE) == 0
    assert connection.hgetall(deliveries.OUTCOMES) == {b"delivered": b"13"}


def test_a_failed_attempt_is_made_again_and_a_redirect_is_not_followed(
    http: httpx.Client, connection: Redis, redis_url: str, receiver: Receiver
) -> None:
    receiver.answers = [500, 302]
    with delivering(redis_url, [SECRET]):
        id = ask(http, receiver.url)
        work(connection, result)
        state = await_delivery(http, id, "delivered")
    assert state["attempts"] == 3 and state["last_error"] is None
    assert [path for path, _, _ in receiver.calls] == ["/"] * 3
    assert len({headers["webhook-id"] for _, headers, _ in receiver.calls}) == 1
    assert len({body for _, _, body in receiver.calls}) == 1


def test_it_is_given_up_after_the_last_pause_or_at_once_by_410(
    http: httpx.Client, connection: Redis, redis_url: str, receiver: Receiver
) -> None:
    receiver.answers = [410, 500, 503, 302]
    with delivering(redis_url, [SECRET], webhook_retry_s=[0.1, 0.1]):
        gone = ask(http, receiver.url)
        work(connection, result)
        assert await_delivery(http, gone, "failed")["attempts"] == 1
        id = ask(http, receiver.url)
        work(connection, result)
        state = await_delivery(http, id, "failed")
    assert state["attempts"] == 3 and state["last_status"] == 302
    assert "redirect" in state["last_error"] and state["next_attempt_at"] is None
    assert connection.zcard(deliveries.DUE) == 0


def test_a_receiver_that_is_down_gets_it_when_it_is_back(
    http: httpx.Client, connection: Redis, redis_url: str
) -> None:
    with Receiver() as receiver:
        port = receiver.port
    with delivering(redis_url, [SECRET], webhook_retry_s=[0.2] * 200):
        id = ask(http, f"http://127.0.0.1:{port}/")
        work(connection, result)
        await_(
            lambda: http.get(f"/generations/{id}").json()["webhook"]["last_error"], "first attempt"
        )
        state = http.get(f"/generations/{id}").json()["webhook"]
        assert state["last_error"].startswith("cannot connect") and state["next_attempt_at"]
        with Receiver(port=port) as receiver:
            await_delivery(http, id, "delivered")
            assert len(receiver.calls) == 1


def test_a_receiver_that_drips_is_cut_off_and_holds_up_nobody(
    http: httpx.Client,
    connection: Redis,
    redis_url: str,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deliverer, "AT_ONCE", 4)
    monkeypatch.setattr(deliverer, "AT_ONCE_PER_HOST", 2)

    def drip(handler: BaseHTTPRequestHandler) -> None:
        try:
            while True:
                handler.wfile.write(b"H")
                time.sleep(0.05)
        except OSError:
            pass  # cut off

    receiver.answers = [drip] * 40
    with (
        Receiver() as quick,
        delivering(redis_url, [SECRET], webhook_timeout_s=3, webhook_retry_s=[100]),
    ):
        slow = [ask(http, receiver.url) for _ in range(8)]
        work(connection, result)
        receiver.await_calls(2)
        id = ask(http, quick.url)
        work(connection, result)
        await_delivery(http, id, "delivered")
        assert all(
            http.get(f"/generations/{each}").json()["webhook"]["status"] == "pending"
            for each in slow
        )
        await_(
            lambda: http.get(f"/generations/{slow[0]}").json()["webhook"]["last_error"],
            "end of the slow attempt",
        )
    said = http.get(f"/generations/{slow[0]}").json()["webhook"]["last_error"]
    assert said == "the receiver did not answer within 3 s"


def test_what_ended_while_no_deliverer_lived_is_found(
    http: httpx.Client,
    connection: Redis,
    redis_url: str,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deliveries, "LOOK_S", 0)
    id = ask(http, receiver.url)
    work(connection, result)
    connection.delete("safelatent:events")
    with delivering(redis_url, [SECRET]):
        await_delivery(http, id, "delivered")
    assert len(receiver.calls) == 1


def test_only_who_holds_the_lease_moves_it_and_an_end_counts_once(connection: Redis) -> None:
    owed = deliveries.Owed(connection)
    connection.zadd(deliveries.DUE, {"a": 0})
    lease, ids = owed.take(10, lease_s=60)
    assert ids == ["a"] and owed.take(10, lease_s=60)[1] == []
    held = owed.move("a", lease, 60, ended=1, attempts=1)
    assert held is not None and owed.move("a", lease, None) is None
    owed.ended("a")
    assert owed.take(10, lease_s=60)[1] == []
    assert owed.move("a", held, None, status="delivered") is not None
    owed.ended("a")
    assert connection.zcard(deliveries.DUE) == 0
    assert deliveries.delivery(connection, "a", "https://b").status == "delivered"


def test_a_deleted_generation_is_told_to_nobody(
    http: httpx.Client, connection: Redis, redis_url: str, receiver: Receiver
) -> None:
    receiver.answers = [500]
    with delivering(redis_url, [SECRET], webhook_retry_s=[1]):
        id = ask(http, receiver.url)
        work(connection, result)
        receiver.await_calls(1)
        await_(lambda: connection.hget(deliveries.STATE.format(id), "last_status"), "outcome")
        assert http.delete(f"/generations/{id}").status_code == 204
        time.sleep(1.5)
    assert len(receiver.calls) == 1
    assert not [key for key in connection.keys() if id.encode() in key]
    assert connection.zcard(deliveries.DUE) == 0


def start_process(redis_url: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    given = {
        "REDIS_URL": redis_url,
        "SAFELATENT_WEBHOOK_SECRET": SECRET,
        "SAFELATENT_WEBHOOK_ALLOW": "127.0.0.1",
        "SAFELATENT_WEBHOOK_RETRY_S": "[1, 1, 1]",
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "service.webhooks"],
            env=os.environ | given | environment,
            stdout=output,
            stderr=output,
        )


def test_kill_9_loses_nothing_and_no_secret_is_in_a_log_or_in_redis(
    http: httpx.Client,
    connection: Redis,
    redis_url: str,
    receiver: Receiver,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(deliveries, "LOOK_S", 0)
    held = []

    def hold(handler: BaseHTTPRequestHandler) -> None:
        held.append(handler)
        time.sleep(PATIENCE_S)

    receiver.answers = [500, hold]
    log = tmp_path / "log"
    id = ask(http, f"{receiver.url}/canary-token?canary")
    refused = http.post(
        "/generate", json={"prompt": "a", "webhook": "https://joe:canary@example.com"}
    )
    assert refused.status_code == 422 and "canary" not in refused.text
    work(connection, result)
    first = start_process(redis_url, log, SAFELATENT_WEBHOOK_TIMEOUT_S="1")
    receiver.await_calls(1)
    first.kill()
    first.wait()  # between two attempts, or at the begin of the next
    second = start_process(redis_url, log, SAFELATENT_WEBHOOK_TIMEOUT_S="1")
    await_(lambda: held, "second attempt")
    second.kill()
    second.wait()  # in the middle of an attempt
    third = start_process(redis_url, log)
    try:
        state = await_delivery(http, id, "delivered")
    finally:
        third.send_signal(signal.SIGTERM)
    assert third.wait(PATIENCE_S) == 0
    assert state["attempts"] == len(receiver.calls) >= 3
    keys = connection.keys()
    stored = b"".join(dump for key in keys if (dump := connection.dump(key)))
    said = log.read_bytes() + caplog.text.encode()
    assert id.encode() in said
    assert b"canary" not in said
    for text in (SECRET.encode(), base64.b64decode(SECRET.removeprefix("whsec_"))):
        assert text not in said + stored


def test_a_forged_job_has_nobody_called(
    http: httpx.Client, connection: Redis, redis_url: str, receiver: Receiver
) -> None:
    """Who can write to Redis lacks the seal, which takes the secret."""
    genuine = ask(http, f"{receiver.url}/genuine")
    work(connection, result)
    kwargs = {"version": 1, "request": {}}
    forger = Queue("tiny:open:high", connection, serializer=JSONSerializer)
    taken = http.get(f"/generations/{genuine}").json()["request"]
    kwargs["request"] = taken | {"webhook": f"{receiver.url}/forged"}
    forged = []
    for meta in ({"tenant": "open"}, {"tenant": "open", "seal": "0" * 64}, {"seal": 5}, {}):
        job = forger.enqueue(TASK, kwargs=kwargs, meta=meta)
        connection.zadd(deliveries.DUE, {job.id: 0})
        forged.append(job.id)
    connection.zadd(deliveries.DUE, {"no-job": 0, "a b": 0, genuine: 0})
    work(connection, result)
    with delivering(redis_url, [SECRET]):
        await_delivery(http, genuine, "delivered")
        await_(
            lambda: all(
                connection.hget(deliveries.STATE.format(id), "status") == b"failed" for id in forged
            ),
            "end of the forged",
        )
        await_(lambda: connection.zcard(deliveries.DUE) == 0, "empty list")
    assert [path for path, _, _ in receiver.calls] == ["/genuine"]


def test_a_policys_secrets_are_referred_to_and_sign(
    redis_url: str,
    connection: Redis,
    tmp_path: Path,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALICE_SECRET", SECRET)
    (tmp_path / "secret").write_text(OLDER + "\n")
    policy = tmp_path / "policy.toml"
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("alice", "bobby")}
    policy.write_text(
        f"""
        [tenants.alice]
        keys = [{{ id = "alice", sha256 = "{digests["alice"]}" }}]
        webhook_secrets = ["env:ALICE_SECRET", "file:{tmp_path}/secret"]
        [tenants.bobby]
        keys = [{{ id = "bobby", sha256 = "{digests["bobby"]}" }}]
        """
    )
    connection.hset("safelatent:models", CARD.id, CARD.model_dump_json())
    settings = Settings(
        redis_url=redis_url,
        model="tiny",
        store_url="memory:///",
        policy_file=policy,
        webhook_allow="127.0.0.1",
        webhook_secret=SECRET,
    )
    with serving(create_app(settings)) as url, httpx.Client(base_url=url) as http:
        http.headers["Authorization"] = "Bearer bobby"
        body = {"prompt": "a cat", "webhook": receiver.url}
        refused = http.post("/generate", json=body)
        assert refused.status_code == 422 and "webhook_secrets" in refused.json()["detail"]
        assert "webhooks" not in http.get("/capabilities").json()["features"]
        http.headers["Authorization"] = "Bearer alice"
        assert "webhooks" in http.get("/capabilities").json()["features"]
        ask(http, receiver.url)
        work(connection, result)
    process = start_process(redis_url, tmp_path / "log", SAFELATENT_POLICY_FILE=str(policy))
    try:
        connection.zadd(deliveries.DUE, dict.fromkeys(connection.zrange(deliveries.DUE, 0, -1), 0))
        [(_, headers, sent)] = receiver.await_calls(1)
    finally:
        process.terminate()
    assert process.wait(PATIENCE_S) == 0
    for secret in (SECRET, OLDER):
        webhooks.verify(sent, headers, secret)


def test_the_receiver_of_the_docs(
    http: httpx.Client,
    connection: Redis,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SAFELATENT_WEBHOOK_SECRET", SECRET)
    page = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
    example: dict[str, Any] = {}
    exec(re.search("```python\n(.*?)```", page, re.DOTALL)[1], example)  # type: ignore[index]
    with serving(example["app"]) as receiver, delivering(redis_url, [SECRET]):
        id = ask(http, f"{receiver}/hook")
        work(connection, result)
        await_delivery(http, id, "delivered")
        assert httpx.post(f"{receiver}/hook", json={}).status_code == 401
    assert f"{id} succeeded" in capsys.readouterr().out
