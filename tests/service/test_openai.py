"""The real `openai` package against the service, and the key that it sends."""

import asyncio
import base64
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from redis import Redis
from rq import get_current_job

from safelatent.queues import queues
from safelatent.schema import Blocked, Check, Image, ImageSafety
from safelatent.store import Store, image_key
from service import policy
from service.app import create_app
from service.settings import Settings
from tests.service.played import CARD, SHA256, result, serving, work

CHECK = Check(
    check="sd_checker",
    version="1",
    flagged=True,
    scores={"self-harm": 0.1, "sexual": 0.4, "shocking": 0.4},
    thresholds={"self-harm": 0.2, "sexual": 0.2, "shocking": 0.2},
)
WITHHELD = Blocked(
    category="sexual", check="sd_checker", score=0.4, threshold=0.2, policy="checks=block"
)


@pytest.fixture
def client(http: httpx.Client, url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@contextmanager
def working(connection: Redis, generate: Callable[..., Any]) -> Iterator[None]:
    """Somebody who does one generation, as soon as it is queued."""

    def wait_and_work() -> None:
        deadline = time.monotonic() + 10
        while not any(queue.job_ids for queue in queues("tiny", connection)):
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        work(connection, generate)

    thread = threading.Thread(target=wait_and_work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def drawn(store: Path, version: int, request: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A success whose image i has the bytes `pixels i`."""
    id = get_current_job().id  # type: ignore[union-attr]
    for index in range(request["n"]):
        name = image_key(id, index, SHA256, request["image_format"])
        Store(f"file://{store}").put(name, f"pixels {index}".encode())
    return result(version, request, **changed)


def image(index: int, blocked: Blocked | None) -> Image:
    return Image(
        index=index,
        seed=index,
        width=64,
        height=32,
        sha256=None if blocked else SHA256,
        blocked=blocked,
        safety=ImageSafety(applied=True, checks=[CHECK]),
    )


def test_images_come_as_base64(client: OpenAI, connection: Redis, store: Path) -> None:
    with working(connection, partial(drawn, store)):
        answer = client.images.generate(
            prompt="a cat",
            n=2,
            size="64x40",
            quality="high",
            output_format="webp",
            user="u1",
            extra_body={"safelatent": {"seed": 7, "safety": {"telemetry": "steps"}}},
        )
    assert answer.data is not None
    pixels = [base64.b64decode(each.b64_json or "") for each in answer.data]
    assert pixels == [b"pixels 0", b"pixels 1"]
    assert (answer.output_format, answer.quality, answer.size) == ("webp", "high", "64x32")
    assert answer.created > 1_700_000_000
    report: Any = answer.safelatent  # type: ignore[attr-defined]
    asked = report["request"]
    assert (asked["seed"], asked["height"], asked["steps"]) == (7, 40, 75)
    assert asked["metadata"] == {"user": "u1"}
    assert (asked["safety"]["level"], asked["safety"]["telemetry"]) == ("medium", "steps")
    assert [each["seed"] for each in report["images"]] == [7, 8]
    unchecked = {"filtered": False, "severity": None, "checked": False}
    assert answer.data[0].content_filter_results["hate"] == unchecked  # type: ignore[attr-defined]


def test_an_image_comes_as_url(client: OpenAI, connection: Redis, store: Path) -> None:
    with working(connection, partial(drawn, store)):
        answer = client.images.generate(prompt="a cat", model="tiny", response_format="url")
    assert answer.data is not None and answer.data[0].url is not None
    assert answer.data[0].b64_json is None
    assert httpx.get(answer.data[0].url).content == b"pixels 0"


def test_a_stream_has_an_event_for_every_image(
    client: OpenAI, connection: Redis, store: Path
) -> None:
    with working(connection, partial(drawn, store)):
        stream = client.images.generate(prompt="a cat", n=2, stream=True, partial_images=2)
        events = list(stream)
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert [base64.b64decode(e.b64_json) for e in events] == [b"pixels 0", b"pixels 1"]
    reports: list[Any] = [event.safelatent for event in events]  # type: ignore[union-attr]
    assert [[each["index"] for each in report["images"]] for report in reports] == [[0], [1]]


def test_the_async_client(http: httpx.Client, url: str, connection: Redis, store: Path) -> None:
    async def generate() -> Any:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
            return await client.images.generate(prompt="a cat", moderation="low")

    with working(connection, partial(drawn, store)):
        answer = asyncio.run(generate())
    assert base64.b64decode(answer.data[0].b64_json) == b"pixels 0"
    assert answer.safelatent["request"]["safety"]["level"] == "weak"


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "safelatent"
    with pytest.raises(openai.NotFoundError, match="no model 'large'"):
        client.models.retrieve("large")


def test_blocked_images_are_an_error_that_says_why(client: OpenAI, connection: Redis) -> None:
    blocked = partial(result, images=[image(0, WITHHELD)])
    with working(connection, blocked), pytest.raises(openai.BadRequestError) as raised:
        client.images.generate(prompt="a cat")
    error = raised.value
    assert (error.code, error.type) == ("moderation_blocked", "image_generation_user_error")
    assert error.param is None
    assert "sd_checker flagged sexual" in error.message


def test_of_some_blocked_images_the_others_come(
    client: OpenAI, connection: Redis, store: Path
) -> None:
    half = partial(drawn, store, images=[image(0, WITHHELD), image(1, None)])
    with working(connection, half):
        answer = client.images.generate(prompt="a cat", n=2)
    assert answer.data is not None
    [delivered] = answer.data
    assert base64.b64decode(delivered.b64_json or "") == b"pixels 1"
    seen: Any = delivered.content_filter_results  # type: ignore[attr-defined]
    severities = {name: (each["severity"], each["checked"]) for name, each in seen.items()}
    assert severities == {
        "hate": (None, False),
        "self_harm": ("safe", True),
        "sexual": ("medium", True),
        "violence": (None, False),
        "shocking": ("medium", True),
    }
    images: Any = answer.safelatent["images"]  # type: ignore[attr-defined]
    assert [each["blocked"] and each["blocked"]["category"] for each in images] == ["sexual", None]


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "4096x64"}, "size", "2048"),
        ({"size": "60x64"}, "size", "multiple of 8"),
        ({"n": 9}, "n", "8"),
        ({"prompt": " "}, "prompt", "say what to draw"),
        ({"model": "gpt-image-2"}, "model", "tiny"),
        ({"background": "transparent"}, "background", "'opaque'"),
        ({"style": "vivid"}, "style", "not supported"),
        ({"moderation": "off"}, "moderation", "'low'"),
        ({"extra_body": {"safelatent": {r"\1": 0}}}, r"safelatent.\1", "no such field"),
        ({"extra_body": {"safelatent": {"steps": 0}}}, "safelatent.steps", "greater than"),
        (
            {"extra_body": {"safelatent": {"safety": {"levle": "max"}}}},
            "safelatent.safety.levle",
            "",
        ),
    ],
)
def test_a_wrong_parameter_is_named(
    client: OpenAI, asked: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.generate(**{"prompt": "a cat"} | asked)
    error = raised.value
    assert (error.param, error.code, error.type) == (
        param,
        "invalid_value",
        "invalid_request_error",
    )
    assert param in error.message and says in error.message


def test_a_failure_is_not_tried_again(client: OpenAI, connection: Redis) -> None:
    def fail(version: int, request: dict[str, Any]) -> None:
        raise RuntimeError

    with working(connection, fail), pytest.raises(openai.InternalServerError) as raised:
        client.with_options(max_retries=2).images.generate(prompt="a cat")
    assert "failed" in raised.value.message
    assert raised.value.response.headers["x-should-retry"] == "false"


def test_the_line_is_not_held_for_ever(redis_url: str, connection: Redis, tmp_path: Path) -> None:
    app = create_app(Settings(redis_url=redis_url, model="tiny", store_url=f"file://{tmp_path}"))
    app.state.parts.waiting.release()  # as at the end of its time, or of the process
    with serving(app) as url, OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        with pytest.raises(openai.InternalServerError) as raised:
            client.images.generate(prompt="a cat")
    assert (raised.value.status_code, raised.value.code) == (504, "still_running")
    [id] = [id for queue in queues("tiny", connection) for id in queue.job_ids]
    assert f"/generations/{id}" in raised.value.message


def test_a_caller_who_hangs_up_cancels(client: OpenAI, connection: Redis) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).images.generate(prompt="a cat")
    deadline = time.monotonic() + 10
    while any(queue.job_ids for queue in queues("tiny", connection)):
        assert time.monotonic() < deadline, "it is still queued"
        time.sleep(0.01)


def test_a_key_makes_it_safe_to_hang_up_and_come_back(
    client: OpenAI, connection: Redis, store: Path
) -> None:
    again = client.with_options(default_headers={"Idempotency-Key": "order-1"})
    with pytest.raises(openai.APITimeoutError):
        again.with_options(timeout=0.5).images.generate(prompt="a cat")
    [id] = [id for queue in queues("tiny", connection) for id in queue.job_ids]
    with working(connection, partial(drawn, store)):
        first = again.images.generate(prompt="a cat")
    second = again.images.generate(prompt="a cat", response_format="url")
    assert first.safelatent["id"] == second.safelatent["id"] == id  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError) as raised:
        again.images.generate(prompt="a dog")
    assert raised.value.code == "key_reused"


@pytest.fixture
def guarded(redis_url: str, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of a service with a policy, and the key of its tenant."""
    command = [sys.executable, "-m", "safelatent.cli", "key", "new", "--tenant", "acme"]
    made = subprocess.run([*command, "--expires", "2"], capture_output=True, text=True, check=True)
    file = tmp_path / "policy.toml"
    file.write_text(f'{made.stderr}floor = "strong"\nbelow_floor = "raise"\n')
    settings = Settings(
        redis_url=redis_url, model="tiny", store_url=f"file://{tmp_path}", policy_file=file
    )
    with serving(create_app(settings)) as url:
        yield f"{url}/v1", made.stdout.strip()


def test_a_new_key_authenticates_and_low_moderation_is_lifted(
    guarded: tuple[str, str], connection: Redis, tmp_path: Path
) -> None:
    url, key = guarded
    loaded, _ = policy.load(tmp_path / "policy.toml")
    assert loaded.tenant_of(f"Bearer {key}") == "acme"
    connection.hset("safelatent:models", CARD.id, CARD.model_dump_json())
    with OpenAI(base_url=url, api_key=key) as client:
        with working(connection, partial(drawn, tmp_path)):
            answer = client.images.generate(prompt="a cat", moderation="low")
    report: Any = answer.safelatent  # type: ignore[attr-defined]
    assert report["request"]["safety"]["level"] == "strong"
    assert report["policy"]["raised"] == ["safety.level"]


def test_a_wrong_key_is_an_authentication_error(guarded: tuple[str, str]) -> None:
    with OpenAI(base_url=guarded[0], api_key="slk_wrong") as client:
        with pytest.raises(openai.AuthenticationError) as raised:
            client.models.list()
    assert raised.value.code == "invalid_api_key"


@pytest.mark.parametrize("wrong", [["--tenant", "Acme Inc"], ["--expires", "0"]])
def test_no_key_that_the_policy_would_refuse(wrong: list[str]) -> None:
    command = [sys.executable, "-m", "safelatent.cli", "key", "new", *wrong]
    made = subprocess.run(command, capture_output=True, text=True)
    assert (made.returncode, made.stdout) == (2, "")
    assert wrong[1] in made.stderr
