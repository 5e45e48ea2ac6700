"""The events of a generation: every listener gets each once, in order, also through a reconnect."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from redis import Redis
from rq import get_current_job

from safelatent import events
from safelatent.events import News
from safelatent.schema import Image, ImageSafety, Progress
from safelatent.store import Store, image_key
from service import watching
from tests.service.played import SHA256, result, work

STREAM = {"Accept": "text/event-stream"}


def read(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(event, data, id) of each event; a snapshot has no id."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if not line and fields:
            yield fields["event"], json.loads(fields["data"]), fields.get("id", "")
            fields = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


@contextmanager
def running(http: httpx.Client, connection: Redis) -> Iterator[tuple[str, Callable[[], None]]]:
    """A generation that runs, and what lets it finish."""
    started, finish = threading.Event(), threading.Event()

    def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
        started.set()
        assert finish.wait(20)
        return result(version, request)

    id = http.post("/generate", json={"prompt": "a cat"}).json()["id"]
    thread = threading.Thread(target=work, args=(connection, generate))
    thread.start()
    assert started.wait(20)
    try:
        yield id, finish.set
    finally:
        finish.set()
        thread.join()


def publish(connection: Redis, id: str, step: int) -> None:
    events.publish_steps(connection, {id: Progress(step=step, steps=50), "other": PROGRESS})


PROGRESS = Progress(step=9, steps=9)
IMAGES = [
    Image(
        index=i,
        seed=i,
        width=64,
        height=32,
        safety=ImageSafety(applied=True),
        url=f"/{i}",
        sha256=SHA256,
    )
    for i in range(8)
]


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_place_in_the_queue_is_told_when_it_changes(
    http: httpx.Client, app: FastAPI, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = app.state.parts.waiting
    monkeypatch.setattr(waiting, "look_at_queues_every_s", 0.05)
    publish(connection, "another", 1)
    wait_for(lambda: waiting.position == connection.xrevrange(events.STREAM)[0][0].decode())
    ids = [http.post("/generate", json={"prompt": "a cat"}).json()["id"] for _ in range(3)]
    here = f"/generations/{ids[2]}/events"
    with http.stream("GET", here) as response:
        told = read(response)
        event, generation, seen = next(told)
        assert (event, generation["position"], seen) == ("snapshot", 2, "")
        http.post(f"/generations/{ids[0]}/cancel")
        event, place, seen = next(told)
        assert (event, place["position"]) == ("queued", 1) and "eta_s" in place
    with http.stream("GET", here, headers={"Last-Event-ID": seen}) as response:
        told = read(response)
        time.sleep(0.5)  # several looks, none of which has news
        http.post(f"/generations/{ids[1]}/cancel")
        assert next(told)[:2] == ("queued", place | {"position": 0})
        http.post(f"/generations/{ids[2]}/cancel")
        assert [event for event, _, _ in told] == ["finished"]


def test_one_look_serves_all_who_watch_a_queue(
    http: httpx.Client, app: FastAPI, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = app.state.parts.waiting
    monkeypatch.setattr(waiting, "look_at_queues_every_s", 0.05)
    looks: list[int] = []
    real = waiting.jobs.places
    monkeypatch.setattr(
        waiting.jobs, "places", lambda queued: looks.append(len(queued)) or real(queued)
    )
    ids = [http.post("/generate", json={"prompt": "a cat"}).json()["id"] for _ in range(4)]
    with ExitStack() as stack:
        streams = [
            read(stack.enter_context(http.stream("GET", f"/generations/{id}/events")))
            for id in ids[1:]
        ]
        for stream in streams:
            next(stream)
        wait_for(lambda: 3 in looks)
        assert max(looks) == 3
        http.post(f"/generations/{ids[0]}/cancel")
        assert [next(stream)[1]["position"] for stream in streams] == [0, 1, 2]


def test_its_start_and_each_image_are_told_and_an_image_can_be_fetched_at_once(
    http: httpx.Client, connection: Redis, store: Path
) -> None:
    at = datetime.now(UTC)
    with running(http, connection) as (id, finish):
        with http.stream("GET", f"/generations/{id}/events") as response:
            told = read(response)
            assert next(told)[0] == "snapshot"
            events.publish_started(connection, id, at)
            event, data, _ = next(told)
            assert (event, data) == ("started", {"started_at": at.isoformat()[:-6] + "Z"})
            here = f"/generations/{id}/images/0"
            assert http.get(here).json()["type"] == "/problems/not-finished"
            Store(f"file://{store}").put(image_key(id, 0, SHA256, "png"), b"pixels")
            image = IMAGES[0].model_copy(update={"url": here, "media_type": "image/png"})
            events.publish_image(connection, id, image, 60)
            event, data, seen = next(told)
            assert (event, data["url"]) == ("image", here)
            assert http.get(here).content == b"pixels"
        # Who comes later has it in the snapshot, and gets it once.
        with http.stream("GET", f"/generations/{id}/events") as response:
            told = read(response)
            assert [image["index"] for image in next(told)[1]["images"]] == [0]
            events.publish_image(connection, id, IMAGES[1], 60)
            assert next(told)[1]["index"] == 1
        events.publish_image(connection, id, IMAGES[2], 60)
        finish()
        stream = http.get(f"/generations/{id}/events", headers={"Last-Event-ID": seen})
        assert [(e, d.get("index")) for e, d, _ in read(stream)] == [
            ("image", 1),
            ("image", 2),
            ("finished", None),
        ]


def test_what_the_snapshot_had_is_not_told_again(http: httpx.Client, connection: Redis) -> None:
    """An entry may reach the follower after the snapshot has read what it says."""
    with running(http, connection) as (id, _):
        connection.hset(events.IMAGES.format(id), "3", IMAGES[3].model_dump_json())
        connection.hset(events.PROGRESS, id, "[7, 50]")
        with http.stream("GET", f"/generations/{id}/events") as response:
            told = read(response)
            _, generation, _ = next(told)
            assert [image["index"] for image in generation["images"]] == [3]
            at = datetime.fromisoformat(generation["started_at"])
            events.publish_started(connection, id, at)
            for step in (6, 7):
                publish(connection, id, step)
            for index in (3, 4):
                data = IMAGES[index].model_dump_json()
                connection.xadd(events.STREAM, {"image": id, "data": data})
            publish(connection, id, 8)
            assert (next(told)[1]["index"], next(told)[1]["step"]) == (4, 8)


def test_the_images_of_what_is_cancelled_stay(
    http: httpx.Client, connection: Redis, store: Path
) -> None:
    def stop(version: int, request: dict[str, Any]) -> dict[str, Any]:
        id = get_current_job().id  # type: ignore[union-attr]
        Store(f"file://{store}").put(image_key(id, 0, SHA256, "png"), b"pixels")
        image = IMAGES[0].model_copy(update={"media_type": "image/png"})
        events.publish_image(connection, id, image, 60)
        raise RuntimeError

    here = http.post("/generate", json={"prompt": "a cat", "n": 2}).headers["location"]
    connection.hset(f"rq:job:{here.split('/')[2]}", "max_retries", 0)
    connection.hset(f"rq:job:{here.split('/')[2]}", "retries_left", 0)
    work(connection, stop)
    generation = http.get(here).json()
    assert (generation["status"], len(generation["images"])) == ("failed", 1)
    assert http.get(f"{here}/images/0").content == b"pixels"
    assert http.get(f"{here}/images/1").status_code == 409
    assert http.delete(here).status_code == 204
    assert http.get(f"{here}/images/0").status_code == 404
    assert not connection.exists(events.IMAGES.format(here.split("/")[2]))


def test_a_snapshot_then_the_steps_then_the_end(http: httpx.Client, connection: Redis) -> None:
    with running(http, connection) as (id, finish):
        publish(connection, id, 1)
        with http.stream("GET", f"/generations/{id}/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            told = read(response)
            event, generation, _ = next(told)
            assert (event, generation["status"]) == ("snapshot", "running")
            assert generation["progress"] == {"step": 1, "steps": 50}
            for step in (2, 3):
                publish(connection, id, step)
                assert next(told)[:2] == ("step", {"step": step, "steps": 50})
            finish()
            event, generation, _ = next(told)
            assert (event, generation["status"]) == ("finished", "succeeded")
            assert len(generation["images"]) == 1 and generation["links"]["events"]
            assert next(told, None) is None


def test_who_comes_back_misses_nothing_and_gets_nothing_twice(
    http: httpx.Client, connection: Redis
) -> None:
    with running(http, connection) as (id, finish):
        here = f"/generations/{id}/events"
        with http.stream("GET", here) as response:
            told = read(response)
            next(told)
            publish(connection, id, 1)
            _, _, seen = next(told)
        publish(connection, id, 2)
        publish(connection, id, 3)
        with http.stream("GET", here, headers={"Last-Event-ID": seen}) as response:
            event, data, seen = next(read(response))
            assert (event, data["step"]) == ("step", 3)  # the latest: that is 2 as well
        with http.stream("GET", here, headers={"Last-Event-ID": seen}) as response:
            told = read(response)
            publish(connection, id, 4)
            assert next(told)[1]["step"] == 4
            finish()
            event, _, seen = next(told)
            assert event == "finished"
    assert http.get(here, headers={"Last-Event-ID": seen}).status_code == 204


@pytest.mark.parametrize("seen", ["", "soon", "1-0", "9999999999999-0", "1-0\u00e9", "9" * 9000])
def test_a_last_event_that_says_nothing_gives_a_snapshot(
    http: httpx.Client, connection: Redis, seen: str
) -> None:
    id = http.post("/generate", json={"prompt": "a cat"}).json()["id"]
    work(connection, result)
    headers = {"Last-Event-ID": seen.encode("latin-1")}
    told = list(read(http.get(f"/generations/{id}/events", headers=headers)))
    assert [event for event, _, _ in told] == ["snapshot", "finished"]


def test_a_last_event_that_redis_would_refuse_gives_a_snapshot(
    http: httpx.Client, connection: Redis
) -> None:
    with running(http, connection) as (id, _):
        publish(connection, id, 1)
        publish(connection, id, 2)
        first = connection.xrange(events.STREAM, count=1)[0][0].decode()
        headers = {"Last-Event-ID": first.split("-")[0] + "-" + "9" * 20}
        with http.stream("GET", f"/generations/{id}/events", headers=headers) as response:
            assert next(read(response))[0] == "snapshot"


def test_a_post_can_be_answered_by_its_events(http: httpx.Client, connection: Redis) -> None:
    with http.stream("POST", "/generate", json={"prompt": "a cat"}, headers=STREAM) as response:
        told = read(response)
        event, generation, _ = next(told)
        assert (event, generation["status"]) == ("snapshot", "queued")
        assert response.headers["location"] == generation["links"]["self"]
        work(connection, result)
        assert [event for event, _, _ in told] == ["finished"]


def test_a_slow_reader_gets_the_latest(app: FastAPI) -> None:
    waiting = app.state.parts.waiting
    with waiting.mailbox("id") as mailbox:
        for step in range(1000):
            waiting._deliver(f"1-{step}", {"id": News("step", Progress(step=step, steps=1000))})
            waiting._deliver(f"2-{step}", {"id": News("image", IMAGES[step % 8])})
        told = {stream_id: one.data for stream_id, one in mailbox.take()}
        assert told.pop("1-999") == Progress(step=999, steps=1000)
        assert list(told.values()) == IMAGES and not mailbox.take()


def test_silence_is_kept_alive_and_a_lost_end_is_found(
    http: httpx.Client, app: FastAPI, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A place in the queue that is looked at more often, and found the same, breaks no silence.
    monkeypatch.setattr(watching, "KEEP_ALIVE_S", 1)
    monkeypatch.setattr(app.state.parts.waiting, "look_at_queues_every_s", 0.05)
    id = http.post("/generate", json={"prompt": "a cat"}).json()["id"]
    with http.stream("GET", f"/generations/{id}/events") as response:
        lines = response.iter_lines()
        while not next(lines).startswith(":"):
            pass
        monkeypatch.setattr(events, "publish_finished", lambda connection, id: None)
        work(connection, result)
        assert "event: finished" in list(lines)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (STREAM, "queued"),
        (STREAM | {"Prefer": "cancel-on-disconnect"}, "cancelled"),
        ({"Prefer": "wait=50"}, "queued"),
        ({"Prefer": "wait=50, cancel-on-disconnect"}, "cancelled"),
    ],
)
def test_hanging_up_cancels_only_what_asked_for_it(
    http: httpx.Client, app: FastAPI, connection: Redis, headers: dict[str, str], status: str
) -> None:
    mailboxes = app.state.parts.waiting._mailboxes
    with httpx.Client(base_url=http.base_url, timeout=1) as leaving:
        with pytest.raises(httpx.ReadTimeout):
            with leaving.stream(
                "POST", "/generate", json={"prompt": "a cat"}, headers=headers
            ) as response:
                list(response.iter_lines())
    id = connection.keys("rq:job:*")[0].decode().removeprefix("rq:job:")
    deadline = time.monotonic() + 30
    while mailboxes and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not mailboxes, "a client that is gone leaves nothing behind"
    time.sleep(0.3)
    assert http.get(f"/generations/{id}").json()["status"] == status
    http.post(f"/generations/{id}/cancel")


def test_who_waits_by_get_and_hangs_up_leaves_nothing_behind(
    http: httpx.Client, app: FastAPI
) -> None:
    here = http.post("/generate", json={"prompt": "a cat"}).headers["location"]
    with httpx.Client(base_url=http.base_url, timeout=1) as leaving:
        with pytest.raises(httpx.ReadTimeout):
            leaving.get(here, headers={"Prefer": "wait=50"})
    deadline = time.monotonic() + 30
    while (left := app.state.parts.waiting._mailboxes) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
    assert http.get(here).json()["status"] == "queued"
