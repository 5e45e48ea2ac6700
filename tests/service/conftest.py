"""The service of these tests: one for the run, with Redis flushed between tests."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from redis import Redis

from service.app import create_app
from service.settings import Settings
from tests.service.played import CARD, serving
from tests.service.receiver import SECRET


@pytest.fixture(scope="session")
def app(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    store = tmp_path_factory.mktemp("store")
    settings = Settings(
        redis_url=redis_url,
        model="tiny",
        store_url=f"file://{store}",
        webhook_secret=SECRET,
        webhook_allow="127.0.0.0/8",
    )
    app = create_app(settings)
    # A waiter that is never woken must be seen to wait, not be saved by its next look.
    app.state.parts.waiting.look_every_s = 1000
    return app


@pytest.fixture(scope="session")
def url(app: FastAPI) -> Iterator[str]:
    with serving(app) as url:
        yield url


@pytest.fixture
def http(url: str, connection: Redis) -> Iterator[httpx.Client]:
    """A client of a service with an empty Redis that knows the model `tiny`."""
    connection.hset("safelatent:models", CARD.id, CARD.model_dump_json())
    with httpx.Client(base_url=url, timeout=20) as http:
        yield http


@pytest.fixture
def store(app: FastAPI) -> Path:
    return Path(app.state.parts.settings.store_url.removeprefix("file://"))
