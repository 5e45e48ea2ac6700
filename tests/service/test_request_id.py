"""Every answer and every line of the log has the id of its request."""

import re

import httpx
import pytest

from service.app import create_app
from service.settings import Settings
from tests.conftest import Log
from tests.service.played import serving


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/nothing", 404),
        ("POST", "/generate", 415),
        ("DELETE", "/generate", 405),
        ("GET", "/generations/unknown/events", 404),
        ("GET", "/v1/models/unknown", 404),
    ],
)
def test_an_id_that_was_sent_comes_back(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = http.request(method, path, headers={"X-Request-ID": "mine-1"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine-1")


@pytest.mark.parametrize("sent", [None, "", "x" * 101, "two words", "\u00e9".encode("latin-1")])
def test_otherwise_one_is_made(http: httpx.Client, sent: str | bytes | None) -> None:
    answer = http.get("/healthz", headers={} if sent is None else {"X-Request-ID": sent})
    assert re.fullmatch("[0-9a-f-]{36}", answer.headers["x-request-id"])


def test_a_defect_and_a_body_that_is_too_large_have_it_too(redis_url: str) -> None:
    app = create_app(Settings(redis_url=redis_url, model="tiny", store_url="memory:///"))

    @app.get("/defect")
    def defect() -> None:
        raise RuntimeError("secret")

    with serving(app) as url, httpx.Client(base_url=url, headers={"X-Request-ID": "m"}) as http:
        for answer in (
            http.get("/defect"),
            http.post("/generate", content=b" " * (1024 * 1024 + 1)),
        ):
            assert answer.status_code in (500, 413)
            assert answer.headers["x-request-id"] == "m"
            assert answer.headers["content-type"] == "application/problem+json"


def test_the_log_has_a_line_with_it_and_without_what_is_private(
    http: httpx.Client, log: Log
) -> None:
    """The line comes before the answer has ended, so nobody has to wait for it."""
    headers = {"X-Request-ID": "mine-2", "Idempotency-Key": "canary-1"}
    answer = http.post("/generate?canary=3", json={"prompt": "canary-2"}, headers=headers)
    http.get(answer.headers["location"])
    http.get("/canary-4")
    http.get("/healthz")
    lines = log.lines("service.http")
    assert [(each["method"], each["route"], each["status"]) for each in lines] == [
        ("POST", "/generate", 202),
        ("GET", "/generations/{id}", 200),
        ("GET", "unmatched", 404),
    ]
    first, _, unknown = lines
    assert (first["request_id"], first["tenant"]) == ("mine-2", "open")
    assert first["generation_id"] == answer.json()["id"]
    assert 0 < first["duration_s"] < 20
    assert unknown["problem"] == "not-found"
    assert "canary" not in log.text
