"""A receiver of webhooks on a real port, and deliverers in threads."""

import asyncio
import base64
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
from redis import Redis

from safelatent.jobs import Jobs
from service.webhooks.deliverer import Deliverer
from service.webhooks.settings import Settings

PATIENCE_S = 120
SECRET = "whsec_" + base64.b64encode(b"canary-" * 4).decode()


def await_(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.02)
    return found


class Receiver:
    """Keeps every call; answers the next of `answers`, then 204. An answer may be a function."""

    def __init__(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.calls: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[int | Callable[[BaseHTTPRequestHandler], None]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"] or 0))
                receiver.calls.append((self.path, dict(self.headers), body))
                answer = receiver.answers.pop(0) if receiver.answers else 204
                if callable(answer):
                    answer(self)
                    return
                self.send_response(answer)
                if answer == 302:
                    self.send_header("Location", f"{receiver.url}/elsewhere")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *anything: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Receiver":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *anything: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def await_calls(self, count: int) -> list[tuple[str, dict[str, str], bytes]]:
        await_(lambda: len(self.calls) >= count, f"{count} calls, but {len(self.calls)}")
        return self.calls


@contextmanager
def delivering(
    redis_url: str, secrets: Sequence[str], look_s: float = 0.2, **settings: Any
) -> Iterator[Deliverer]:
    """A deliverer at work in a thread, for loopback receivers unless it is told otherwise."""
    resolve = settings.pop("resolve", None)
    given = {"webhook_allow": "127.0.0.0/8", "webhook_timeout_s": 5, "webhook_retry_s": [0.1] * 3}
    connection = Redis.from_url(redis_url)
    deliverer = Deliverer(
        Settings(redis_url=redis_url, **(given | settings)),
        Jobs(connection),
        lambda tenant: secrets,
        resolve,
    )
    deliverer.look_s = look_s
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(deliverer.run(stop)))
    thread.start()
    try:
        yield deliverer
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        connection.close()


def ask(http: httpx.Client, webhook: str, **body: Any) -> str:
    answer = http.post("/generate", json={"prompt": "a cat", "webhook": webhook} | body)
    assert answer.status_code == 202, answer.text
    assert answer.json()["webhook"]["status"] == "pending"
    return str(answer.json()["id"])


def await_delivery(http: httpx.Client, id: str, status: str) -> dict[str, Any]:
    def delivery() -> dict[str, Any]:
        found: dict[str, Any] = http.get(f"/generations/{id}").json()["webhook"]
        return found

    await_(lambda: delivery()["status"] == status, f"webhook that is {status}: {delivery()}")
    return delivery()
