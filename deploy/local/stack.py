"""The local stack: runs the Procfile's processes together, until one ends or a signal asks to stop.

Redis is the first to start and the last to stop, because a worker that drains still writes to it.
Results (the `ready` process) go to stdout; what the others say goes to stderr with their names.
"""

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

ROOT = Path(__file__).parents[2]
DRAIN_S = 75
"""How long processes may take to end, longer than a worker's grace; then they are killed."""
SOCKET_PATH_MAX = 100
"""Bytes; the kernel's limit for a socket's path is 107, on macOS 103."""


class Failed(Exception):
    """The stack cannot run; the message is for the user."""


class Process:
    """One line of the Procfile: its output is relayed, its end is awaited."""

    def __init__(self, name: str, command: str, env: dict[str, str], output: "Output"):
        self.name, self.command, self.env, self.output = name, command, env, output
        self.last_line = ""

    async def start(self) -> None:
        # A session of its own: Ctrl-C reaches us alone, and we stop everybody in order.
        self._process = await asyncio.create_subprocess_shell(
            self.command,
            cwd=ROOT,
            env=self.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=None if self.name == "ready" else asyncio.subprocess.STDOUT,
            limit=1 << 24,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.ended = asyncio.create_task(self._relay())

    async def _relay(self) -> int:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.last_line = line.decode(errors="replace").rstrip()
            self.output.write(self.name, self.last_line)
        return await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def why_it_ended(self) -> str:
        """Its own sentence where it left one, else how it ended and the last that it said."""
        if self.last_line.startswith("safelatent"):
            return self.last_line
        code = self.ended.result()
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        where = f"; see {self.env['STATE']}/redis/redis.log" if self.name == "redis" else ""
        said = f": {self.last_line}" if self.last_line else where
        return f"safelatent: {self.name} ended with {how}{said}"


class Output:
    """Our stdout and stderr. When nobody reads them any more, that is a wish to stop."""

    def __init__(self, closed: asyncio.Event):
        self.closed = closed

    def write(self, name: str, line: str) -> None:
        try:
            if name == "ready":
                print(line, flush=True)
            else:
                print(f"{name:8} | {line}" if name else line, file=sys.stderr, flush=True)
        except OSError:
            self.closed.set()


async def run(commands: dict[str, str], env: dict[str, str]) -> int:
    """Run the processes; the exit code is 0 if all ended as asked."""
    stop = asyncio.Event()
    output = Output(stop)
    processes = [Process(name, command, env, output) for name, command in commands.items()]
    started: list[Process] = []

    def asked() -> None:
        if stop.is_set():
            for process in started:
                process.signal(signal.SIGKILL)
        else:
            output.write("", "safelatent: stopping; what is running ends first (again: at once),")
            output.write("", "safelatent: and can be fetched after the next start")
            stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, asked)

    stopped = asyncio.create_task(stop.wait())
    first: Process | None = None
    try:
        for process in processes:
            await process.start()
            started.append(process)
            if process.name == "redis":
                answers = asyncio.create_task(redis_answers(env["REDIS_URL"]))
                await asyncio.wait(
                    {answers, process.ended, stopped}, return_when=asyncio.FIRST_COMPLETED
                )
                answers.cancel()
                if process.ended.done() or stopped.done():
                    break
        await asyncio.wait(
            {stopped, *(p.ended for p in started)}, return_when=asyncio.FIRST_COMPLETED
        )
        first = next((p for p in started if p.ended.done()), None)
    finally:
        await end([p for p in started if p.name != "redis"])
        await end([p for p in started if p.name == "redis"])

    if stopped.done() or first is None:
        return 0
    code = first.ended.result()
    if first.name == "ready" and code == 0:
        return 0
    output.write("", first.why_it_ended())
    return code if code > 0 else 1


async def end(processes: list[Process]) -> None:
    """Ask to end, wait, and leave nothing of their process groups behind."""
    for process in processes:
        if not process.ended.done():
            process.signal(signal.SIGTERM)
    if processes:
        _, late = await asyncio.wait({p.ended for p in processes}, timeout=DRAIN_S)
        for process in processes:
            process.signal(signal.SIGKILL)
        if late:
            await asyncio.wait(late)


async def redis_answers(url: str) -> None:
    """Return when the server is there and has read its data."""
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_unix_connection(unquote(urlsplit(url).path))
            writer.write(b"PING\r\n")
            answer = await reader.readline()
            writer.close()
            if answer == b"+PONG\r\n":
                return
        await asyncio.sleep(0.02)


def die_with_parent() -> None:
    """In a child: even if this program is killed, nothing stays behind (Linux only)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def check_port(host: str, port: str) -> None:
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise Failed(f"PORT is {port!r}; it must be a number from 1 to 65535")
    try:
        [(family, *_, address), *_] = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise Failed(
            f"cannot listen on {host} port {port} ({error.strerror}): "
            "stop what listens there, or choose another, for example make run PORT=8001"
        ) from error


def socket_folder(state: Path, stack: ExitStack) -> Path:
    """Where Redis' socket goes: beside its data, or in a private temporary folder."""
    folder = state / "redis"
    if len(os.fsencode(folder / "redis.sock")) <= SOCKET_PATH_MAX:
        return folder
    temporary = Path(tempfile.mkdtemp(prefix="safelatent-"))
    stack.callback(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def environment() -> dict[str, str]:
    """What the processes see: the caller's environment, and the make variables in our names."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["PYTHONUNBUFFERED"] = "1"
    for variable, setting in (("PORT", "SAFELATENT_PORT"), ("MODEL", "SAFELATENT_MODEL")):
        if env.get(variable):
            env[setting] = env[variable]
    env.setdefault("SAFELATENT_HOST", "127.0.0.1")
    env.setdefault("SAFELATENT_PORT", "8000")
    env.setdefault("SAFELATENT_LOG_FORMAT", "console")
    env["SAFELATENT_LOG_LEVEL"] = env.get("SAFELATENT_LOG_LEVEL") or "WARNING"
    state = ROOT / env.setdefault("STATE", ".safelatent")
    env.setdefault("SAFELATENT_STORE_URL", f"file://{state / 'store'}")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(env["SAFELATENT_HOST"], env["SAFELATENT_HOST"])
    host = f"[{host}]" if ":" in host else host
    env["SAFELATENT_URL"] = f"http://{host}:{env['SAFELATENT_PORT']}"
    return env


def main() -> int:
    lines = (ROOT / "Procfile").read_text().splitlines()
    commands = {name: command.strip() for name, command in (line.split(":", 1) for line in lines)}
    env = environment()
    with ExitStack() as stack:
        try:
            check_port(env["SAFELATENT_HOST"], env["SAFELATENT_PORT"])
        except Failed as failed:
            print(f"safelatent: {failed}", file=sys.stderr)
            return 1
        if env.get("REDIS_URL"):
            del commands["redis"]
        else:
            folder = socket_folder(ROOT / env["STATE"], stack)
            env["REDIS_URL"] = f"unix://{quote(str(folder / 'redis.sock'))}"
        print("safelatent: starting; the model takes a moment to load", file=sys.stderr)
        return asyncio.run(run(commands, env))


if __name__ == "__main__":
    sys.exit(main())
