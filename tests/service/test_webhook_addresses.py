"""Where webhooks may go: what is refused when it is asked for, and what when it is called."""

import asyncio
import base64
import ipaddress
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from redis import Redis

from service.policy import UnusablePolicy, load
from service.webhooks.addresses import Allowed, PublicOnly, Refused, checked, is_public
from tests.service.played import result, work
from tests.service.receiver import SECRET, Receiver, ask, await_delivery, delivering

PUBLIC, PRIVATE = "93.184.215.14", "10.0.0.1"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (PUBLIC, True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        (f"::ffff:{PUBLIC}", True),
        (f"64:ff9b::{PUBLIC}", True),
        *(
            (address, False)
            for address in (
                "0.0.0.0",
                "10.0.0.1",
                "100.64.0.1",
                "127.0.0.1",
                "169.254.169.254",
                "172.16.0.1",
                "192.168.0.1",
                "192.0.2.1",
                "198.18.0.1",
                "224.0.0.1",
                "239.1.1.1",
                "255.255.255.255",
                "::",
                "::1",
                "::10.0.0.1",
                "::ffff:10.0.0.1",
                "::ffff:0:10.0.0.1",
                "64:ff9b::10.0.0.1",
                "64:ff9b:1::1",
                "2002:a00:1::1",
                "2001:0:4136:e378:8000:63bf:f5ff:fffe",
                "2001:db8::1",
                "fc00::1",
                "fd12::1",
                "fe80::1",
                "fe80::1%eth0",
                "fec0::1",
                "ff02::1",
                "ff0e::1",
            )
        ),
    ],
)
def test_public_is_the_internet_and_nothing_else(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize(
    ("webhook", "said"),
    [
        ("hook", "https"),
        ("ftp://example.com/", "https"),
        ("file:///etc/passwd", "https"),
        ("https://", "https"),
        ("http://example.com/", "https"),
        ("https://joe:pw@example.com/", "user and password"),
        ("https://joe@example.com/", "user and password"),
        ("https://example.com/#a", "#fragment"),
        ("https://example.com:0/", "port"),
        ("https://example.com:65536/", "port"),
        ("https://example.com:x/", "no URL"),
        ("https://exa mple.com/", "host name"),
        ("https://example.com\\@10.0.0.1/", "public|host name|user"),
        ("https://exam\nple.com/", "no URL"),
        ("https://localhost/", "public"),
        ("https://LOCALHOST./", "public"),
        ("https://redis/", "public"),
        ("https://printer.local/", "public"),
        ("https://db.internal/", "public"),
        ("https://127.0.0.1/", "public"),
        ("https://127.1/", "public"),
        ("https://2130706433/", "public"),
        ("https://0x7f.0.0.1/", "public"),
        ("https://0177.0.0.1/", "no URL"),
        ("https://10.1.2.3/", "public"),
        ("https://169.254.169.254/latest", "public"),
        ("https://[::1]/", "public"),
        ("https://[::ffff:10.0.0.1]/", "public"),
        ("https://[fe80::1]/", "public"),
    ],
)
def test_a_url_is_refused_with_what_is_wrong(webhook: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        checked(webhook, Allowed())


def test_a_good_url_passes_and_an_allowed_host_may_be_private_and_plain() -> None:
    for webhook in (
        "https://example.com/a?b=c",
        "https://bücher.example:8443/",
        f"https://{PUBLIC}",
    ):
        checked(webhook, Allowed())
    allowed = Allowed.parse("localhost, receiver,10.0.0.0/8, 127.0.0.1, fd00::/8")
    for webhook in ("http://localhost:5000/", "http://receiver/", "http://10.1.2.3/"):
        checked(webhook, allowed)
    for webhook in ("http://example.com/", "http://11.1.2.3/", "https://127.0.0.2/"):
        with pytest.raises(Refused):
            checked(webhook, allowed)
    with pytest.raises(ValueError, match="10.0.0.0/33"):
        Allowed.parse("localhost, 10.0.0.0/33")


def test_the_problem_names_the_field(http: httpx.Client) -> None:
    answer = http.post("/generate", json={"prompt": "a", "webhook": "https://10.0.0.1/"})
    assert answer.status_code == 422
    assert [each["field"] for each in answer.json()["errors"]] == ["webhook"]
    answer = http.post("/generate", json={"prompt": "a", "webhook": "https://a.b/" + "x" * 2000})
    assert [each["field"] for each in answer.json()["errors"]] == ["webhook"]


class Recorded(httpcore.AsyncNetworkBackend):
    """The backend under `PublicOnly`: where it would connect to."""

    def __init__(self) -> None:
        self.to: list[str] = []

    async def connect_tcp(self, host: str, *rest: Any) -> httpcore.AsyncNetworkStream:  # type: ignore[override]
        self.to.append(host)
        return httpcore.AsyncMockStream([b"HTTP/1.1 204 \r\n\r\n"])


def connected(*answers: list[str]) -> tuple[list[str], int]:
    """Where a call goes when a name has these addresses, look-up by look-up; and how many."""
    asked = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    backend = PublicOnly(Allowed(), resolve)
    backend._backend = recorded = Recorded()  # type: ignore[assignment]

    async def call() -> None:
        async with httpcore.AsyncConnectionPool(network_backend=backend) as pool:
            await pool.request("GET", "http://rebinding.example/")

    try:
        asyncio.run(call())
    except Refused:
        pass
    return recorded.to, len(asked)


def test_a_name_is_resolved_once_and_each_of_its_addresses_must_be_public() -> None:
    assert connected([PUBLIC], [PRIVATE]) == ([PUBLIC], 1)
    assert connected([PRIVATE], [PUBLIC]) == ([], 1)
    assert connected([PUBLIC, PRIVATE]) == ([], 1)
    assert connected([PUBLIC, f"::ffff:{PRIVATE}"]) == ([], 1)


def test_a_name_that_has_a_private_address_is_refused_and_not_said_which(
    http: httpx.Client, connection: Redis, redis_url: str
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return [PRIVATE]

    with delivering(redis_url, [SECRET], webhook_retry_s=[0.1], resolve=resolve):
        id = ask(http, "https://rebinding.example/")
        work(connection, result)
        state = await_delivery(http, id, "failed")
    assert "not public" in state["last_error"] and PRIVATE not in state["last_error"]
    assert state["attempts"] == 2


def test_the_certificate_must_be_the_names(
    http: httpx.Client,
    connection: Redis,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The connection goes to an address, and the certificate is still checked for the name."""
    certificate, key = tmp_path / "certificate", tmp_path / "key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        + ["-subj", "/CN=receiver.test", "-addext", "subjectAltName=DNS:receiver.test"]
        + ["-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    with (
        Receiver(tls) as receiver,
        delivering(redis_url, [SECRET], webhook_retry_s=[0.1], resolve=resolve),
    ):
        right = ask(http, f"https://receiver.test:{receiver.port}/right")
        wrong = ask(http, f"https://other.test:{receiver.port}/wrong")
        work(connection, result)
        await_delivery(http, right, "delivered")
        state = await_delivery(http, wrong, "failed")
    assert "certificate" in state["last_error"].lower()
    [(path, headers, _)] = receiver.calls
    assert path == "/right"
    assert {k.lower(): v for k, v in headers.items()}["host"] == f"receiver.test:{receiver.port}"


def test_secrets_in_the_policy_that_are_none_are_named_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    (tmp_path / "secret").write_text("canary")
    for reference, said in (
        ("env:CANARY_NOT_SET", "CANARY_NOT_SET"),
        (f"file:{tmp_path}/nowhere", "nowhere"),
        (f"file:{tmp_path}/secret", "whsec_"),
        ("whsec_" + base64.b64encode(b"c4n4ry" * 5).decode(), "env:NAME"),
    ):
        path.write_text(f"[tenants.a]\nwebhook_secrets = ['{reference}']")
        with pytest.raises(UnusablePolicy, match=f"tenants.a.webhook_secrets.*{said}") as refused:
            load(path)
        assert "canary" not in str(refused.value) and "YzRuNHJ5" not in str(refused.value)
