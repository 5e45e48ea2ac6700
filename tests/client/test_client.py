"""What both clients do, against a service that is a plain function: each test runs with each."""

import asyncio
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from safelatent import AsyncClient, Client, Finished, GenerationRequest, Snapshot, Step, errors
from safelatent.client import asynchronous, synchronous

ID = "0b1c"
BASE = "http://service/prefix"
HEARTBEAT_S = 15
"""How often the service says something on a stream where nothing happens."""


def generation(status: str, **more: Any) -> dict[str, Any]:
    return {
        "id": ID,
        "status": status,
        "created_at": datetime.now(UTC).isoformat(),
        "request": {"prompt": "a cat"},
        **more,
    }


def image(**more: Any) -> dict[str, Any]:
    url = f"/generations/{ID}/images/0"
    shape = {"index": 0, "seed": 7, "width": 8, "height": 8, "safety": {"applied": True}}
    return {**shape, "url": url, **more}


class Service:
    """Gives these answers in turn; remembers what it was asked, and how long nobody asked."""

    def __init__(self, *answers: Any):
        self.left, self.asked, self.pauses = list(answers), list[httpx.Request](), list[float]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.left.pop(0)
        if callable(answer):  # one for each test: an answer is read only once
            answer = answer()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def paths(self) -> list[str]:
        return [request.url.path.removeprefix("/prefix") for request in self.asked]

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    async def async_pause(self, seconds: float) -> None:
        self.pauses.append(seconds)


@pytest.fixture
def talking_to(either: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A client whose service gives these answers, and the service."""

    def start(*answers: Any, **options: Any) -> tuple[Any, Service]:
        service = Service(*answers)
        monkeypatch.setattr(synchronous, "sleep", service.pause)
        monkeypatch.setattr(asynchronous, "async_sleep", service.async_pause)
        http = httpx.Client if either.kind is Client else httpx.AsyncClient
        own = http(transport=httpx.MockTransport(service))
        return either(BASE, http_client=own, **options), service

    return start


def says(body: Any, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers=headers)


def away(retry_after: str | None = None, status: int = 503) -> httpx.Response:
    headers = {"Retry-After": retry_after} if retry_after else {}
    return says(errors.QueueUnavailable("no Redis").problem.model_dump(), status, **headers)


def told(*events: tuple[str, Any, str]) -> httpx.Response:
    frames = [
        f"event: {event}\ndata: {json.dumps(data)}\nid: {id}\n\n" for event, data, id in events
    ]
    return httpx.Response(
        200, text="".join(frames), headers={"Content-Type": "text/event-stream; charset=utf-8"}
    )


def test_generate_submits_waits_and_saves(talking_to: Any, tmp_path: Path) -> None:
    client, service = talking_to(
        says(generation("queued"), 202),
        says(generation("running")),
        says(generation("succeeded", images=[image()])),
        httpx.Response(200, content=b"pixels"),
    )
    done = client.generate("a cat", steps=20, safety="strong")
    picture = done.images[0]
    assert picture.save(tmp_path / "cat.png").read_bytes() == b"pixels"
    assert picture.bytes() == b"pixels"  # not asked for again
    assert json.loads(service.asked[0].content) == {
        "prompt": "a cat",
        "steps": 20,
        "safety": {"level": "strong"},
    }
    assert service.asked[1].headers["Prefer"] == "wait=30"
    here = f"/generations/{ID}"
    assert service.paths() == ["/generate", here, here, f"{here}/images/0"]


def test_a_request_can_be_given_whole_and_changed(talking_to: Any) -> None:
    client, service = talking_to(says(generation("queued"), 202))
    client.submit(GenerationRequest(prompt="a cat", steps=20), seed=7)
    assert json.loads(service.asked[0].content) == {"prompt": "a cat", "steps": 20, "seed": 7}


def test_a_generation_waits_in_place(talking_to: Any) -> None:
    client, _ = talking_to(says(generation("queued"), 202), says(generation("succeeded")))
    submitted = client.submit("a cat")
    assert submitted.status == "queued"
    submitted.wait()
    assert submitted.status == "succeeded"


def test_a_failed_generation_is_an_exception_that_says_all(talking_to: Any) -> None:
    problem = errors.OutOfMemory("2048 x 2048 needs 30 GB").problem
    failed = generation("failed", error=problem.model_dump())
    client, _ = talking_to(says(generation("queued"), 202), says(failed))
    with pytest.raises(errors.GenerationFailed) as caught:
        client.generate("a cat")
    for words in (ID, problem.title, problem.detail):
        assert words in str(caught.value)
    assert caught.value.problem.type == "/problems/out-of-memory"
    assert isinstance(caught.value.__cause__, errors.OutOfMemory)
    assert caught.value.generation is not None and caught.value.generation.id == ID


def test_a_cancelled_generation_is_an_exception(talking_to: Any) -> None:
    client, _ = talking_to(says(generation("queued"), 202), says(generation("cancelled")))
    with pytest.raises(errors.GenerationCancelled, match=ID):
        client.generate("a cat")


def test_a_blocked_image_says_what_blocked_it(talking_to: Any) -> None:
    blocked = {"category": "nudity", "check": "q16", "score": 0.9, "threshold": 0.5, "policy": "p"}
    done = generation("succeeded", images=[image(url=None, blocked=blocked)])
    client, _ = talking_to(says(done))
    with pytest.raises(errors.ImageBlocked, match="q16 flagged nudity: 0.9 > 0.5"):
        client.get(ID).images[0].bytes()


def test_a_problem_is_its_class_with_the_id_of_its_request(talking_to: Any) -> None:
    problem = errors.SafetyCannotAct("guidance_scale is 1").problem.model_dump()
    client, _ = talking_to(says(problem, 422, **{"X-Request-ID": "r-42"}))
    with pytest.raises(errors.SafetyCannotAct, match=r"guidance_scale is 1 \(request r-42\)"):
        client.submit("a cat", guidance_scale=1)


@pytest.mark.parametrize(
    ("answer", "cls", "words"),
    [
        (
            lambda: httpx.Response(502, text="<html>Bad Gateway"),
            errors.ServiceError,
            "502: <html>Bad",
        ),
        (lambda: httpx.Response(403, text="no"), errors.RequestError, "403: no"),
        (lambda: says({"hello": "world"}), errors.ServiceError, "no safelatent service"),
        (httpx.ConnectError("refused"), errors.NoAnswer, f"{BASE} does not answer: refused"),
        (httpx.ReadTimeout(""), errors.NoAnswer, f"{BASE} does not answer: ReadTimeout"),
    ],
)
def test_what_is_no_answer_of_the_service(
    talking_to: Any, answer: Any, cls: type[Exception], words: str
) -> None:
    client, _ = talking_to(answer, max_retries=0)
    with pytest.raises(cls, match=words) as caught:
        client.get(ID)
    assert type(caught.value) is cls


def test_what_may_pass_is_tried_again_under_one_idempotency_key(talking_to: Any) -> None:
    client, service = talking_to(
        httpx.ConnectError("refused"),
        httpx.ReadError("broke"),
        away(retry_after="4"),
        says(generation("queued"), 202),
    )
    client.submit("a cat")
    keys = {request.headers["Idempotency-Key"] for request in service.asked}
    assert len(service.asked) == 4 and len(keys) == 1
    assert 0.25 <= service.pauses[0] <= 0.5 <= service.pauses[1] <= 1
    assert service.pauses[2] == 4


def test_each_submission_has_a_key_of_its_own_or_the_callers(talking_to: Any) -> None:
    client, service = talking_to(*[says(generation("queued"), 202) for _ in range(3)])
    client.submit("a cat")
    client.submit("a cat")
    client.submit("a cat", idempotency_key="mine")
    one, other, mine = (request.headers["Idempotency-Key"] for request in service.asked)
    assert one != other and mine == "mine"


@pytest.mark.parametrize(
    "answer",
    [
        lambda: says(errors.NotFound("there is none").problem.model_dump(), 404),
        lambda: says(errors.NotFinished("still being cancelled").problem.model_dump(), 409),
        lambda: httpx.Response(500, text="defect"),
        httpx.UnsupportedProtocol("ftp"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(talking_to: Any, answer: Any) -> None:
    client, service = talking_to(answer)
    with pytest.raises(errors.SafelatentError):
        client.get(ID)
    assert len(service.asked) == 1


def test_tries_end(talking_to: Any) -> None:
    client, service = talking_to(*[away() for _ in range(9)], max_retries=2)
    with pytest.raises(errors.QueueUnavailable):
        client.get(ID)
    assert len(service.asked) == 3


def test_a_pause_beyond_the_deadline_is_not_made(talking_to: Any) -> None:
    client, service = talking_to(away(retry_after="31"), timeout=30)
    with pytest.raises(errors.QueueUnavailable) as caught:
        client.get(ID)
    assert (service.pauses, caught.value.retry_after_s) == ([], 31)


def test_a_deletion_that_had_happened_is_one(talking_to: Any) -> None:
    gone = errors.NotFound("there is none").problem.model_dump()
    client, _ = talking_to(httpx.ReadError("broke"), says(gone, 404), says(gone, 404))
    client.delete(ID)
    with pytest.raises(errors.NotFound):
        client.delete(ID)


def test_a_wait_goes_on_while_the_service_is_away(talking_to: Any) -> None:
    client, service = talking_to(
        *[httpx.ConnectError("refused") for _ in range(10)],
        away(retry_after="2"),
        says(generation("succeeded")),
    )
    assert client.wait(ID).status == "succeeded"
    assert len(service.asked) == 12


def test_a_wait_ends_when_the_service_stays_away(talking_to: Any) -> None:
    client, _ = talking_to(away(retry_after="3600"))
    with pytest.raises(errors.QueueUnavailable) as caught:
        client.wait(ID)
    assert ID in caught.value.__notes__[0]


def test_a_wait_that_ran_out_of_time_leaves_the_generation(talking_to: Any) -> None:
    client, service = talking_to(says(generation("queued"), 202), says(generation("running")))
    with pytest.raises(errors.StillRunning, match="is running, and goes on") as caught:
        client.generate("a cat", timeout=0)
    assert caught.value.generation is not None and caught.value.generation.id == ID
    assert len(service.asked) == 2


def test_listening_and_waiting_share_one_timeout(either: Any, running_service: Any) -> None:
    address, _ = running_service  # nobody works there, so its stream is silent
    asked = list[httpx.Request]()

    def note(request: httpx.Request) -> None:
        asked.append(request)

    async def async_note(request: httpx.Request) -> None:
        asked.append(request)

    http = httpx.Client if either.kind is Client else httpx.AsyncClient
    hook = note if either.kind is Client else async_note
    client = either(address, http_client=http(event_hooks={"request": [hook]}, trust_env=False))
    began = time.monotonic()
    with pytest.raises(errors.StillRunning):
        client.generate("a cat", on_event=print, timeout=1)
    assert time.monotonic() - began < HEARTBEAT_S  # no word of the service ended it
    assert [request.url.path.rpartition("/")[2] for request in asked[:2]] == ["generate", "events"]
    assert "Prefer" not in asked[-1].headers  # the line is not held once more


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, asyncio.CancelledError, ZeroDivisionError])
def test_who_leaves_generate_cancels(talking_to: Any, leaving: type[BaseException]) -> None:
    client, service = talking_to(
        says(generation("queued"), 202), leaving(), says(generation("cancelled"))
    )
    with pytest.raises(BaseException) as caught:
        client.generate("a cat")
    assert "ancel" in caught.typename or caught.type is leaving
    assert service.paths()[-1] == f"/generations/{ID}/cancel"


def test_events_are_typed_and_a_broken_line_is_taken_up_again(talking_to: Any) -> None:
    client, service = talking_to(
        told(("snapshot", generation("running"), "1-0"), ("step", {"step": 1, "steps": 9}, "2-0")),
        httpx.ReadError("broke"),
        told(
            ("horoscope", {"fair": True}, "2-1"),
            ("queued", {"position": 3, "eta_s": 4.5}, "2-2.3"),
            ("started", {"started_at": "2026-01-01T00:00:00Z"}, "2-3"),
            ("image", image(), "2-4"),
            ("step", {"step": 5, "steps": 9}, "3-0"),
            ("finished", generation("succeeded"), "4-9"),
        ),
        httpx.Response(200, content=b"pixels"),
    )
    heard = list(client.events(ID))
    queued, started, stored, step = heard[2:6]
    assert [type(event) for event in heard[:2]] == [Snapshot, Step]
    assert (queued.position, queued.eta_s, started.started_at.year) == (3, 4.5, 2026)
    assert stored.image.bytes() == b"pixels" if isinstance(client, Client) else stored.image
    assert (step.step, step.steps, step.id) == (5, 9, "3-0")
    assert heard[-1].generation.status == "succeeded"
    seen = [request.headers.get("Last-Event-ID") for request in service.asked[:3]]
    assert seen == [None, "2-0", "2-0"]


def test_who_has_seen_the_end_hears_nothing(talking_to: Any) -> None:
    client, _ = talking_to(httpx.Response(204))
    assert list(client.events(ID, last_event_id="4-9")) == []


def test_events_of_what_is_gone_or_no_service(talking_to: Any) -> None:
    gone = errors.NotFound("there is none").problem.model_dump()
    client, _ = talking_to(says(gone, 404), httpx.Response(200, text="<html>"))
    with pytest.raises(errors.NotFound):
        list(client.events(ID))
    with pytest.raises(errors.ServiceError, match="no stream"):
        list(client.events(ID))


def test_generate_tells_its_events(talking_to: Any) -> None:
    heard: list[Any] = []
    client, _ = talking_to(
        says(generation("queued"), 202),
        told(
            ("snapshot", generation("running"), "1-0"), ("finished", generation("succeeded"), "2-9")
        ),
        says(generation("succeeded")),
    )
    assert client.generate("a cat", on_event=heard.append).status == "succeeded"
    assert [type(event) for event in heard] == [Snapshot, Finished]


def test_a_list_goes_through_its_pages(talking_to: Any) -> None:
    client, service = talking_to(
        says({"data": [generation("succeeded"), generation("failed")], "next": "c1"}),
        says({"data": [], "next": "c2"}),
        says({"data": [generation("queued")], "next": None}),
    )
    since = datetime(2026, 1, 1, tzinfo=UTC)
    found = client.list(status="failed", created_after=since, metadata={"user": "7", "paid": True})
    assert [each.status for each in found] == ["succeeded", "failed", "queued"]
    assert dict(service.asked[0].url.params) == {
        "status": "failed",
        "created_after": "2026-01-01T00:00:00+00:00",
        "metadata.user": "7",
        "metadata.paid": "true",
    }
    assert [request.url.params.get("cursor") for request in service.asked] == [None, "c1", "c2"]


def test_the_key_is_sent_to_the_service_and_to_nobody_else(talking_to: Any) -> None:
    elsewhere = image(url="https://bucket.example/0.png?signature=x")
    client, service = talking_to(
        says(generation("succeeded", images=[elsewhere])),
        httpx.Response(200, content=b"pixels"),
        api_key="slk_secret",
    )
    assert client.get(ID).images[0].bytes() == b"pixels"
    assert service.asked[0].headers["Authorization"] == "Bearer slk_secret"
    assert service.asked[1].url.host == "bucket.example"
    assert "Authorization" not in service.asked[1].headers


def test_fields_of_a_newer_service_are_ignored(talking_to: Any) -> None:
    newer = generation("succeeded", horoscope="fair")
    newer["request"]["mood"] = "cheerful"
    client, _ = talking_to(says(newer))
    assert client.get(ID).request.prompt == "a cat"


@pytest.mark.parametrize("cls", [Client, AsyncClient])
def test_the_address_comes_from_the_argument_then_the_environment(
    cls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFELATENT_URL", "http://elsewhere:1")
    assert (cls().base_url, cls("http://there:2").base_url) == (
        "http://elsewhere:1",
        "http://there:2",
    )
    monkeypatch.delenv("SAFELATENT_URL")
    assert cls().base_url == "http://127.0.0.1:8000"
