"""A real service with a worker that acts, and its two clients: tests that take `either` run with
the client that blocks and with the one that awaits."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from inspect import isasyncgen, isawaitable
from typing import Any

import pytest
from redis import Redis

from safelatent import AsyncClient, AsyncGeneration, AsyncImage, Client
from safelatent.store import Store
from service.app import create_app
from service.settings import Settings
from tests.client.acting import acting
from tests.service.played import serving

END = object()


class Blocking:
    """An object whose coroutines run to their end when they are called."""

    def __init__(self, awaited: Any, runner: asyncio.Runner):
        self._awaited, self._runner = awaited, runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._awaited, name)
        if not callable(found):
            return self._wrapped(found)
        return lambda *args, **options: self._wrapped(self._run(found, *args, **options))

    def __repr__(self) -> str:
        return repr(self._awaited)

    def _run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        async def call() -> Any:
            made = function(*args, **options)
            return await made if isawaitable(made) else made

        return self._runner.run(call())

    def _wrapped(self, value: Any) -> Any:
        if isasyncgen(value):
            return self._iterate(value)
        if isinstance(value, list):
            return [self._wrapped(each) for each in value]
        is_noun = isinstance(value, AsyncGeneration | AsyncImage)
        return Blocking(value, self._runner) if is_noun else value

    def _iterate(self, generator: AsyncGenerator[Any]) -> Iterator[Any]:
        while (value := self._run(anext, generator, END)) is not END:
            yield self._wrapped(value)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=[Client, AsyncClient])
def either(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Any]:
    """Makes a client of one of the two kinds; `kind` says which."""
    made = []

    def make(*args: Any, **options: Any) -> Any:
        client = request.param(*args, **options)
        made.append(client)
        return client if request.param is Client else Blocking(client, runner)

    make.kind = request.param  # type: ignore[attr-defined]
    yield make
    for client in made:
        client.close() if request.param is Client else runner.run(client.aclose())


@pytest.fixture(scope="session")
def running_service(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    url = f"file://{tmp_path_factory.mktemp('store')}"
    app = create_app(Settings(redis_url=redis_url, model="tiny", store_url=url))
    with serving(app) as address:
        yield address, Store(url)


@pytest.fixture
def url(running_service: Any, connection: Redis) -> Iterator[str]:
    """Address of a service whose worker acts."""
    address, store = running_service
    with acting(connection, store):
        yield address
