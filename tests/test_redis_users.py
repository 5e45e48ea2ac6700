"""Each process does its whole work as its own Redis user, by TLS, and the user can do no more."""

import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError

from service.app import create_app
from service.settings import Settings
from tests.checkpoint import build
from tests.conftest import redis_server
from tests.service.played import serving
from tests.service.receiver import SECRET, Receiver, ask, await_, await_delivery, delivering
from tests.worker import process

ROOT = Path(__file__).parents[1]


@dataclass
class Guarded:
    """A Redis with users and TLS."""

    port: int
    certificate: Path

    def url(self, user: str) -> str:
        password = (self.certificate.parent / f"{user}.password").read_text()
        return f"rediss://{user}:{password}@127.0.0.1:{self.port}/0?ssl_ca_certs={self.certificate}"

    def connect(self, user: str) -> Redis:
        return Redis.from_url(self.url(user))


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    version = subprocess.run([redis_server(), "--version"], capture_output=True, text=True).stdout
    if int(re.search(r"v=(\d+)", version)[1]) < 7:  # type: ignore[index]
        pytest.skip("Redis 7 brought rights that differ between reading and writing")
    with tempfile.TemporaryDirectory(prefix="redis-") as name:
        folder = Path(name)
        certificate, key = folder / "certificate", folder / "key"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
            + ["-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1"]
            + ["-keyout", key, "-out", certificate],
            check=True,
            capture_output=True,
        )
        # The lines of the docs make the passwords and the file.
        page = (ROOT / "docs" / "security.md").read_text()
        [recipe] = re.findall(r"```console\n(umask.*?)redis-server --aclfile", page, re.DOTALL)
        (folder / "deploy").symlink_to(ROOT / "deploy")
        subprocess.run(["bash", "-ec", recipe], cwd=folder, check=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        options = f"--port 0 --tls-port {port} --tls-auth-clients no --aclfile users.acl"
        files = (
            f"--tls-cert-file {certificate} --tls-key-file {key} --tls-ca-cert-file {certificate}"
        )
        server = subprocess.Popen(
            [redis_server(), *options.split(), *files.split(), "--save", ""],
            cwd=folder,
            stdout=subprocess.PIPE,
        )
        guarded = Guarded(port, certificate)

        def answers() -> bool:
            assert server.poll() is None, server.stdout.read().decode()  # type: ignore[union-attr]
            try:
                with guarded.connect("admin") as connection:
                    return bool(connection.ping())
            except RedisError:
                return False

        await_(answers, "Redis")
        yield guarded
        server.kill()
        server.communicate()


def test_each_process_works_as_its_own_user(
    guarded: Guarded, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = build(tmp_path_factory.mktemp("models") / "tiny")
    store = f"file://{tmp_path}/store"
    environment = {
        "REDIS_URL": guarded.url("worker"),
        "SAFELATENT_MODEL": str(checkpoint),
        "SAFELATENT_STORE_URL": store,
        "SAFELATENT_SLOTS": "2",
    }
    settings = Settings(
        redis_url=guarded.url("service"),
        model="models/tiny",
        store_url=store,
        webhook_secret=SECRET,
        webhook_allow="127.0.0.1",
    )
    log = tmp_path / "log"
    workers = [process.start(environment, log, step_s=0.05, lease_s=2)]
    admin = guarded.connect("admin")
    try:
        with (
            serving(create_app(settings)) as url,
            httpx.Client(base_url=url, timeout=60) as http,
            Receiver() as receiver,
            delivering(guarded.url("webhooks"), [SECRET]),
        ):
            await_(lambda: http.get("/readyz").is_success, "warm worker")
            quick: dict[str, Any] = {"steps": 4, "scheduler": "ddim", "safety": {"level": "max"}}
            quick["deadline_s"] = 3600
            done = ask(http, receiver.url, **quick)
            await_delivery(http, done, "delivered")
            body = {"prompt": "a cat"} | quick
            once = {"Idempotency-Key": "k", "Prefer": "wait=60"}
            twice = [http.post("/generate", json=body, headers=once).json() for _ in range(2)]
            assert twice[0]["id"] == twice[1]["id"] and twice[0]["status"] == "succeeded"
            with http.stream("GET", f"/generations/{done}/events") as events:
                assert "event: finished" in events.read().decode()

            slow = [ask(http, receiver.url, **(quick | {"steps": 60})) for _ in range(3)]
            await_(lambda: http.get(f"/generations/{slow[0]}").json()["progress"], "progress")
            for id in (slow[2], slow[0]):  # one that waits, one that runs
                http.post(f"/generations/{id}/cancel").raise_for_status()
                await_delivery(http, id, "delivered")
            workers[0].kill()  # another finds what it held
            workers.append(process.start(environment, log, step_s=0.001, lease_s=2))
            await_delivery(http, slow[1], "delivered")
            assert http.get(f"/generations/{slow[1]}").json()["status"] == "succeeded"
            assert len(http.get("/generations").json()["data"]) == 5
            assert http.get("/models").json()[0]["id"] == "tiny"
            assert http.delete(f"/generations/{done}").status_code == 204
            workers[1].terminate()
            workers[1].join(60)
            assert workers[1].exitcode == 0
            assert len(receiver.calls) == 4
        refused: Any = admin.execute_command("ACL LOG")
        assert refused == []
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        for each in admin.execute_command("ACL LOG"):
            print("refused:", each)
        admin.close()


EVERYBODY = [
    ("KEYS", "*"),
    ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "dir", "/tmp"),
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("ACL", "SETUSER", "worker", "+@all"),
    ("ACL", "LIST"),
    ("SAVE",),
    ("SHUTDOWN", "NOSAVE"),
    ("REPLICAOF", "127.0.0.1", "1"),
    ("MODULE", "LIST"),
    ("MONITOR",),
    ("SCRIPT", "FLUSH"),
    ("FUNCTION", "LIST"),
    ("CLIENT", "KILL", "ID", "1"),
    ("SET", "foreign", "1"),
    ("PUBLISH", "foreign", "1"),
]
OWN = {
    "service": [
        ("EVAL", "return redis.call('HSET', 'safelatent:models', 'm', '{}')", "0"),
        ("HSET", "safelatent:models", "m", "{}"),
        ("XADD", "rq:results:1", "*", "a", "b"),
        ("HSET", "safelatent:webhook:1", "status", "delivered"),
        ("GET", "foreign"),
    ],
    "worker": [
        ("ZADD", "safelatent:owned:acme", "1", "x"),
        ("SET", "safelatent:once:acme:k", "x"),
        ("ZADD", "safelatent:webhooks:due", "1", "x"),
        ("DEL", "safelatent:rate:acme:requests"),
        ("HSET", "safelatent:webhook:1", "status", "delivered"),
        ("EVAL", "return redis.call('SET', 'safelatent:once:acme:k', 'x')", "0"),
        ("ZRANGE", "safelatent:owned:acme", "0", "-1"),
        ("GET", "foreign"),
    ],
    "webhooks": [
        ("HSET", "rq:job:1", "data", "x"),
        ("DEL", "rq:job:1"),
        ("XADD", "safelatent:events", "*", "finished", "x"),
        ("RPUSH", "rq:queue:tiny:high", "x"),
        ("SET", "safelatent:cancelled:1", "1"),
        ("EVAL", "return redis.call('DEL', 'rq:job:1')", "0"),
        ("GET", "safelatent:once:acme:k"),
        ("PUBLISH", "rq:pubsub:worker", "{}"),
    ],
}


@pytest.mark.parametrize("user", OWN)
def test_a_user_can_do_no_more(guarded: Guarded, user: str) -> None:
    with guarded.connect(user) as connection:
        for command in [*EVERYBODY, *OWN[user]]:
            with pytest.raises(RedisError) as refused:
                connection.execute_command(*command)
            said = str(refused.value).lower()
            assert re.search("no permission|acl failure|can't access", said), (command, said)


def test_who_does_not_log_in_can_only_ask_whether_it_lives(guarded: Guarded) -> None:
    url = f"rediss://127.0.0.1:{guarded.port}/0?ssl_ca_certs={guarded.certificate}"
    with Redis.from_url(url) as connection:
        assert connection.ping()
        with pytest.raises(NoPermissionError):
            connection.get("rq:queues")
    with Redis.from_url(url.split("?")[0]) as connection, pytest.raises(RedisError):
        connection.ping()  # the certificate is no public one
