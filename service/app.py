"""The frontend, put together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from redis.backoff import NoBackoff
from redis.retry import Retry

from safelatent.connecting import connect
from safelatent.jobs import Jobs
from safelatent.store import Store
from service import cors, problems
from service.auth import Callers
from service.body import BodyLimit
from service.head import Head
from service.limits import Limits
from service.metrics import Metrics
from service.observing import Observed
from service.overload import MaxRequests
from service.parts import Parts
from service.request_id import RequestId
from service.routes import collection, generations, openai, operations
from service.settings import Settings
from service.waiting import Waiting


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application. Redis and the workers may come later, and go and come back."""
    redis = connect(
        settings.redis_url,
        # Redis away is an answer of 503 at once, and never a hang.
        socket_timeout=1,
        socket_connect_timeout=1,
        retry=Retry(NoBackoff(), 0),
    )
    jobs = Jobs(redis)
    waiting = Waiting(settings.redis_url, jobs)
    metrics = Metrics(jobs)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        following = [waiting.follow(), waiting.follow_queues()]
        followers = {asyncio.create_task(each) for each in following}
        yield
        while followers:  # asyncio and redis-py can swallow a cancellation
            for follower in followers:
                follower.cancel()
            _, followers = await asyncio.wait(followers, timeout=0.1)
        redis.close()

    app = FastAPIOffline(
        title="safelatent",
        summary="Text to image with Safe Latent Diffusion.",
        description=DESCRIPTION,
        version="1",
        lifespan=lifespan,
        redirect_slashes=False,
        webhooks=generations.webhooks,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        telemetry={"metrics": False, "logs": False, "operation_spans": False},
    )
    app.state.parts = Parts(
        settings,
        jobs,
        Store(settings.store_url),
        waiting,
        Callers(settings.policy_file, settings.open_tenant),
        Limits(jobs, settings.max_queued),
        metrics,
    )
    app.add_middleware(Head)
    app.add_middleware(BodyLimit)
    app.add_middleware(MaxRequests, most=settings.max_requests)
    cors.install(app, settings.cors_origins)
    app.add_middleware(Observed, metrics=metrics)
    app.add_middleware(RequestId)  # the last is the outermost
    problems.install(app)
    app.include_router(generations.router)
    app.include_router(collection.router)
    app.include_router(operations.router)
    app.include_router(openai.router)
    return app


DESCRIPTION = """
`POST /generate` takes a prompt and answers at once with a generation, whose `links.self` tells how
it goes on; with `Prefer: wait=60` the answer comes when the images are done, or after 60 seconds.
With `Accept: image/png` as well it is the image, and with `Accept: text/event-stream` it is events.

Every generation says what safety was asked, what was done and what was seen. Every error is a
problem (RFC 9457, `application/problem+json`) whose `type` is a page that explains it. Every answer
has an `X-Request-ID`, yours (up to 100 printable characters) or a new one; the log has it too.
"""
