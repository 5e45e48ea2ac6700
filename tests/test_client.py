"""The client's own logic, against a service that is a plain function."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from safelatent import Client, GenerationRequest, client, errors

ID = "0b1c"


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


def talking_to(*answers: httpx.Response | BaseException) -> tuple[Client, list[httpx.Request]]:
    """A client whose service gives these answers in turn, and what it was asked."""
    left, asked = list(answers), list[httpx.Request]()

    def service(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        answer = left.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    http = httpx.Client(transport=httpx.MockTransport(service))
    return Client("http://service/prefix", http=http), asked


def says(body: Any, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers=headers)


def test_generate_submits_waits_and_saves(tmp_path: Path) -> None:
    client, asked = talking_to(
        says(generation("queued"), 202),
        says(generation("running")),
        says(generation("succeeded", images=[image()])),
        httpx.Response(200, content=b"pixels"),
    )
    with client:
        done = client.generate("a cat", steps=20, safety={"level": "strong"})
        saved = done.images[0].save(tmp_path / "cat.png")
    assert saved.read_bytes() == b"pixels"
    assert json.loads(asked[0].content) == {
        "prompt": "a cat",
        "steps": 20,
        "safety": {"level": "strong"},
    }
    assert asked[1].headers["Prefer"] == "wait=30"
    assert [str(request.url) for request in asked] == [
        "http://service/prefix/generate",
        f"http://service/prefix/generations/{ID}",
        f"http://service/prefix/generations/{ID}",
        f"http://service/prefix/generations/{ID}/images/0",
    ]


def test_a_request_can_be_given_whole_and_changed() -> None:
    client, asked = talking_to(says(generation("queued"), 202))
    client.submit(GenerationRequest(prompt="a cat", steps=20), seed=7)
    assert json.loads(asked[0].content) == {"prompt": "a cat", "steps": 20, "seed": 7}


def test_a_failed_generation_is_an_exception_that_says_all() -> None:
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


def test_a_cancelled_generation_is_an_exception() -> None:
    client, _ = talking_to(says(generation("queued"), 202), says(generation("cancelled")))
    with pytest.raises(errors.GenerationCancelled, match=ID):
        client.generate("a cat")


def test_a_blocked_image_says_what_blocked_it() -> None:
    blocked = {"category": "nudity", "check": "q16", "score": 0.9, "threshold": 0.5, "policy": "p"}
    done = generation("succeeded", images=[image(url=None, blocked=blocked)])
    client, _ = talking_to(says(done))
    with pytest.raises(errors.ImageBlocked, match="q16 flagged nudity"):
        client.get(ID).images[0].bytes()


def test_a_problem_is_raised_as_its_class() -> None:
    problem = errors.SafetyCannotAct("guidance_scale is 1").problem.model_dump()
    client, _ = talking_to(says(problem, 422))
    with pytest.raises(errors.SafetyCannotAct, match="guidance_scale is 1"):
        client.submit("a cat", guidance_scale=1)


@pytest.mark.parametrize(
    ("answer", "cls", "words"),
    [
        (httpx.Response(502, text="<html>Bad Gateway"), errors.ServiceError, "502: <html>Bad"),
        (httpx.Response(403, text="no"), errors.RequestError, "403: no"),
        (says({"hello": "world"}), errors.ServiceError, "no safelatent service"),
        (httpx.ConnectError("refused"), errors.NoAnswer, "http://service/prefix does not answer"),
        (httpx.ReadTimeout("slow"), errors.NoAnswer, "http://service/prefix does not answer"),
    ],
)
def test_what_is_no_answer_of_the_service(
    answer: httpx.Response | BaseException, cls: type[Exception], words: str
) -> None:
    client, _ = talking_to(answer)
    with pytest.raises(cls, match=words) as caught:
        client.get(ID)
    assert type(caught.value) is cls


def test_a_wait_goes_on_while_the_service_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(client.time, "sleep", slept.append)
    away = errors.QueueUnavailable("Redis does not answer").problem.model_dump()
    patient, _ = talking_to(
        httpx.ConnectError("refused"),
        says(away, 503, **{"Retry-After": "2"}),
        says(generation("succeeded")),
    )
    assert patient.wait(ID).status == "succeeded"
    assert slept == [1, 2]


def test_a_wait_ends_when_the_service_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE_S", -1)
    impatient, _ = talking_to(httpx.ConnectError("refused"))
    with pytest.raises(errors.NoAnswer) as caught:
        impatient.wait(ID)
    assert ID in caught.value.__notes__[0]


def test_ctrl_c_cancels_the_generation() -> None:
    interrupted, asked = talking_to(
        says(generation("queued"), 202), KeyboardInterrupt(), says(generation("cancelled"))
    )
    with pytest.raises(KeyboardInterrupt):
        interrupted.generate("a cat")
    assert asked[-1].url.path.endswith(f"/generations/{ID}/cancel")


def test_fields_of_a_newer_service_are_ignored() -> None:
    newer = generation("succeeded", horoscope="fair")
    newer["request"]["mood"] = "cheerful"
    client, _ = talking_to(says(newer))
    assert client.get(ID).request.prompt == "a cat"


def test_the_address_comes_from_the_argument_then_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAFELATENT_URL", "http://elsewhere:1")
    with Client() as here, Client("http://there:2") as there:
        assert (here.base_url, there.base_url) == ("http://elsewhere:1", "http://there:2")
    monkeypatch.delenv("SAFELATENT_URL")
    with Client() as default:
        assert default.base_url == "http://127.0.0.1:8000"
