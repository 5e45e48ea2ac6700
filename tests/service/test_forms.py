"""One endpoint, several forms of its answer; and a request that is repeated is done once."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis
from rq import get_current_job

from safelatent.schema import Blocked
from safelatent.store import Store, image_key
from service.accept import preferred
from tests.service.played import SHA256, result, work

CAT = {"prompt": "a cat"}
FORMS = ["application/json", "text/event-stream", "image/png", "image/webp", "image/jpeg"]


def ask(
    http: httpx.Client, connection: Redis, generate: Callable[..., Any], accept: str, **body: Any
) -> httpx.Response:
    """Ask for an image's bytes while a worker is at work."""

    def work_on_the_next() -> None:
        while not connection.llen("rq:queue:tiny:open:normal"):
            time.sleep(0.02)
        work(connection, generate)

    thread = threading.Thread(target=work_on_the_next)
    thread.start()
    headers = {"Prefer": "wait=15", "Accept": accept}
    answer = http.post("/generate", json=CAT | body, headers=headers)
    thread.join()
    return answer


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_the_bytes_themselves_with_the_report_in_headers(
    http: httpx.Client, connection: Redis, store: Path, image_format: str
) -> None:
    def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
        assert request["image_format"] == image_format
        done = result(version, request)
        id = get_current_job().id  # type: ignore[union-attr]
        Store(f"file://{store}").put(image_key(id, 0, SHA256, image_format), b"pixels")
        done["images"][0]["media_type"] = f"image/{image_format}"
        return done

    answer = ask(http, connection, generate, f"image/{image_format}", seed=7)
    assert (answer.status_code, answer.content) == (200, b"pixels")
    said = answer.headers
    assert said["content-type"] == f"image/{image_format}"
    assert said["preference-applied"] == "wait=15"
    assert said["safelatent-status"] == "succeeded" and said["safelatent-seed"] == "7"
    assert said["safelatent-safety-level"] == "medium"
    assert said["safelatent-safety-applied"] == "true"
    here = f"/generations/{said['safelatent-id']}"
    assert said["link"] == f'<{here}>; rel="describedby"' and said["location"] == here
    assert http.get(here).json()["status"] == "succeeded"


def test_instead_of_a_blocked_image_comes_its_problem(
    http: httpx.Client, connection: Redis
) -> None:
    def block(version: int, request: dict[str, Any]) -> dict[str, Any]:
        done = result(version, request)
        blocked = Blocked(category="nudity", check="q16", score=0.9, threshold=0.5, policy="p")
        done["images"][0] |= {"blocked": blocked.model_dump(), "url": None, "sha256": None}
        return done

    answer = ask(http, connection, block, "image/png")
    assert answer.status_code == 404
    assert answer.json()["type"] == "/problems/image-blocked"
    assert "q16 flagged nudity" in answer.json()["detail"]


def test_a_repeated_request_has_the_first_ones_format_or_a_406(
    http: httpx.Client, connection: Redis
) -> None:
    key = {"Prefer": "wait=0", "Idempotency-Key": "k"}
    first = http.post("/generate", json=CAT, headers=key | {"Accept": "image/webp"})
    assert first.json()["request"]["image_format"] == "webp"
    for accept, status in (("application/json", 202), ("image/webp", 202), ("image/png", 406)):
        again = http.post("/generate", json=CAT, headers=key | {"Accept": accept})
        assert again.status_code == status
        assert status == 406 or again.json()["id"] == first.json()["id"]
    assert "webp" in again.json()["detail"]
    assert len(connection.keys("rq:job:*")) == 1


def test_not_in_time_it_is_a_202(http: httpx.Client) -> None:
    headers = {"Prefer": "wait=0", "Accept": "image/png"}
    answer = http.post("/generate", json=CAT, headers=headers)
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")


@pytest.mark.parametrize(
    ("accept", "body", "prefer", "right"),
    [
        ("image/png", {"n": 2}, "wait=9", "n of 1 (here 2)"),
        ("image/png", {}, "", "Prefer: wait=N"),
        ("image/png", {"image_format": "webp"}, "wait=9", "image/webp"),
        ("text/html", {}, "", "application/json"),
        ("*/*;q=0", {}, "", "application/json"),
    ],
)
def test_a_form_that_cannot_be_had_is_a_406_that_says_which_can(
    http: httpx.Client,
    connection: Redis,
    accept: str,
    body: dict[str, Any],
    prefer: str,
    right: str,
) -> None:
    headers = {"Accept": accept, "Prefer": prefer}
    answer = http.post("/generate", json=CAT | body, headers=headers)
    assert answer.status_code == 406
    assert answer.json()["type"] == "/problems/not-acceptable"
    assert right in answer.json()["detail"]
    assert not connection.keys("rq:job:*")


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ([], "application/json"),
        (["*/*"], "application/json"),
        (["image/*"], "image/png"),
        (["image/webp, application/json;q=0.9"], "image/webp"),
        (["image/*;q=0.5, image/jpeg"], "image/jpeg"),
        (["image/png;q=0", "image/*"], "image/webp"),
        (["*/*;q=0.1, application/json;q=0"], "text/event-stream"),
        (["text/html"], None),
        ([";;,=,q/"], "application/json"),
        (["TEXT/Event-Stream ; Q=1.0"], "text/event-stream"),
    ],
)
def test_the_form_that_is_liked_best(accept: list[str], chosen: str | None) -> None:
    assert preferred(accept, FORMS) == chosen


def repeat(http: httpx.Client, key: str, **body: Any) -> httpx.Response:
    return http.post("/generate", json=CAT | body, headers={"Idempotency-Key": key})


def test_the_same_key_is_the_same_generation_also_when_it_is_done(
    http: httpx.Client, connection: Redis
) -> None:
    first = repeat(http, "k").json()
    assert repeat(http, "k").json()["id"] == first["id"]
    work(connection, result)
    again = repeat(http, "k")
    assert again.json()["id"] == first["id"]
    assert (again.status_code, again.json()["status"]) == (200, "succeeded")
    assert repeat(http, "other").json()["id"] != first["id"]
    other = repeat(http, "k", steps=30)
    assert (other.status_code, other.json()["type"]) == (422, "/problems/key-reused")
    assert 0 < connection.ttl(connection.keys("safelatent:once:*")[0]) <= 24 * 3600


def test_twenty_at_once_are_one(http: httpx.Client, connection: Redis) -> None:
    with ThreadPoolExecutor(20) as crowd:
        ids = {each.json()["id"] for each in crowd.map(lambda _: repeat(http, "k"), range(20))}
    assert len(ids) == 1
    assert connection.llen("rq:queue:tiny:open:normal") == 1


def test_a_key_whose_first_request_is_not_queued_yet_is_a_409(
    http: httpx.Client, connection: Redis
) -> None:
    repeat(http, "k")
    name = connection.keys("safelatent:once:*")[0]
    connection.delete(*connection.keys("rq:job:*"))
    connection.expire(name, 10)
    answer = repeat(http, "k")
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
    connection.delete(name)  # as its expiry does
    assert repeat(http, "k").status_code == 202


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_has_1_to_255_characters(http: httpx.Client, key: str) -> None:
    answer = repeat(http, key)
    assert (answer.status_code, answer.json()["type"]) == (400, "/problems/malformed-header")
    assert str(len(key)) in answer.json()["detail"]
