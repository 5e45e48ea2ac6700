"""The function that RQ calls: a request of the contract in, the engine's work, a result out."""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from redis.exceptions import RedisError
from rq import get_current_job
from rq.timeouts import JobTimeoutException

from safelatent import errors, events
from safelatent.jobs import KEPT_S, TIMEOUT_S, Jobs
from safelatent.safety import SafetyParameters, why_it_cannot_act
from safelatent.schema import (
    SCHEMA_VERSION,
    Blocked,
    Check,
    FieldError,
    GenerationRequest,
    Image,
    ImageSafety,
    Problem,
    Result,
    Safety,
    SafetyEffective,
    SafetyRequest,
    Status,
    Timings,
)
from safelatent.store import Store, image_key
from worker import pictures
from worker.engine import Engine, ImageSpec, Made
from worker.engine import Image as RunningImage
from worker.isolation import Isolation
from worker.leases import ATTEMPTS
from worker.meter import Meter
from worker.observing import Observer

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
MEDIA_TYPE = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


def generate(version: int, request: dict[str, Any]) -> dict[str, Any]:
    """Make one generation. The only function that a worker runs; raises what RQ should retry.

    What the caller or the model did wrong is no exception here but a result of status `failed`.
    """
    job = get_current_job()
    assert job is not None and desk is not None, "generate runs in a slot of a started worker"
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"this worker knows schema version {SCHEMA_VERSION}, the job has {version}"
        )
    created_at = job.created_at.replace(tzinfo=UTC)
    if job.started_at:
        with unheard(job.id):
            events.publish_started(desk.jobs.connection, job.id, job.started_at)
    with desk.observer.job(job, Cancelled) as watched:
        asked = GenerationRequest.model_validate(request)
        watched.result = desk.generate(job.id, asked, created_at)
    return watched.result.model_dump(mode="json")


class Desk:
    """What the slots of one worker process share: its engine, its store, its jobs at work."""

    def __init__(self, engine: Engine, store: Store, jobs: Jobs, observer: Observer | None = None):
        self.engine = engine
        self.store = store
        self.jobs = jobs
        self.observer = observer or Observer()
        self.meter = Meter()
        self.isolation = Isolation()
        self.is_sure: Callable[[], bool] = lambda: True
        """Whether our leases are good; while it says no, nothing is announced."""
        self._lock = threading.Lock()
        self._begun: set[int] = set()
        self._images: dict[int, tuple[str, list[RunningImage]]] = {}
        """What the engine makes now, by the thread that waits for it: after a lease was lost, two
        threads may be at one generation."""
        self._cancelled: set[str] = set()

    def cancel(self, id: str) -> None:
        """Stop a generation of this process before its next step."""
        with self._lock:
            self._cancelled.add(id)
            for owner, images in self._images.values():
                if owner == id:
                    for image in images:
                        image.cancel()

    def abandon(self, thread: int) -> None:
        """Stop what one thread waits for: another worker does it now."""
        with self._lock:
            for image in self._images.get(thread, ("", []))[1]:
                image.cancel()

    def has_begun(self, thread: int) -> bool:
        """Whether an attempt was counted for what this thread is at."""
        return thread in self._begun

    def generate(self, id: str, request: GenerationRequest, created_at: datetime) -> Result:
        """Make every image of a request, judge, store and report.

        A fault that may pass is raised, for RQ to try again; any other ends the generation here.
        """
        queue_s, attempts = _age_s(created_at), self._attempts(id)
        self.observer.attempt(attempts)
        request = self._complete(request)
        try:
            return self._attempt(id, request, queue_s, attempts)
        except (Cancelled, RedisError):
            raise
        except errors.ServiceError as error:
            if attempts + 1 < MAX_ATTEMPTS:
                self.isolation.leave()  # it counts as another attempt in any case
                time.sleep(2**attempts)
                raise
            problem = error.problem
        except errors.SafelatentError as error:
            problem = error.problem
        except JobTimeoutException:
            problem = errors.DeadlineExceeded(f"it ran for {TIMEOUT_S} s and was stopped").problem
        except Exception:
            log.exception("generation %s failed", id)
            problem = errors.InternalError("the worker failed; its log says more").problem
        finally:
            with self._lock:
                self._cancelled.discard(id)
            self._begun.discard(threading.get_ident())
        return self._failed(request, problem)

    def overdue(self, id: str, request: GenerationRequest, created_at: datetime) -> Result | None:
        """How a generation ends that was not begun before its deadline; None for any other."""
        late = _late(request, _age_s(created_at))
        if late is None or self._attempts(id):
            return None
        return self._failed(self._complete(request), late.problem)

    def _failed(self, request: GenerationRequest, problem: Problem) -> Result:
        model = self.engine.family.model
        return Result(status=Status.FAILED, request=request, model=model, error=problem)

    def _attempts(self, id: str) -> int:
        return int(self.jobs.connection.get(ATTEMPTS.format(id)) or 0)

    def _attempt(
        self, id: str, request: GenerationRequest, queue_s: float, attempts: int
    ) -> Result:
        started = time.monotonic()
        if attempts >= MAX_ATTEMPTS:
            raise errors.WorkerCrashed(
                f"{attempts} worker processes ended while this generation ran; it is given up"
            )
        if not attempts and (late := _late(request, queue_s)):
            raise late
        self._check(request)
        self.isolation.enter(alone=attempts > 0)
        self._count_attempt(id)
        made, images = self._make(id, request)
        result = self._report(request, made, images)
        result.timings = _timings(queue_s, time.monotonic() - started, made)
        return result

    def _complete(self, request: GenerationRequest) -> GenerationRequest:
        """The request as effective: what it left open, filled in from the model."""
        model = self.engine.family.model
        return request.model_copy(
            update={
                "model": model.id,
                "width": request.width or model.width,
                "height": request.height or model.height,
                "scheduler": request.scheduler or model.scheduler,
            }
        )

    def _check(self, request: GenerationRequest) -> None:
        """What only the holder of the model can know; a stale frontend may have let it pass."""
        multiple = self.engine.family.model.size_multiple
        for field in ("width", "height"):
            value = getattr(request, field)
            if value % multiple:
                raise invalid(field, value, f"is no multiple of {multiple}, the VAE's factor")
        assert request.scheduler is not None
        try:
            self.engine.family.scheduler(request.scheduler, request.steps)
        except Exception as error:
            message = f"cannot be taken by {request.scheduler}: {error}"
            raise invalid("steps", request.steps, message) from error
        if parameters := request.safety.effective_parameters():
            why = why_it_cannot_act(
                parameters,
                request.safety.concepts,
                request.negative_prompt,
                request.guidance_scale,
                request.steps,
                request.scheduler,
            )
            if why:
                raise errors.SafetyCannotAct(why)

    def _count_attempt(self, id: str) -> None:
        key = ATTEMPTS.format(id)
        with self.jobs.connection.pipeline() as pipeline:
            pipeline.incr(key)
            pipeline.expire(key, KEPT_S)
            pipeline.execute()
        self._begun.add(threading.get_ident())

    def _make(self, id: str, request: GenerationRequest) -> tuple[list[Made], list[Image]]:
        """Make the images, and deliver and announce each as soon as it is done."""
        with self._lock:
            images = [self.engine.submit(spec, owner=id) for spec in _specs(request)]
            self._images[threading.get_ident()] = id, images
            if id in self._cancelled:
                for image in images:
                    image.cancel()
        made: dict[int, Made] = {}
        delivered: dict[int, Image] = {}
        pending = {image.future: index for index, image in enumerate(images)}
        try:
            while pending:
                # In short waits, so that RQ's timeout can be raised in this thread.
                for future in wait(pending, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    index = pending.pop(future)
                    made[index] = future.result()
                    delivered[index] = self._deliver(id, request, index, made[index])
                    self._announce(id, delivered[index])
            order = range(request.n)
            return [made[i] for i in order], [delivered[i] for i in order]
        except CancelledError as error:
            raise Cancelled(id) from error
        finally:
            with self._lock:
                del self._images[threading.get_ident()]
            for image in images:
                image.cancel()

    def _announce(self, id: str, image: Image) -> None:
        if not self.is_sure():
            return  # somebody else may be at it
        # Telemetry by steps is long, and the end has it.
        safety = image.safety.model_copy(update={"steps": None})
        short = image.model_copy(update={"safety": safety})
        job = get_current_job()
        kept_s = job.result_ttl if job else None
        with unheard(id):
            events.publish_image(self.jobs.connection, id, short, kept_s or KEPT_S)

    def _report(
        self, request: GenerationRequest, made: Sequence[Made], images: list[Image]
    ) -> Result:
        model = self.engine.family.model
        applied = all(image.safety.applied for image in images)
        parameters = request.safety.effective_parameters()
        reason = None
        if parameters is None:
            reason = "level is off"
        elif not applied:
            reason = "no element crossed the threshold after the warm-up"
        texts = [request.prompt, request.negative_prompt]
        texts += request.safety.concepts if parameters else []
        reports = [self.engine.family.read(text) for text in texts]
        return Result(
            status=Status.SUCCEEDED,
            request=request,
            model=model,
            images=images,
            safety=Safety(
                requested=request.safety,
                effective=SafetyEffective(
                    level=request.safety.level,
                    parameters=parameters,
                    concepts=request.safety.concepts if parameters else [],
                    applied=applied,
                    reason=reason,
                    warmup_share=_warmup_share(parameters, made[0]) if parameters else None,
                    prediction_type=model.prediction_type,
                    model_revision=model.revision,
                    texts=[report for report in reports if report.dropped or report.unknown],
                ),
            ),
        )

    def _deliver(self, id: str, request: GenerationRequest, index: int, made: Made) -> Image:
        """Store an image unless a check withholds it, and say what was seen on it."""
        assert request.seed is not None
        safety = ImageSafety(applied=bool(made.telemetry.applied), checks=made.checks)
        wanted = request.safety.telemetry
        if wanted != "none":
            safety.summary = made.telemetry.summary()
        if wanted in ("steps", "heatmap") and made.telemetry.seen:
            safety.steps = made.telemetry.steps()
        blocked = _blocked(made.checks, request.safety)
        self.observer.image(request, made, blocked)
        height, width = made.pixels.shape[:2]
        image = Image(
            index=index,
            seed=request.seed + index,
            width=width,
            height=height,
            blocked=blocked,
            safety=safety,
        )
        url = f"/generations/{id}/images/{index}"
        if blocked is not None:
            return image  # nor its heat map: that shows the picture's outlines
        content = pictures.encode(made.pixels, request.image_format)
        image.sha256 = hashlib.sha256(content).hexdigest()
        if wanted == "heatmap" and made.telemetry.heat is not None and made.telemetry.seen:
            heat = pictures.heatmap(made.telemetry.heat)
            self.store.put(image_key(id, index, image.sha256, "heatmap.png"), heat)
            safety.heatmap_url = f"{url}/heatmap"
        self.store.put(image_key(id, index, image.sha256, request.image_format), content)
        image.url = url
        image.media_type = MEDIA_TYPE[request.image_format]
        return image


desk: Desk | None = None
"""Of this process; `worker.process` sets it before the first slot starts."""


class Cancelled(Exception):
    """Raised out of `generate` when its generation was cancelled; RQ marks the job stopped."""


@contextmanager
def unheard(id: str) -> Iterator[None]:
    """An event that cannot be published costs no generation: its end says all."""
    try:
        yield
    except RedisError as error:
        log.warning("an event of generation %s is not published: %s", id, error)


def _age_s(created_at: datetime) -> float:
    return max(0.0, (datetime.now(UTC) - created_at).total_seconds())


def _late(request: GenerationRequest, queue_s: float) -> errors.DeadlineExceeded | None:
    """What to say of a request that has waited for longer than it may."""
    if request.deadline_s is None or queue_s <= request.deadline_s:
        return None
    return errors.DeadlineExceeded(
        f"it waited {queue_s:.1f} s, and its deadline_s is {request.deadline_s:g}"
    )


def invalid(field: str, value: Any, message: str) -> errors.InvalidRequest:
    """InvalidRequest for one field."""
    return errors.InvalidRequest(
        f"{field} {value} {message}",
        errors=[FieldError(field=field, message=message, value=value)],
    )


def _specs(request: GenerationRequest) -> list[ImageSpec]:
    assert request.seed is not None and request.scheduler is not None
    assert request.width is not None and request.height is not None
    parameters = request.safety.effective_parameters()
    return [
        ImageSpec(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=request.seed + index,
            width=request.width,
            height=request.height,
            scheduler=request.scheduler,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            safety=parameters,
            concepts=tuple(request.safety.concepts) if parameters else (),
            heatmap=request.safety.telemetry == "heatmap" and parameters is not None,
        )
        for index in range(request.n)
    ]


def _blocked(checks: Sequence[Check], safety: SafetyRequest) -> Blocked | None:
    """Why an image is withheld. A check that could not judge blocks whatever the policy."""
    for check in checks:
        if check.error is not None:
            category, score, threshold = "check_failed", None, None
        elif check.flagged and safety.checks == "block":
            category = max(check.scores, key=lambda c: check.scores[c] - check.thresholds[c])
            score, threshold = check.scores[category], check.thresholds[category]
        else:
            continue
        return Blocked(
            category=category,
            check=check.check,
            score=score,
            threshold=threshold,
            policy=f"checks={safety.checks}",
        )
    return None


def _timings(queue_s: float, total_s: float, made: Sequence[Made]) -> Timings:
    """An image waits for the slowest of its generation, so each phase is its longest."""
    return Timings(
        queue_s=queue_s,
        encode_s=max(one.encode_s for one in made),
        denoise_s=max(one.denoise_s for one in made),
        decode_s=max(one.decode_s for one in made),
        check_s=max(one.check_s for one in made),
        total_s=total_s,
    )


def _warmup_share(parameters: SafetyParameters, made: Made) -> float:
    return min(1.0, parameters.warmup_steps / made.telemetry.calls)
