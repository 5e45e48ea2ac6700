"""What happens below the routes: methods, negotiation, other origins, slow and greedy clients."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from pydantic import ValidationError
from redis import Redis

from safelatent.store import Store, image_key
from service import body, protocol
from service.__main__ import configured
from service.app import create_app
from service.settings import Settings
from tests.service.played import SHA256, result, serving, work

CAT = {"prompt": "a cat"}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/generate", "POST"),
        ("OPTIONS", "/generate", "POST"),
        ("PATCH", "/generations/unknown", "DELETE, GET, HEAD"),
        ("POST", "/generations", "GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD"),
    ],
)
def test_a_405_says_which_methods_there_are(
    http: httpx.Client, method: str, path: str, allowed: str
) -> None:
    answer = http.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_head_is_get_without_the_body(http: httpx.Client, connection: Redis, store: Path) -> None:
    here = http.post("/generate", json=CAT).headers["location"]
    work(connection, result)
    Store(f"file://{store}").put(image_key(here.split("/")[2], 0, SHA256, "png"), b"pixels")
    for path in (here, f"{here}/images/0", "/generations", "/models", "/healthz", "/v1/models"):
        head, got = http.head(path), http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        for name in ("content-type", "content-length", "etag", "cache-control", "vary"):
            assert head.headers.get(name) == got.headers.get(name), (path, name)
    assert http.head("/generations/unknown").status_code == 404
    assert http.head("/generate").status_code == 405


def test_head_of_events_does_not_wait_for_them(http: httpx.Client) -> None:
    here = http.post("/generate", json=CAT).headers["location"]
    answer = http.head(f"{here}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert http.get("/healthz").status_code == 200  # on the same connection


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream", "text/html"])
def test_a_negotiated_answer_says_by_what(http: httpx.Client, accept: str) -> None:
    with http.stream("POST", "/generate", json=CAT, headers={"Accept": accept}) as answer:
        assert answer.headers["vary"] == "Accept, Prefer"


def test_the_reference_loads_nothing_from_elsewhere(http: httpx.Client) -> None:
    for page in ("/docs", "/redoc"):
        shown = http.get(page).raise_for_status().text
        addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", shown)
        assert addresses and all(each.startswith("/") for each in addresses), addresses
        for each in addresses:
            assert http.get(each).status_code == 200


@contextmanager
def a_service(redis_url: str, **changed: object) -> Iterator[httpx.Client]:
    settings = Settings(redis_url=redis_url, model="tiny", store_url="memory:///", **changed)  # type: ignore[arg-type]
    with serving(create_app(settings)) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


PAGE = {"Origin": "https://app.example.com"}
ASKING = PAGE | {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, prefer",
}


def test_pages_of_other_origins_may_do_nothing(http: httpx.Client) -> None:
    assert not [n for n in http.get("/healthz", headers=PAGE).headers if "access-control" in n]
    assert http.options("/generate", headers=ASKING).status_code == 405


def test_pages_of_named_origins_may_call(redis_url: str, connection: Redis) -> None:
    with a_service(redis_url, cors_origins="https://app.example.com, http://[::1]:3000") as http:
        asked = http.options("/generate", headers=ASKING)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == PAGE["Origin"]
        for answer in (http.get("/healthz", headers=PAGE), http.get("/nothing", headers=PAGE)):
            assert answer.headers["access-control-allow-origin"] == PAGE["Origin"]
            read = answer.headers["access-control-expose-headers"].split(", ")
            assert {"Location", "Link", "Retry-After", "X-Request-ID", "RateLimit"} <= set(read)
            assert "access-control-allow-credentials" not in answer.headers
        other = http.get("/healthz", headers={"Origin": "https://app.example.com.evil.org"})
        assert "access-control-allow-origin" not in other.headers


def test_every_page_may_call_but_none_with_cookies(redis_url: str) -> None:
    with a_service(redis_url, cors_origins="*") as http:
        answer = http.get("/healthz", headers=PAGE | {"Cookie": "a=b"})
        assert answer.headers["access-control-allow-origin"] in ("*", PAGE["Origin"])
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["app.example.com", "https://a.b/path", "https://*.a.b", "null"])
def test_what_is_no_origin_is_refused_at_the_start(redis_url: str, origin: str) -> None:
    with pytest.raises(ValidationError, match="is no origin"):
        Settings(redis_url=redis_url, cors_origins=origin)  # type: ignore[arg-type]


def test_a_full_process_says_so_and_is_alive(redis_url: str, connection: Redis) -> None:
    with a_service(redis_url, max_requests=2) as http:
        here = http.post("/generate", json=CAT).headers["location"]
        with http.stream("GET", f"{here}/events"), http.stream("GET", f"{here}/events"):
            answer = http.get(here)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["type"] == "/problems/overloaded"
            assert http.get("/v1/models").json()["error"]["code"] == "overloaded"
            assert http.get("/healthz").status_code == 200
        until = time.monotonic() + 30
        while http.get(here).status_code == 503 and time.monotonic() < until:
            time.sleep(0.05)
        assert http.get(here).status_code == 200


@pytest.fixture
def port(redis_url: str, connection: Redis) -> Iterator[int]:
    """A service with the options of `python -m service`."""
    settings = Settings(redis_url=redis_url, model="tiny", store_url="memory:///")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(configured(create_app(settings), settings))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def say(port: int, first: bytes, then: bytes = b"") -> bytes:
    """What comes back until the service closes the connection; `then` is said after an answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        line.sendall(first)
        answer = line.recv(65_536) if then else b""
        line.sendall(then)
        while got := line.recv(65_536):
            answer += got
    return answer


def test_who_says_nothing_or_half_a_head_is_left(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.3)
    assert say(port, b"") == b""
    assert say(port, b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Trickle: ") == b""
    whole = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = say(port, whole, b"GET /hea")  # the second request of a connection
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1


def test_a_body_that_trickles_is_a_408(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", 0.3)
    head = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    answer = say(port, head + b'Content-Length: 20\r\n\r\n{"pro')
    assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()
    assert b"/problems/body-too-slow" in answer


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Long: " + b"x" * 40_000,
        b"GET /" + b"x" * 40_000,
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
    ],
    ids=["long header", "long path", "TLS", "negative length", "no host"],
)
def test_a_head_that_cannot_be_read_is_a_400_problem(port: int, head: bytes) -> None:
    answer = say(port, head)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"content-type: application/problem+json" in answer
    assert b"/problems/malformed-header" in answer


def test_a_key_of_10_kb_is_like_any_other_wrong_one(port: int, http: httpx.Client) -> None:
    here = f"http://127.0.0.1:{port}/generate"
    long = "k" * 10_000
    key = httpx.post(here, json=CAT, headers={"Idempotency-Key": long}, timeout=60)
    assert key.json()["type"] == "/problems/malformed-header" and "10000" in key.json()["detail"]
    bearer = httpx.post(here, json=CAT, headers={"Authorization": f"Bearer {long}"}, timeout=60)
    assert bearer.status_code == 202  # without a policy file no key is asked for


def policy(*keys: str) -> str:
    hashed = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    entries = ", ".join(f'{{ id = "key{i}", sha256 = "{h}" }}' for i, h in enumerate(hashed))
    return f'name = "p"\n[tenants.acme]\nkeys = [{entries}]\n'


def test_sighup_reads_the_policy_again_and_nobody_is_dropped(
    redis_url: str, connection: Redis, tmp_path: Path
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(policy("one"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        "REDIS_URL": redis_url,
        "SAFELATENT_PORT": str(port),
        "SAFELATENT_MODEL": "tiny",
        "SAFELATENT_STORE_URL": "memory:///",
        "SAFELATENT_POLICY_FILE": str(file),
    }
    command = [sys.executable, "-m", "service"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    transport = httpx.HTTPTransport(retries=10)
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=60)
    try:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        here = http.post("/generate", json=CAT, headers=one).headers["location"]
        with http.stream("GET", f"{here}/events", headers=one) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: snapshot"
            # Same length and same time: only the signal can tell that it is another.
            stamp = file.stat()
            file.write_text(policy("two"))
            os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
            assert http.get(here, headers=two).status_code == 401
            process.send_signal(signal.SIGHUP)
            while "is in force: sha256" not in process.stderr.readline():
                assert process.poll() is None
            assert http.get(here, headers=two).status_code == 200
            assert http.get(here, headers=one).status_code == 401
            long = http.get(here, headers={"Authorization": "Bearer " + "k" * 10_000})
            assert (long.status_code, long.headers["www-authenticate"]) == (401, "Bearer")
            file.write_text("name = ")
            process.send_signal(signal.SIGHUP)
            while "the old one stays in force" not in process.stderr.readline():
                assert process.poll() is None
            assert http.get(here, headers=two).status_code == 200
            http.post(f"{here}/cancel", headers=two)
            assert "event: finished" in list(lines)
    finally:
        http.close()
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0
