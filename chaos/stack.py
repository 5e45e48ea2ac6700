"""The stack that is hurt: Redis behind a proxy, two frontends, two supervised workers, a deliverer
of webhooks."""

import asyncio
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from safelatent.deliveries import DUE
from tests.checkpoint import build
from tests.conftest import redis_server
from tests.service.receiver import SECRET
from worker.supervisor import NAME

WARM_S = 300
LIBC = ctypes.CDLL(None)


class Proxy:
    """Passes bytes between the stack and Redis; can cut every connection, and hold bytes back."""

    def __init__(self, target: int):
        self.target = target
        self.may_pass = asyncio.Event()
        self.may_pass.set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        with suppress(asyncio.CancelledError):  # at the end of the run
            await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        self._writers -= {writer, back}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                await self.may_pass.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


class Stack:
    """Processes by name: `redis`, `frontend-0`, `frontend-1`, `worker-0`, `worker-1`,
    `deliverer`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.redis_port, *self.ports = _free_ports(3)
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.proxy = Proxy(self.redis_port)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.connection = Redis(port=self.redis_port)
        """Ours, past the proxy."""

    async def start(self) -> None:
        proxy = await self.proxy.start()
        self.environment = {
            **os.environ,
            "REDIS_URL": f"redis://127.0.0.1:{proxy}/0",
            "SAFELATENT_MODEL": str(build(self.folder / "tiny")),
            "SAFELATENT_STORE_URL": f"file://{self.folder}/store",
            "SAFELATENT_SLOTS": "4",
            "SAFELATENT_WEBHOOK_SECRET": SECRET,
            "SAFELATENT_WEBHOOK_ALLOW": "127.0.0.0/8",
            "SAFELATENT_WEBHOOK_RETRY_S": json.dumps([1] * 100),
        }
        (self.folder / "redis").mkdir()
        for name in ("redis", "frontend-0", "frontend-1", "worker-0", "worker-1", "deliverer"):
            self.launch(name)
        for name in ("worker-1", "frontend-0", "frontend-1"):
            await self.await_ready(name)

    async def await_ready(self, name: str) -> None:
        """Until both workers are warm, or a frontend takes connections."""
        deadline = time.monotonic() + WARM_S
        while not self._is_ready(name):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} does not get ready; its logs are in {self.folder}")
            await asyncio.sleep(0.2)

    def _is_ready(self, name: str) -> bool:
        if name.startswith("worker"):
            return self.warm() >= 2
        try:
            socket.create_connection(("127.0.0.1", self.ports[int(name[-1])])).close()
        except OSError:
            return False
        return True

    @contextmanager
    def store_is_away(self) -> Iterator[None]:
        """A file stands where the store's folder was: nothing can be written or read."""
        store, aside = self.folder / "store", self.folder / "store.aside"
        store.rename(aside)
        store.touch()
        try:
            yield
        finally:
            store.unlink()
            aside.rename(store)

    def launch(self, name: str) -> None:
        environment, folder = self.environment, None
        if name == "redis":
            command = [redis_server(), "--port", str(self.redis_port), "--appendonly", "yes"]
            command += ["--save", ""]
            folder = self.folder / "redis"
        elif name.startswith("frontend"):
            port = str(self.ports[int(name[-1])])
            environment = {**environment, "SAFELATENT_PORT": port}
            command = [sys.executable, "-m", "service"]
        elif name == "deliverer":
            command = [sys.executable, "-m", "service.webhooks"]
        else:
            command = [sys.executable, "-m", "worker"]
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_us,
            )

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    async def restart(self, name: str) -> int:
        """As a rolling update does: SIGTERM, wait, start the next; the exit code of the old."""
        old = self.processes[name]
        old.terminate()
        code = await asyncio.to_thread(old.wait)
        self.launch(name)
        return code

    def warm(self) -> int:
        """Worker processes that hold the model now, and live."""
        with suppress(RedisError):
            now, _ = self.connection.time()
            members: Any = self.connection.zrangebyscore("safelatent:workers", now, "+inf")
            announced = {member.decode().split(" ")[0] for member in members}
            return len(announced & {self._name(self.child(f"worker-{i}")) for i in (0, 1)})
        return 0

    def child(self, name: str) -> int | None:
        """Process id of the process that a supervisor has started, if it lives."""
        pid = self.processes[name].pid
        with suppress(OSError, IndexError):
            return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        return None

    def busy(self, name: str) -> tuple[int, set[str]] | None:
        """Process id and executions, `<job>:<execution>`, of a supervisor's child that has some."""
        child = self.child(name)
        with suppress(RedisError):
            keys: Any = self.connection.keys(f"rq:worker:{self._name(child)}-*:executions")
            members: list[Any] = [one for key in keys for one in self.connection.smembers(key)]
            held = {one.decode() for one in members}
            if child is not None and held:
                return child, held
        return None

    def _name(self, child: int | None) -> str | None:
        """What a supervisor's child calls itself."""
        with suppress(OSError, KeyError):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            pairs = dict(pair.split(b"=", 1) for pair in environment if b"=" in pair)
            return pairs[NAME.encode()].decode()
        return None

    def running(self) -> set[str]:
        """Executions that somebody is believed to be at."""
        keys: Any = self.connection.keys("rq:wip:*")
        members: list[Any] = [one for key in keys for one in self.connection.zrange(key, 0, -1)]
        return {one.decode() for one in members}

    def goes_on(self, execution: str) -> bool:
        """Whether its job is in another execution's hands, or has ended."""
        id, dead = execution.split(":")
        holders: Any = self.connection.zrange(f"rq:executions:{id}", 0, -1)
        status: Any = self.connection.hget(f"rq:job:{id}", "status")
        return any(one.decode() != dead for one in holders) or status not in (b"queued", b"started")

    def left(self) -> list[str]:
        """What should be empty when everything has ended, and is not."""
        patterns = ("rq:wip:*", "rq:queue:*", "rq:execution*", "rq:worker:*:executions", DUE)
        keys: Any = [key for pattern in patterns for key in self.connection.keys(pattern)]
        workers: Any = self.connection.smembers("rq:workers")
        gone = [worker for worker in workers if not self.connection.exists(worker)]
        return [key.decode() for key in keys + gone]

    def end(self) -> None:
        for process in reversed(list(self.processes.values())):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


def _die_with_us() -> None:
    """In a child: be killed when the chaos is, even by SIGKILL (Linux only)."""
    PR_SET_PDEATHSIG = 1
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
