"""The worker's metrics: the batch, the phases, the images, and what safety did.

A worker is one process with one engine: one registry, on a port of its own.
"""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

from safelatent.bounded import Bounded
from safelatent.schema import Blocked, Check, Result
from worker.report import OBSERVED, Telemetry

disable_created_metrics()  # type: ignore[no-untyped-call]

TENANTS = 50
CATEGORIES = 50
"""Values of a label; whatever is beyond them is counted as "other"."""

ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
PHASE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WHOLE_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
SHARES = (-0.5, -0.25, -0.1, 0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2)
COSINES = (-0.5, -0.25, -0.1, 0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Metrics:
    """Every metric of one worker process, in a registry of its own. The `saw_` methods count."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.tenant, self.category = Bounded(TENANTS), Bounded(CATEGORIES)

        def counter(name: str, said: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"safelatent_{name}", said, labels, registry=registry)

        def gauge(name: str, said: str) -> Gauge:
            return Gauge(f"safelatent_{name}", said, registry=registry)

        def histogram(
            name: str, said: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
        ) -> Histogram:
            return Histogram(f"safelatent_{name}", said, labels, buckets=buckets, registry=registry)

        self.model = Gauge(
            "safelatent_worker_info",
            "Which model this worker holds; always 1.",
            ["model", "revision"],
            registry=registry,
        )

        # The batch.
        self.rows = histogram(
            "denoiser_call_rows", "Rows of a call of the denoiser: its batch size.", ROWS
        )
        self.phase = histogram(
            "phase_duration_seconds",
            "One encode call, one step of the whole batch (denoise), one decode call, one check.",
            PHASE_SECONDS,
            ("phase",),
        )
        self.running = gauge("images_running", "Images in the batch.")
        self.waiting = gauge("images_waiting", "Images of this worker that wait to join the batch.")
        self.slots = gauge("worker_slots", "Generations that this worker can take at once.")
        self.busy = gauge("worker_slots_busy", "Generations that this worker has taken.")

        # Generations and images.
        self.attempts = counter(
            "generation_attempts_total",
            "Generations begun: first, or again after a crash or a fault that may pass.",
            ("attempt",),
        )
        self.generations = counter(
            "generations_total",
            "Generations that ended here, by final status; reason is the problem's type or none.",
            ("tenant", "status", "reason"),
        )
        self.seconds = histogram(
            "generation_duration_seconds",
            "Of a generation that succeeded: in the queue (queue), and from there on (work).",
            WHOLE_SECONDS,
            ("part",),
        )
        self.images = counter(
            "images_total", "Finished images: delivered, or blocked by a check.", ("outcome",)
        )
        self.pixels = counter("pixels_total", "Pixels of finished images.")

        # Safety.
        self.levels = counter(
            "safety_requests_total", "Generations that succeeded, by safety level.", ("level",)
        )
        self.applied = counter(
            "safety_applied_total",
            "Whether safety changed every image of a generation; if not: level_off, or nothing "
            "crossed the threshold after the warm-up (below_threshold).",
            ("applied", "reason"),
        )
        self.undone = histogram(
            "safety_undone_ratio",
            "Of an image: mean share of the guidance that safety took back.",
            SHARES,
            ("level",),
        )
        self.cosine = histogram(
            "safety_cosine_ratio",
            "Of an image: mean cosine of the prompt's direction and the concept's.",
            COSINES,
            ("level",),
        )
        self.blocked = counter(
            "safety_blocked_images_total",
            "Images that were withheld, by category and stage.",
            ("category", "stage"),
        )
        self.check_errors = counter(
            "safety_check_errors_total", "Verdicts that a check could not give.", ("check",)
        )
        self.failed_closed = counter(
            "safety_failed_closed_images_total",
            "Images that were withheld because a check could not judge them.",
        )

    def saw_image(
        self,
        level: str,
        pixels: int,
        telemetry: Telemetry,
        checks: list[Check],
        why: Blocked | None,
    ) -> None:
        """One finished image, whatever telemetry its caller asked for."""
        self.images.labels("blocked" if why else "delivered").inc()
        self.pixels.inc(pixels)
        applied = [telemetry.numbers[place] for place in telemetry.applied]
        for name, into in (("undone", self.undone), ("cosine", self.cosine)):
            if applied:
                column = OBSERVED.index(name)
                into.labels(level).observe(sum(call[column] for call in applied) / len(applied))
        for check in checks:
            if check.error is not None:
                self.check_errors.labels(check.check).inc()
        if why is not None:
            self.blocked.labels(self.category(why.category), why.stage).inc()
            if why.category == "check_failed":
                self.failed_closed.inc()

    def saw_generation(
        self, tenant: str | None, status: str, reason: str, result: Result | None
    ) -> None:
        """One generation that has ended."""
        self.generations.labels(self.tenant(tenant), status, reason).inc()
        if result is None or result.safety is None or result.timings is None:
            return
        self.seconds.labels("queue").observe(result.timings.queue_s)
        self.seconds.labels("work").observe(result.timings.total_s)
        effective = result.safety.effective
        self.levels.labels(effective.level).inc()
        if effective.applied:
            self.applied.labels("true", "none").inc()
        elif effective.level == "off":
            self.applied.labels("false", "level_off").inc()
        else:
            self.applied.labels("false", "below_threshold").inc()
