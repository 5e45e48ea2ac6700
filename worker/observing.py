"""What a worker lets others see of its work: metrics, one line of the log a job, spans.

The engine knows nothing of it. `Observer.watch` times the calls that the engine makes into its
model and its checks, and a job is observed from around it, in the thread of its slot.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rq.job import Job

from safelatent import logs
from safelatent.schema import Blocked, GenerationRequest, Result, Status
from worker.engine import Engine, Image, Made
from worker.metrics import Metrics
from worker.spans import Spans

log = logging.getLogger("worker.jobs")


@dataclass
class Watched:
    """A job that is being observed, and what came of it."""

    result: Result | None = None


class Observer:
    """All that one worker process shows."""

    def __init__(self, prompts: bool = False):
        """`prompts` lets the line of a job have its prompt."""
        self.metrics = Metrics()
        self.spans = Spans()
        self.prompts = prompts
        self._step_began: float | None = None

    def watch(self, engine: Engine) -> None:
        """Time an engine's calls. A step is from its first call of the denoiser to its end, because
        a GPU is still at work when a call returns."""
        family, checks, seconds = engine.family, engine.checks, self.metrics.phase
        self.metrics.model.labels(family.model.id, family.model.revision).set(1)
        for place, name, phase in (
            (family, "encode", "encode"),
            (family, "decode", "decode"),
            (checks, "judge", "check"),
        ):
            setattr(place, name, _timed(getattr(place, name), seconds.labels(phase)))
        predict, rows, step = family.predict, self.metrics.rows, seconds.labels("denoise")

        def counted(latents: Any, *rest: Any) -> Any:
            if self._step_began is None:
                self._step_began = time.perf_counter()
            rows.observe(len(latents))
            try:
                return predict(latents, *rest)
            except Exception:
                self._step_began = None  # the step may have no end, and the next one's is far off
                raise

        after_step = engine.after_step

        def ended(images: Sequence[Image]) -> None:
            if self._step_began is not None:
                step.observe(time.perf_counter() - self._step_began)
                self._step_began = None
            self.spans.after_step(images)
            after_step(images)

        setattr(family, "predict", counted)  # noqa: B010
        engine.after_step = ended
        self.metrics.running.set_function(lambda: len(engine.running))
        self.metrics.waiting.set_function(lambda: len(engine.waiting))

    def watch_slots(self, total: int, busy: Callable[[], int]) -> None:
        self.metrics.slots.set(total)
        self.metrics.busy.set_function(busy)

    @contextmanager
    def job(self, job: Job, cancelled: type[Exception]) -> Iterator[Watched]:
        """Around a job, in its own thread: all that it logs has its ids.

        One that raises is done `again` by RQ, unless what it raises says that it was `cancelled`.
        """
        tenant, request_id = job.meta.get("tenant"), job.meta.get("request_id")
        watched, began, status = Watched(), time.perf_counter(), "again"
        with logs.bound(generation_id=job.id, tenant=tenant, request_id=request_id, attempt=0):
            try:
                with self.spans.job(job):
                    yield watched
                    assert watched.result is not None
                    status = watched.result.status
                    self.spans.finish(job.id, watched.result)
            except cancelled:
                status = "cancelled"
                raise
            finally:
                self._tell(tenant, status, watched.result, time.perf_counter() - began)

    def attempt(self, before: int) -> None:
        """An attempt begins, after so many others."""
        self.metrics.attempts.labels("again" if before else "first").inc()
        logs.bind(attempt=before + 1)

    def image(self, request: GenerationRequest, made: Made, blocked: Blocked | None) -> None:
        height, width = made.pixels.shape[:2]
        level = request.safety.level
        self.metrics.saw_image(level, height * width, made.telemetry, made.checks, blocked)

    def _tell(self, tenant: str | None, status: str, result: Result | None, seconds: float) -> None:
        said: dict[str, Any] = {"status": status, "duration_s": round(seconds, 6)}
        reason = "none"
        if result is not None:
            request = result.request
            said |= {"safety_level": request.safety.level, "n": request.n, "steps": request.steps}
            if result.error:
                reason = said["problem"] = result.error.type.rpartition("/")[2]
            if result.safety:
                said["applied"] = result.safety.effective.applied
                said["blocked"] = sum(image.blocked is not None for image in result.images)
            if result.timings:
                said |= {k: round(v, 6) for k, v in result.timings.model_dump().items()}
            if self.prompts:
                said |= {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
        if status != "again":
            self.metrics.saw_generation(tenant, status, reason, result)
        level = logging.ERROR if status == Status.FAILED else logging.INFO
        log.log(level, "job", extra=said)


def _timed(call: Callable[..., Any], seconds: Any) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        with seconds.time():
            return call(*arguments)

    return timed
