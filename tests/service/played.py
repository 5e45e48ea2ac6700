"""A real service on a real port, and a worker that is played by a function."""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import uvicorn
from fastapi import FastAPI
from redis import Redis
from rq import SimpleWorker, get_current_job
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty

from safelatent import events
from safelatent.queues import SafeJob, SafeQueue, queues
from safelatent.schema import GenerationRequest, Image, ImageSafety, Model, Result, Status

SHA256 = "5a1ad"
"""What every image of a played worker is said to have."""

CARD = Model(
    id="tiny",
    revision="r1",
    family="stable_diffusion",
    prediction_type="epsilon",
    width=64,
    height=32,
    size_multiple=8,
    scheduler="ddim",
    max_tokens=77,
)


class PlayedWorker(SimpleWorker):
    """RQ's own, without signals and commands."""

    job_class = SafeJob
    queue_class = SafeQueue
    death_penalty_class = TimerDeathPenalty

    def _install_signal_handlers(self) -> None: ...

    def subscribe(self) -> None: ...

    def unsubscribe(self) -> None: ...


def work(connection: Redis, generate: Callable[..., Any], model: str = "tiny") -> None:
    """Do every queued generation with a function in the place of `worker.tasks.generate`."""
    real = sys.modules.get("worker.tasks")
    sys.modules["worker.tasks"] = stand_in = ModuleType("worker.tasks")
    stand_in.generate = generate  # type: ignore[attr-defined]
    try:
        waiting = queues(model, connection)
        ids = [id for queue in waiting for id in queue.job_ids]
        worker = PlayedWorker(waiting, connection=connection, serializer=JSONSerializer)
        worker.work(burst=True, logging_level="ERROR")
        for id in ids:
            events.publish_finished(connection, id)
    finally:
        del sys.modules["worker.tasks"]
        if real is not None:
            sys.modules["worker.tasks"] = real


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app on a free port, by uvicorn in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def result(version: int, request: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A success, as a worker leaves it in Redis."""
    id = get_current_job().id  # type: ignore[union-attr]
    images = [
        Image(
            index=index,
            seed=request["seed"] + index,
            width=64,
            height=32,
            url=f"/generations/{id}/images/{index}",
            sha256=SHA256,
            media_type="image/png",
            safety=ImageSafety(applied=True),
        )
        for index in range(request["n"])
    ]
    filled = {"status": Status.SUCCEEDED, "images": images, **changed}
    done = Result(request=GenerationRequest.model_validate(request), model=CARD, **filled)
    return done.model_dump(mode="json")
