"""A generation over HTTP, from the queue to its images."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from safelatent import events
from safelatent.schema import Blocked, Progress
from safelatent.store import Store, image_key
from service.waiting import preferred_wait
from tests.service.played import SHA256, result, work


def test_a_generation_is_accepted_done_and_fetched(
    http: httpx.Client, connection: Redis, store: Path
) -> None:
    accepted = http.post("/generate", json={"prompt": "a cat", "n": 2})
    assert accepted.status_code == 202
    queued = accepted.json()
    here = queued["links"]["self"]
    assert accepted.headers["location"] == here
    assert queued["status"] == "queued"
    assert queued["position"] == 0
    filled = queued["request"]
    assert (filled["model"], filled["width"], filled["height"]) == ("tiny", 64, 32)
    assert 0 <= filled["seed"] < 2**32

    work(connection, result)
    Store(f"file://{store}").put(image_key(queued["id"], 1, SHA256, "png"), b"pixels")

    done = http.get(here).raise_for_status().json()
    assert done["status"] == "succeeded"
    assert done["position"] is None
    assert [image["seed"] for image in done["images"]] == [filled["seed"], filled["seed"] + 1]
    image = http.get(done["images"][1]["url"]).raise_for_status()
    assert image.content == b"pixels"
    assert image.headers["content-type"] == "image/png"
    assert image.headers["cache-control"] == "private, max-age=86400, immutable"
    again = http.get(done["images"][1]["url"], headers={"If-None-Match": image.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_what_was_asked_is_not_filled_in(http: httpx.Client) -> None:
    asked = {"prompt": "a cat", "seed": 0, "width": 128, "height": 8, "model": "tiny"}
    assert asked.items() <= http.post("/generate", json=asked).json()["request"].items()


def test_while_it_runs_its_progress_is_told(http: httpx.Client, connection: Redis) -> None:
    seen: dict[str, Any] = {}

    def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
        events.publish_steps(connection, {id: Progress(step=3, steps=50)})
        seen.update(http.get(f"/generations/{id}").json())
        return result(version, request)

    id = http.post("/generate", json={"prompt": "a cat"}).json()["id"]
    work(connection, generate)
    assert seen["status"] == "running"
    assert seen["progress"] == {"step": 3, "steps": 50}


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_who_waits_is_woken(http: httpx.Client, connection: Redis, method: str) -> None:
    """The service looks again only after 1000 s by itself: it is the event that wakes."""
    with in_the_background(lambda: work_on_the_next(connection)):
        if method == "POST":
            answer = http.post("/generate", json={"prompt": "a cat"}, headers=wait(15))
        else:
            here = http.post("/generate", json={"prompt": "a cat"}).headers["location"]
            answer = http.get(here, headers=wait(15))
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=15"
    assert answer.json()["status"] == "succeeded"
    assert answer.elapsed.total_seconds() < 10


def test_a_hundred_wait_on_one_connection(http: httpx.Client, connection: Redis) -> None:
    count = 100
    pool = httpx.Client(base_url=http.base_url, limits=httpx.Limits(), timeout=60)
    with pool, ThreadPoolExecutor(count) as waiting:
        answers = [
            waiting.submit(pool.post, "/generate", json={"prompt": "a cat"}, headers=wait(50))
            for _ in range(count)
        ]
        while connection.llen("rq:queue:tiny:open:normal") < count:
            time.sleep(0.02)
        work(connection, result)
        assert {answer.result().status_code for answer in answers} == {200}


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_wait_that_is_too_short_ends_in_202(http: httpx.Client, seconds: int) -> None:
    answer = http.post("/generate", json={"prompt": "a cat"}, headers=wait(seconds))
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == f"wait={seconds}"
    assert answer.elapsed.total_seconds() >= seconds


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (["wait=10"], 10),
        (["respond-async, Wait = 10; foo=bar"], 10),
        (["respond-async", 'wait="7"'], 7),
        (["wait=5, wait=9"], 5),
        (["wait=" + "9" * 5000], 300),
        (["wait=0"], 0),
        (["wait=-1"], None),
        (["wait=soon"], None),
        (["wait"], None),
        (["wait=1.5", "=;,,\x00"], None),
        ([], None),
    ],
)
def test_what_cannot_be_read_of_a_preference_is_ignored(
    prefer: list[str], seconds: int | None
) -> None:
    assert preferred_wait(prefer) == seconds


def test_a_queued_generation_is_cancelled_and_whoever_waits_is_told(
    http: httpx.Client, connection: Redis
) -> None:
    queued = http.post("/generate", json={"prompt": "a cat"}).json()
    with in_the_background(lambda: http.post(queued["links"]["cancel"]), after_s=0.3):
        waited = http.get(queued["links"]["self"], headers=wait(15))
    assert waited.json()["status"] == "cancelled"
    assert waited.elapsed.total_seconds() < 10
    ran: list[object] = []
    work(connection, lambda version, request: ran.append(request))
    assert not ran


def test_cancelling_what_has_ended_changes_nothing(http: httpx.Client, connection: Redis) -> None:
    queued = http.post("/generate", json={"prompt": "a cat"}).json()
    work(connection, result)
    assert http.post(queued["links"]["cancel"]).raise_for_status().json()["status"] == "succeeded"


def test_an_image_that_is_not_there_says_why(http: httpx.Client, connection: Redis) -> None:
    image = http.post("/generate", json={"prompt": "a cat"}).json()["links"]["self"] + "/images/0"
    assert_says(http.get(image), 409, "not-finished", "is queued")

    def block(version: int, request: dict[str, Any]) -> dict[str, Any]:
        done = result(version, request)
        blocked = Blocked(category="nudity", check="q16", score=0.9, threshold=0.5, policy="p")
        done["images"][0] |= {"blocked": blocked.model_dump(), "url": None, "sha256": None}
        return done

    work(connection, block)
    assert_says(http.get(image), 404, "image-blocked", "q16 flagged nudity")
    assert_says(http.get(image + "/heatmap"), 404, "image-blocked", "q16 flagged nudity")
    assert_says(http.get(image[:-1] + "1"), 404, "not-found", "the indices are 0 to 0")


def test_an_image_that_the_store_has_lost_is_not_found(
    http: httpx.Client, connection: Redis
) -> None:
    queued = http.post("/generate", json={"prompt": "a cat"}).json()
    work(connection, result)
    image = queued["links"]["self"] + "/images/0"
    assert_says(http.get(image), 404, "not-found", "expired")
    assert_says(http.get(image + "/heatmap"), 404, "not-found", "telemetry was 'summary'")


def test_a_heat_map_is_served_when_it_was_made(
    http: httpx.Client, connection: Redis, store: Path
) -> None:
    def warm(version: int, request: dict[str, Any]) -> dict[str, Any]:
        done = result(version, request)
        url = done["images"][0]["url"] + "/heatmap"
        done["images"][0]["safety"]["heatmap_url"] = url
        Store(f"file://{store}").put(
            image_key(url.split("/")[2], 0, SHA256, "heatmap.png"), b"heat"
        )
        return done

    queued = http.post("/generate", json={"prompt": "a cat"}).json()
    work(connection, warm)
    image = http.get(queued["links"]["self"]).json()["images"][0]
    assert http.get(image["safety"]["heatmap_url"]).raise_for_status().content == b"heat"


def wait(seconds: int) -> dict[str, str]:
    return {"Prefer": f"wait={seconds}"}


def assert_says(response: httpx.Response, status: int, slug: str, words: str) -> None:
    assert response.status_code == status
    assert response.json()["type"] == f"/problems/{slug}"
    assert words in response.json()["detail"]


@contextmanager
def in_the_background(do: Any, after_s: float = 0) -> Iterator[None]:
    timer = threading.Timer(after_s, do)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def work_on_the_next(connection: Redis) -> None:
    while not connection.llen("rq:queue:tiny:open:normal"):
        time.sleep(0.02)
    time.sleep(0.2)  # for the request to be waiting when its event comes
    work(connection, result)
