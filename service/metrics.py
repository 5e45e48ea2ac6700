"""The frontend's metrics: what HTTP was asked and what it answered, and what waits in Redis.

One process has one registry. A frontend is one process and scales by replicas, and each of them is
scraped by itself; what it reads from Redis is the same at all of them.
"""

import time
from collections import Counter as Counts
from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from safelatent.bounded import Bounded
from safelatent.deliveries import ATTEMPT_OUTCOMES
from safelatent.errors import QueueUnavailable
from safelatent.jobs import Jobs

disable_created_metrics()  # type: ignore[no-untyped-call]

MODELS = 50
TENANTS = 50
"""Values of a label; whatever is beyond them is counted as "other"."""
VERSIONS = 10
"""The same, of schema versions."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Every metric of one frontend, in a registry of its own."""

    def __init__(self, jobs: Jobs):
        self.registry = registry = CollectorRegistry()
        self.model, self.tenant = Bounded(MODELS), Bounded(TENANTS)
        self.requests = Counter(
            "safelatent_http_requests_total",
            "Requests that were answered, by the template of their route.",
            ["method", "route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "safelatent_http_request_duration_seconds",
            "From a request's head to the end of its answer. Waiting and streams count in full.",
            ["method", "route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "safelatent_http_requests_in_flight",
            "Requests that are being answered, streams among them.",
            registry=registry,
        )
        self.rejected = Counter(
            "safelatent_http_rejected_total",
            "Answers that were a problem, by the last part of its type.",
            ["reason"],
            registry=registry,
        )
        self.submitted = Counter(
            "safelatent_generations_submitted_total",
            "Generations that were accepted (a request that repeats one counts too).",
            ["model", "tenant", "level"],
            registry=registry,
        )
        registry.register(Backlog(jobs, self.model))

    def saw_submitted(self, model: str | None, tenant: str, level: str) -> None:
        self.submitted.labels(self.model(model), self.tenant(tenant), level).inc()


class Backlog:
    """What stands in Redis, read anew by each scrape. Without Redis only `redis_up` is left."""

    def __init__(self, jobs: Jobs, model: Bounded):
        self.jobs = jobs
        self.model = model
        self.version = Bounded(VERSIONS)

    def describe(self) -> list[Metric]:
        return list(self._families().values())

    def _families(self) -> dict[str, GaugeMetricFamily | CounterMetricFamily]:
        gauges = {
            name: GaugeMetricFamily(f"safelatent_{name}", said, labels=labels)
            for name, said, labels in (
                ("redis_up", "1 while Redis answers this frontend, else 0.", []),
                ("queue_jobs", "Generations that wait for a worker.", ["model", "priority"]),
                (
                    "queue_oldest_age_seconds",
                    "How long the generation that is next in its queue has been waiting.",
                    ["model", "priority"],
                ),
                ("workers", "Worker processes that hold the model warm.", ["model"]),
                ("slots", "Generations that these workers can take at once.", ["model"]),
            )
        }
        counters = {
            name: CounterMetricFamily(f"safelatent_{name}", said, labels=labels)
            for name, said, labels in (
                (
                    "webhook_attempts",
                    "Calls of webhooks by what became of them: delivered, retried or failed.",
                    ["outcome"],
                ),
                (
                    "parked_generations",
                    "Times that a worker set a generation aside whose schema version it does not "
                    "know.",
                    ["version"],
                ),
            )
        }
        return gauges | counters

    def collect(self) -> Iterator[Metric]:
        families = self._families()
        try:
            backlog, workers = self.jobs.backlog(), self.jobs.loaded()
            slots = self.jobs.slots()
            attempts, parked = self.jobs.webhook_attempts(), self.jobs.parked()
        except QueueUnavailable:
            families["redis_up"].add_metric([], 0)
            yield families["redis_up"]
            return
        families["redis_up"].add_metric([], 1)
        now = time.time()
        for (model, priority), (count, since) in backlog.items():
            labels = [self.model(model), priority]
            families["queue_jobs"].add_metric(labels, count)
            age = max(0.0, now - since.timestamp()) if since else 0.0
            families["queue_oldest_age_seconds"].add_metric(labels, age)
        for name, counts in (("workers", workers), ("slots", slots)):
            for model, count in counts.items():
                families[name].add_metric([self.model(model)], count)
        for outcome in ATTEMPT_OUTCOMES:  # from 0, so that the first one is seen as a rise
            families["webhook_attempts"].add_metric([outcome], attempts.get(outcome, 0))
        by_version: Counts[str] = Counts()
        for version, count in parked.items():
            by_version[self.version(version)] += count
        for version, count in by_version.items():
            families["parked_generations"].add_metric([version], count)
        yield from families.values()
