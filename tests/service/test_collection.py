"""A tenant's generations: listed, filtered, deleted; and what it is told that it may ask for."""

import hashlib
import logging
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from safelatent import events
from safelatent.schema import GenerationRequest, Progress
from safelatent.store import Store
from service.app import create_app
from service.settings import Settings
from tests.service.played import CARD, result, serving, work


def make(http: httpx.Client, **body: Any) -> str:
    answer = http.post("/generate", json={"prompt": "a cat"} | body).raise_for_status()
    return str(answer.json()["id"])


def listed(http: httpx.Client, **query: Any) -> list[str]:
    page = http.get("/generations", params=query).raise_for_status().json()
    return [each["id"] for each in page["data"]]


def test_pages_hold_each_generation_once_newest_first(
    http: httpx.Client, connection: Redis
) -> None:
    made = [make(http) for _ in range(7)]
    owned = "safelatent:owned:open"
    same = connection.zscore(owned, made[3])
    connection.zadd(owned, {id: same for id in made[3:6]})  # created in one microsecond
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = http.get("/generations", params=query).json()
        seen += [each["id"] for each in page["data"]]
        if page["next"] is None:
            break
        assert len(page["data"]) == 2
        query["cursor"] = page["next"]
    assert len(seen) == 7 and set(seen) == set(made)
    assert seen[0] == made[6] and seen[-3:] == made[2::-1]
    assert page["data"][0]["links"]["self"] == f"/generations/{made[0]}"


def test_filters(http: httpx.Client, connection: Redis) -> None:
    first = make(http, metadata={"job": "x", "hot": True})
    work(connection, result)
    second = make(http, metadata={"job": "y"})
    assert listed(http) == [second, first]
    assert listed(http, status="succeeded") == [first]
    assert listed(http, **{"metadata.job": "y"}) == [second]
    assert listed(http, **{"metadata.job": "x", "metadata.hot": "true"}) == [first]
    assert listed(http, **{"metadata.job": "x", "metadata.hot": "1"}) == []
    created = http.get(f"/generations/{first}").json()["created_at"]
    assert listed(http, created_after=created) == [second]
    assert listed(http, created_before=created) == []
    assert listed(http, created_after="2999-01-01T00:00:00") == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"cursor": "x"}, "cursor"),
        ({"cursor": "\u00e9"}, "cursor"),
        ({"cursor": "eDo="}, "cursor"),
        ({"status": "asleep"}, "status"),
        ({"created_after": "yesterday"}, "created_after"),
    ],
)
def test_a_query_that_cannot_be_is_named(
    http: httpx.Client, query: dict[str, Any], field: str
) -> None:
    answer = http.get("/generations", params=query)
    assert answer.status_code == 422
    assert [each["field"] for each in answer.json()["errors"]] == [field]


def test_what_has_expired_is_not_listed_and_the_index_is_swept(
    http: httpx.Client, connection: Redis
) -> None:
    old, gone, new = make(http), make(http), make(http)
    connection.zadd("safelatent:owned:open", {old: (time.time() - 25 * 3600) * 1e6})
    connection.delete(f"rq:job:{gone}")
    assert listed(http) == [new, old]
    make(http)
    assert connection.zscore("safelatent:owned:open", old) is None


def test_deleted_is_gone_for_ever(
    http: httpx.Client, connection: Redis, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "uvicorn.error")
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)
    id = make(http, n=2)
    kept = make(http)
    work(connection, result)
    images = Store(f"file://{store}")
    for name in (f"{id}/0.png", f"{id}/1.png", f"{id}/0.heatmap.png", f"{kept}/0.png"):
        images.put(name, b"pixels")
    assert http.delete(f"/generations/{id}").status_code == 204
    for path in (f"/generations/{id}", f"/generations/{id}/images/0", f"/generations/{id}/events"):
        assert http.get(path).status_code == 404
    logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    assert f"generation {id} of tenant open is deleted" in caplog.messages
    assert http.delete(f"/generations/{id}").status_code == 404
    assert listed(http) == [kept]
    assert not (store / id).exists()
    assert (store / kept / "0.png").exists()
    assert not [key for key in connection.keys() if id.encode() in key]


def test_a_running_one_is_cancelled_first(http: httpx.Client, connection: Redis) -> None:
    id = make(http)
    started = threading.Event()

    def until_cancelled(version: int, request: dict[str, Any]) -> dict[str, Any]:
        events.publish_steps(connection, {id: Progress(step=1, steps=50)})
        started.set()
        while not connection.exists(f"safelatent:cancelled:{id}"):
            time.sleep(0.02)
        return result(version, request)

    thread = threading.Thread(target=work, args=(connection, until_cancelled))
    thread.start()
    assert started.wait(10)
    assert http.delete(f"/generations/{id}").status_code == 204
    thread.join()
    assert http.get(f"/generations/{id}").status_code == 404
    assert not connection.hexists(events.PROGRESS, id)


def test_a_tenant_sees_its_own_and_keys_are_its_own(
    redis_url: str, connection: Redis, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    for name, more in (
        ("alice", ""),
        ("bobby", 'floor = "strong"\nmax_steps = 60\nretention_s = 90'),
    ):
        digest = hashlib.sha256(name.encode()).hexdigest()
        with policy.open("a") as file:
            file.write(f'[tenants.{name}]\nkeys = [{{ id = "{name}", sha256 = "{digest}" }}]\n')
            file.write(more + "\n")
    connection.hset("safelatent:models", CARD.id, CARD.model_dump_json())
    settings = Settings(
        redis_url=redis_url, model="tiny", store_url=f"file://{tmp_path}", policy_file=policy
    )
    with serving(create_app(settings)) as url:
        alice, bobby = (
            httpx.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {name}", "Idempotency-Key": "same"},
            )
            for name in ("alice", "bobby")
        )
        with alice, bobby:
            safety = {"level": "strong"}
            hers, his = make(alice, safety=safety), make(bobby, safety=safety)
            assert hers != his
            assert (listed(alice), listed(bobby)) == ([hers], [his])
            assert bobby.delete(f"/generations/{hers}").status_code == 404
            assert bobby.get(f"/generations/{hers}/events").status_code == 404
            told = bobby.get("/capabilities").raise_for_status().json()
            assert list(told["levels"]) == ["strong", "max", "custom"]
            assert told["limits"]["steps"] == 60 and told["concepts_fixed"]
            assert told["limits"]["retention_s"] == 90
            cancelled = bobby.post(
                "/generate",
                json={"prompt": "a cat", "safety": safety},
                headers={"Idempotency-Key": "another"},
            ).json()["id"]
            bobby.post(f"/generations/{cancelled}/cancel")
            work(connection, result)
            for id, kept_s in ((cancelled, 90), (his, 90), (hers, 24 * 3600)):
                assert kept_s - 60 < connection.ttl(f"rq:job:{id}") <= kept_s


def test_capabilities_are_what_the_service_accepts(http: httpx.Client) -> None:
    told = http.get("/capabilities").raise_for_status().json()
    assert told["levels"]["medium"]["guidance_scale"] == 1000
    assert told["levels"]["off"] is None and told["models"] == ["tiny"]
    for field, words in (
        ("scheduler", told["schedulers"]),
        ("image_format", told["image_formats"]),
        ("priority", told["priorities"]),
    ):
        for word in words:
            GenerationRequest.model_validate({"prompt": "a cat", field: word})
    assert http.post("/generate", json={"prompt": "a", "n": told["limits"]["n"]}).is_success
    assert not http.post("/generate", json={"prompt": "a", "n": told["limits"]["n"] + 1}).is_success
