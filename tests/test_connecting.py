"""What may stand in REDIS_URL, and that the ways to Redis are guarded as it says."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError, RedisError
from redis.sentinel import MasterNotFoundError

from safelatent.connecting import connect, connect_async
from tests.conftest import redis_server
from tests.test_secrets import free_port

THREE = "redis+sentinel://alice:p%40ss@one:1,[::1],10.0.0.3:3/shop/5?sentinel_password=other"


def test_a_group_is_its_sentinels_and_the_name_of_its_master() -> None:
    pool: Any = connect(THREE, socket_connect_timeout=1.5).connection_pool
    assert pool.service_name == "shop"
    asked = pool.connection_kwargs
    assert (asked["username"], asked["password"], asked["db"]) == ("alice", "p@ss", 5)
    sentinels = [each.connection_pool.connection_kwargs for each in pool.sentinel_manager.sentinels]
    places = [(each["host"], each["port"]) for each in sentinels]
    assert places == [("one", 1), ("::1", 26379), ("10.0.0.3", 3)]
    assert {(each["username"], each["password"]) for each in sentinels} == {(None, "other")}
    assert {each["socket_timeout"] for each in sentinels} == {0.5}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("localhost:6379", "localhost:6379"),
        ("alice:pass@localhost", "...@localhost"),
        ("sentinel://:pass@one:1", "sentinel://...@one:1"),
        ("redis://alice:pa/ss@one:1/0", "redis://...@one:1/0"),
        ("redis://:pass/0", "redis://:.../0"),
        ("redis://one?password=pass&db=x", "redis://one"),
        ("redis://one?pasword=pass", "redis://one' has no option pasword"),
        ("redis+sentinel://alice:pass@one:1", "redis+sentinel://...@one:1"),
        ("redis+sentinel://:pass@one:1/shop/x", "redis+sentinel://...@one:1/shop/x"),
        ("redis+sentinel://:pass@one:1,two:pass/shop", "redis+sentinel://...@one:1,two:.../shop"),
        ("redis+sentinel://one/shop?sentinel_pasword=pass", "one/shop' has no option pasword"),
        ("redis+sentinel://one/shop?ssl_ca_certs=/pass", "one/shop' has no option ssl_ca_certs"),
    ],
)
def test_an_address_that_cannot_be_read_is_told_without_its_password(url: str, shown: str) -> None:
    with pytest.raises(ValueError) as refused:
        connect(url)
    said = str(refused.value)
    assert shown in said and "redis+sentinel://user:password@host:26379" in said
    assert "pass" not in said.replace("password", "")


@pytest.mark.parametrize("program", ["service", "service.webhooks", "worker"])
def test_every_program_says_so_at_its_start_in_one_sentence(program: str) -> None:
    environment = {"REDIS_URL": "redis+sentinel://:secret@one:1"}
    command = [sys.executable, "-m", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    [said] = done.stderr.splitlines()
    assert "REDIS_URL: 'redis+sentinel://...@one:1' cannot be read" in said
    assert "secret" not in said


def test_threads_that_ask_at_once_lose_no_sentinel() -> None:
    """The one that answers moves to the front, in the place of one that is away."""
    both = threading.Barrier(2)

    class Away:
        def sentinel_masters(self) -> Any:
            raise ConnectionError

    class There:
        def sentinel_masters(self) -> Any:
            both.wait(10)
            state = {"ip": "10.0.0.1", "port": 6379, "is_master": True, "num-other-sentinels": 1}
            return {"shop": state | {"is_sdown": False, "is_odown": False}}

    pool: Any = connect(THREE).connection_pool
    sentinel, three = pool.sentinel_manager, [Away(), There(), Away()]
    sentinel.sentinels = list(three)
    threads = [threading.Thread(target=sentinel.discover_master, args=["shop"]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sentinel.sentinels[0] is three[1]
    assert set(sentinel.sentinels) == set(three)


TLS = """
port 0
tls-port {port}
tls-replication yes
tls-auth-clients no
tls-cert-file {folder}/certificate
tls-key-file {folder}/key
tls-ca-cert-file {folder}/certificate
dir {folder}
"""


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    """A master and a sentinel behind TLS and a password each: host, port and certificate."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        + ["-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1"]
        + ["-keyout", tmp_path / "key", "-out", tmp_path / "certificate"],
        check=True,
        capture_output=True,
    )
    master, sentinel = free_port(), free_port()
    (tmp_path / "redis.conf").write_text(
        TLS.format(port=master, folder=tmp_path) + 'requirepass redis-password\nsave ""\n'
    )
    (tmp_path / "sentinel.conf").write_text(
        TLS.format(port=sentinel, folder=tmp_path)
        + "requirepass sentinel-password\n"
        + f"sentinel monitor shop 127.0.0.1 {master} 1\nsentinel auth-pass shop redis-password\n"
    )
    files = (["redis.conf"], ["sentinel.conf", "--sentinel"])
    servers = [
        subprocess.Popen([redis_server(), *arguments], cwd=tmp_path, stdout=subprocess.DEVNULL)
        for arguments in files
    ]
    yield f"127.0.0.1:{sentinel}/shop?ssl_ca_certs={tmp_path}/certificate"
    for each in servers:
        each.kill()
        each.wait()


def test_tls_and_passwords_are_for_redis_and_for_the_sentinels(guarded: str) -> None:
    password = "&sentinel_password=sentinel-password"
    url = f"rediss+sentinel://:redis-password@{guarded}{password}"
    deadline = time.monotonic() + 30
    with connect(url) as redis:
        while True:
            try:
                assert redis.ping()
                break
            except RedisError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    async def ping(url: str) -> bool:
        async with connect_async(url) as redis:
            return bool(await redis.ping())

    assert asyncio.run(ping(url))
    for wrong in (
        url.replace("rediss", "redis").replace(f"ssl_ca_certs={guarded.split('=')[1]}", ""),
        url.replace(password, "&sentinel_password=wrong"),
    ):
        with connect(wrong) as redis, pytest.raises(MasterNotFoundError) as refused:
            redis.ping()
        assert "password" not in str(refused.value)
    with connect(url.replace(":redis-password", ":wrong")) as redis, pytest.raises(RedisError):
        redis.ping()
