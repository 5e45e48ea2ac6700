"""The events of a generation: every listener gets each once, in order, also through a reconnect."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from redis import Redis

from safelatent import events
from safelatent.schema import Progress
from service import watching
from tests.service.played import result, work

STREAM = {"Accept": "text/event-stream"}


def read(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(event, data, id) of each event."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if not line and fields:
            yield fields["event"], json.loads(fields["data"]), fields["id"]
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
            waiting._deliver(f"1-{step}", {"id": Progress(step=step, steps=1000)}, [])
        assert mailbox.step == ("1-999", Progress(step=999, steps=1000))


def test_silence_is_kept_alive_and_a_lost_end_is_found(
    http: httpx.Client, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "KEEP_ALIVE_S", 0.2)
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
    deadline = time.monotonic() + 5
    if "wait" not in headers.get("Prefer", "") or status == "cancelled":
        while mailboxes and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not mailboxes, "a client that is gone leaves nothing behind"
        time.sleep(0.3)
    assert http.get(f"/generations/{id}").json()["status"] == status
    http.post(f"/generations/{id}/cancel")
