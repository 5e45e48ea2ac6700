"""Who can write to Redis can forge anything there. Readers run none of it and call nobody.

What workers do with forged jobs is in tests/worker/test_slots.py, forged webhooks are in
test_deliveries.py.
"""

import base64
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from redis import Redis
from rq.webhook import Webhook

from safelatent import deliveries, errors
from safelatent.jobs import MODELS, OWNED
from safelatent.store import Store
from tests.service.played import CARD, result, work
from tests.service.receiver import SECRET, Receiver, await_, delivering


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.canary,)


def forge_result(connection: Redis, id: str, value: bytes) -> None:
    fields = {"type": 1, "return_value": base64.b64encode(value).decode()}
    connection.xadd(f"rq:results:{id}", fields)


def test_pickles_stay_pickled(
    http: httpx.Client, connection: Redis, redis_url: str, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))
    pickle.loads(pickle.dumps(Bomb(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()
    with Receiver() as receiver, delivering(redis_url, [SECRET]):
        ids = []
        for field in ("data", "meta", "webhooks", "result"):
            body = {"prompt": "a cat", "webhook": receiver.url}
            ids.append(http.post("/generate", json=body).json()["id"])
            connection.hset(f"rq:job:{ids[-1]}", field, bomb)
            forge_result(connection, ids[-1], bomb)
            connection.hset(f"rq:job:{ids[-1]}", "status", "finished")
            connection.zadd(deliveries.DUE, {ids[-1]: 0})
        for id in ids:
            for path in ("", "/images/0", "/events"):
                assert http.get(f"/generations/{id}{path}").status_code in (200, 404, 409)
            http.post(f"/generations/{id}/cancel")
            http.delete(f"/generations/{id}")
        http.get("/generations")
        work(connection, result)
        await_(lambda: connection.zcount(deliveries.DUE, "-inf", 1) == 0, "look at each")
    assert not canary.exists()


def test_forged_callbacks_and_webhooks_of_rq_are_dropped(
    http: httpx.Client,
    connection: Redis,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RQ's registries run failure callbacks and webhooks when they are merely counted."""
    canary = tmp_path / "canary"
    monkeypatch.setenv("TRACE", str(canary))
    trace = "tests.worker.process.trace"
    with Receiver() as receiver, delivering(redis_url, [SECRET]):
        ends: tuple[Literal["finished"], Literal["failed"]] = ("finished", "failed")
        webhooks = [Webhook(receiver.url, end).to_dict() for end in ends]
        forged = {
            **{f"{end}_callback_name": trace for end in ("success", "failure", "stopped")},
            "webhooks": json.dumps(webhooks),
        }
        done, abandoned, foreign, cancelled = (
            http.post("/generate", json={"prompt": "a cat"}).json()["id"] for _ in range(4)
        )
        for id in (done, abandoned, foreign, cancelled):
            connection.hset(f"rq:job:{id}", mapping=forged)
        connection.hset(f"rq:job:{abandoned}", "status", "started")
        connection.zadd("rq:wip:tiny:normal", {f"{abandoned}:1": time.time() - 1000})
        forged_call = json.dumps(["os.mkdir", None, [str(canary)], {}])
        connection.hset(f"rq:job:{foreign}", "data", forged_call)
        http.post(f"/generations/{cancelled}/cancel")
        for path in ("/generations", f"/generations/{done}", "/readyz", "/models"):
            http.get(path)
        work(connection, result)
        assert http.get(f"/generations/{done}").json()["status"] == "succeeded"
    assert not canary.exists()
    assert receiver.calls == []


@pytest.mark.parametrize(
    "forged",
    [
        {"images": [{"index": "../../etc/passwd"}]},
        {"request": {"prompt": "a cat", "image_format": "../../../../etc/passwd"}},
        {"status": "running"},
        {"images": "all"},
    ],
    ids=str,
)
def test_a_forged_result_reads_no_other_file(
    http: httpx.Client, connection: Redis, store: Path, forged: dict[str, Any]
) -> None:
    (store / "secret").write_text("canary")
    id = http.post("/generate", json={"prompt": "a cat"}).json()["id"]
    work(connection, result)
    kept = connection.xrange(f"rq:results:{id}")[-1][1][b"return_value"]
    value = json.loads(base64.b64decode(kept)) | forged
    connection.delete(f"rq:results:{id}")
    forge_result(connection, id, json.dumps(value).encode())
    for path in ("", "/images/0", "/images/0/heatmap"):
        answer = http.get(f"/generations/{id}{path}")
        assert answer.status_code < 500
        assert "canary" not in answer.text and "passwd" not in answer.text
        assert answer.headers["content-type"] in ("application/json", "application/problem+json")


def test_forged_news_and_cards_break_nobody_for_good(http: httpx.Client, connection: Redis) -> None:
    connection.xadd("safelatent:events", {"steps": "no json"})
    connection.xadd("safelatent:events", {"finished": b"\xff\xfe"})
    connection.zadd(OWNED.format("open"), {"../../x": time.time() * 1e6, "a b": time.time() * 1e6})
    assert http.get("/generations").json()["data"] == []
    connection.hset(MODELS, "bad", "no json")
    http.get("/models")
    connection.hdel(MODELS, "bad")
    connection.hset(MODELS, CARD.id, CARD.model_dump_json())
    id = http.post("/generate", json={"prompt": "a cat"}).json()["id"]
    work(connection, result)
    assert http.get(f"/generations/{id}").json()["status"] == "succeeded"


@pytest.mark.parametrize(
    ("field", "forged"),
    [
        ("meta", "[]"),
        ("meta", "null"),
        ("meta", '{"tenant": "open", "policy": 5}'),
        ("timeout", "soon"),
        ("created_at", "yesterday"),
        ("data", "[]"),
    ],
)
def test_a_forged_job_is_none_and_hides_no_other(
    http: httpx.Client, connection: Redis, field: str, forged: str
) -> None:
    ids = [http.post("/generate", json={"prompt": "a cat"}).json()["id"] for _ in range(2)]
    connection.hset(f"rq:job:{ids[1]}", field, forged)
    assert [each["id"] for each in http.get("/generations").json()["data"]] == ids[:1]
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events"), ("DELETE", "")):
        assert http.request(method, f"/generations/{ids[1]}{path}").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/generations/..%2f..%2fetc%2fpasswd",
        "/generations/%2e%2e/images/0",
        "/generations/..%2f../images/0",
        "/generations/a%00b/images/0",
        "/generations/a%0d%0aX:y/images/0",
        "/generations/*/images/0",
    ],
)
def test_an_id_that_is_a_path_is_not_found(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 404
    assert http.delete(path).status_code in (404, 405)


@pytest.mark.parametrize(
    "key",
    ["a", "../a", "a/..", "a/.", "a/.b", "/etc/passwd", "a/b/c", "a/b\n", "a\0/b", "a/b%2f.."],
)
def test_a_key_that_is_a_path_is_none(tmp_path: Path, key: str) -> None:
    store = Store(f"file://{tmp_path}/store")
    with pytest.raises(errors.NotFound):
        store.get(key)
    with pytest.raises(errors.NotFound):
        store.put(key, b"x")
    assert not list((tmp_path / "store").iterdir()) and len(list(tmp_path.iterdir())) == 1
