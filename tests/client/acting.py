"""A real service, and a worker that acts: what it does with a prompt, the prompt's words say."""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image as Pillow
from redis import Redis
from rq import get_current_job

from safelatent import errors, events
from safelatent.jobs import Jobs
from safelatent.queues import queues
from safelatent.safety import LEVELS
from safelatent.schema import (
    Blocked,
    Check,
    Image,
    ImageSafety,
    Progress,
    Safety,
    SafetyEffective,
    SafetyRequest,
    Status,
    TelemetrySummary,
)
from safelatent.store import Store, image_key
from tests.service.played import CARD, SHA256, result, work

SUMMARY = TelemetrySummary(
    applied_calls=43, calls=50, cosine=0.31, undone=0.124, active=0.2, momentum=0.1, peak_call=9
)
PROGRESS = "safelatent:progress"


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", (CARD.width, CARD.height), (seed % 256, 90, 160)).save(buffer, "PNG")
    return buffer.getvalue()


class Actor:
    """`endless` prompts go on until they are cancelled, `failing` ones fail, and of those with
    `unsafe` the first image is blocked. Every other one tells three steps and succeeds."""

    def __init__(self, connection: Redis, store: Store):
        self.connection, self.store = connection, store

    def generate(self, version: int, request: dict[str, Any]) -> dict[str, Any]:
        id = get_current_job().id  # type: ignore[union-attr]
        words = request["prompt"].split()
        step = 0
        while "endless" in words or step < 3:
            step += 1
            told = Progress(step=min(step, request["steps"]), steps=request["steps"])
            events.publish_steps(self.connection, {id: told})
            if Jobs(self.connection).is_cancelled(id):
                return result(version, request, status=Status.CANCELLED, images=[])
            time.sleep(0.02)
        if "failing" in words:
            error = errors.OutOfMemory("2048 x 2048 needs 30 GB").problem
            return result(version, request, status=Status.FAILED, images=[], error=error)
        images = [self.image(id, request, index) for index in range(request["n"])]
        return result(version, request, images=images, safety=self.report(request))

    def image(self, id: str, request: dict[str, Any], index: int) -> Image:
        seed = request["seed"] + index
        here = f"/generations/{id}/images/{index}"
        self.store.put(image_key(id, index, SHA256, request["image_format"]), png(seed))
        self.store.put(image_key(id, index, SHA256, "heatmap.png"), png(0))
        acts = request["safety"]["level"] != "off"
        asked_for_map = acts and request["safety"]["telemetry"] == "heatmap"
        is_unsafe = "unsafe" in request["prompt"].split() and index == 0
        score = 0.91 if is_unsafe else 0.12
        check = Check(
            check="sd_checker",
            version="1",
            flagged=is_unsafe,
            scores={"nudity": score},
            thresholds={"nudity": 0.5},
        )
        blocked = Blocked(
            category="nudity", check="sd_checker", score=score, threshold=0.5, policy="default"
        )
        return Image(
            index=index,
            seed=seed,
            width=CARD.width,
            height=CARD.height,
            url=None if is_unsafe else here,
            sha256=SHA256,
            media_type=f"image/{request['image_format']}",
            blocked=blocked if is_unsafe else None,
            safety=ImageSafety(
                applied=acts,
                summary=SUMMARY if acts else None,
                heatmap_url=f"{here}/heatmap" if asked_for_map else None,
                checks=[check],
            ),
        )

    def report(self, request: dict[str, Any]) -> Safety:
        asked = SafetyRequest.model_validate(request["safety"])
        acts = asked.level != "off"
        return Safety(
            requested=asked,
            effective=SafetyEffective(
                level=asked.level,
                parameters=LEVELS.get(asked.level),
                concepts=asked.concepts,
                applied=acts,
                reason=None if acts else "the level is off",
                prediction_type="epsilon",
                model_revision="r1",
            ),
        )


@contextmanager
def acting(connection: Redis, store: Store) -> Iterator[None]:
    """A worker that does what comes, until the block ends."""
    actor, ended = Actor(connection, store), threading.Event()

    def loop() -> None:
        while not ended.wait(0.02):
            if any(queue.count for queue in queues(CARD.id, connection)):
                work(connection, actor.generate)

    Jobs(connection).announce("actor", CARD, ttl_s=600)
    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        for id in connection.hkeys(PROGRESS):  # what is endless ends here
            Jobs(connection).cancel(id.decode())
        thread.join(60)
