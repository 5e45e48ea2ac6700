"""The playground as its users have it: the local stack, the page's process, a real browser."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from tests.service.played import serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page
    from playwright.sync_api import Request as Asked

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120
UNDER = "/tools/try"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(command: list[str], log: Path, until: str, **environment: object) -> Iterator[int]:
    """A process in a session of its own, once `until` answers 200."""
    env = {k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "SAFELATENT_API_KEY")}
    env |= {name: str(value) for name, value in environment.items()}
    with log.open("w") as out:
        started = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(until, trust_env=False).is_success:
                    break
            said = log.read_text()[-2000:]
            assert started.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.1)
        yield started.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        started.wait(PATIENCE_S)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Redis, frontend and a worker with the embedded model: the address, and the process id."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (Debian: apt install chromium)")
    state, port = tmp_path_factory.mktemp("stack"), free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["deploy/local/stack.py"]
    with process(command, state / "log", f"{url}/readyz", PORT=port, STATE=state) as pid:
        yield url, pid


@pytest.fixture(scope="session")
def service(stack: tuple[str, int]) -> str:
    return stack[0]


def proxy(target: str) -> Starlette:
    """Serves `target` under `UNDER`, which it takes away, as a reverse proxy does."""
    client = httpx.AsyncClient(base_url=target, timeout=None, trust_env=False)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    async def forward(request: Request) -> StreamingResponse:
        path = request.url.path.removeprefix(UNDER)
        content = await request.body()
        headers = {**request.headers, "host": request.headers["host"]}
        query = request.query_params
        sent = client.build_request(
            request.method, path, params=query, headers=headers, content=content
        )
        answer = await client.send(sent, stream=True)
        end = BackgroundTask(answer.aclose)
        return StreamingResponse(answer.aiter_raw(), answer.status_code, answer.headers, None, end)

    route = Route(UNDER + "/{path:path}", forward, methods=["GET", "POST"])
    return Starlette(routes=[route], lifespan=lifespan)


@pytest.fixture(scope="session")
def playground(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page's address, under a sub-path: what works there works without one."""
    log, port = tmp_path_factory.mktemp("playground") / "log", free_port()
    settings = {
        "SAFELATENT_URL": service,
        "SAFELATENT_PLAYGROUND_PORT": port,
        "SAFELATENT_PLAYGROUND_ROOT_PATH": UNDER,
    }
    direct = f"http://127.0.0.1:{port}"
    with process(["-m", "playground"], log, direct, **settings), serving(proxy(direct)) as url:
        yield f"{url}{UNDER}/"


@pytest.fixture(scope="module")
def browser(stack: tuple[str, int]) -> Iterator["Browser"]:
    # Of the module: while it lives, playwright's loop runs in this thread, and no other can.
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def open_page(browser: "Browser", playground: str) -> Iterator[Any]:
    """Opens the page as somebody would; nothing may be asked of anybody but the playground."""
    elsewhere: list[str] = []
    contexts = []

    def note(request: "Asked") -> None:
        if not request.url.startswith((playground, "data:", "blob:")):
            elsewhere.append(request.url)

    def open_page(width: int, scheme: str) -> "Page":
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",
            permissions=["clipboard-read", "clipboard-write"],
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE_S * 1000)
        page = context.new_page()
        page.on("request", note)
        page.goto(playground)
        page.wait_for_selector("#level-b input:checked")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert elsewhere == []


@pytest.fixture(scope="module")
def wide(open_page: Any) -> "Page":
    """A light page on a wide screen, which several tests use: opening takes longest."""
    return open_page(1440, "light")


@pytest.fixture(scope="module")
def narrow(open_page: Any) -> "Page":
    """A dark page on a telephone."""
    return open_page(390, "dark")
