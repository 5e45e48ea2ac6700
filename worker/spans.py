"""Spans of a generation on the worker: queue, then encode, denoise, decode and check.

The phases belong to a batch that many generations share, so their spans are made when a generation
has ended, from the times that its images took down. Where nothing is recorded, nothing is kept.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, StatusCode
from rq.job import Job

from safelatent.schema import Result
from worker.engine import Image

EVERY = 5
"""Of the denoiser's calls, this many make one event."""


@dataclass
class _Times:
    """Of one generation, by the monotonic clock: its first image's encoding to its last step."""

    encoding: float = 0.0
    joined: float = 0.0
    stepped: float = 0.0
    calls: list[tuple[int, float]] = field(default_factory=list)


class Spans:
    def __init__(self, provider: trace.TracerProvider | None = None):
        self.provider = provider or trace.get_tracer_provider()
        self._tracer = self.provider.get_tracer("safelatent.worker")
        self._times: dict[str, _Times] = {}

    @contextmanager
    def job(self, job: Job) -> Iterator[None]:
        """The span of a job, in the trace of the request that queued it."""
        parent = propagate.extract({"traceparent": str(job.meta.get("traceparent", ""))})
        created, now = job.created_at.timestamp(), time.time()
        self._span("queue", created, now, parent)
        with self._tracer.start_as_current_span(
            "generation",
            parent,
            SpanKind.CONSUMER,
            {"safelatent.generation_id": job.id},
            record_exception=False,  # its message may quote a request
            set_status_on_exception=False,
        ) as span:
            if span.is_recording():
                self._times[job.id] = _Times()
            try:
                yield
            except Exception as error:
                span.set_status(StatusCode.ERROR)
                span.set_attribute("error.type", type(error).__name__)
                raise
            finally:
                self._times.pop(job.id, None)

    def after_step(self, images: Sequence[Image]) -> None:
        """Take down where images are, in the engine's thread."""
        if not self._times:
            return
        now = time.monotonic()
        for image in images:
            if times := self._times.get(image.owner):
                if not times.joined:
                    times.encoding, times.joined = image.joined_at - image.encode_s, image.joined_at
                times.stepped = now
                if image.call % EVERY == 0:
                    times.calls.append((image.call, now))

    def finish(self, id: str, result: Result) -> None:
        """Make the spans of the phases of a generation that has ended."""
        times = self._times.get(id)
        if times is None or not times.joined or result.timings is None:
            return
        epoch = time.time() - time.monotonic()
        decoded = times.stepped + result.timings.decode_s
        calls = [(call, epoch + at) for call, at in times.calls]
        for name, start, end, events in (
            ("encode", times.encoding, times.joined, []),
            ("denoise", times.joined, times.stepped, calls),
            ("decode", times.stepped, decoded, []),
            ("check", decoded, decoded + result.timings.check_s, []),
        ):
            self._span(name, epoch + start, epoch + end, events=events)

    def _span(
        self,
        name: str,
        start: float,
        end: float,
        parent: Context | None = None,
        events: Sequence[tuple[int, float]] = (),
    ) -> None:
        span = self._tracer.start_span(name, parent, start_time=_nanoseconds(start))
        for call, at in events:
            span.add_event("step", {"call": call}, _nanoseconds(at))
        span.end(_nanoseconds(end))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
