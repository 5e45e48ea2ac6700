"""What a worker shows of its work: metrics, and spans in the trace of the request."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis import Redis
from rq.job import Job
from rq.serializers import JSONSerializer

from safelatent import jobs, traces
from safelatent.jobs import Jobs
from safelatent.schema import Blocked, Check, GenerationRequest
from safelatent.store import Store
from service.app import create_app
from service.settings import Settings
from tests.conftest import Log
from tests.service.played import serving
from tests.worker.running import Bent, load, make, outcomes, spec
from worker import spans, tasks
from worker.checks import Checks
from worker.engine import Engine
from worker.families.stable_diffusion import StableDiffusion
from worker.metrics import Metrics
from worker.observing import Observer
from worker.report import Telemetry
from worker.spans import Spans

CANARY = "canary in a coal mine"


@pytest.fixture
def observer(checkpoint: Any) -> Observer:
    return Observer()


@pytest.fixture
def desk(checkpoint: Any, connection: Redis, observer: Observer, monkeypatch: Any) -> tasks.Desk:
    """A desk whose engine has no thread of its own: it steps while its slot waits."""
    engine = Engine(load(checkpoint))
    observer.watch(engine)
    desk = tasks.Desk(engine, Store("memory:///"), Jobs(connection), observer)

    def step_and_wait(futures: Any, **options: Any) -> Any:
        while not engine.is_idle:
            engine.step()
        return real_wait(futures, **options)

    real_wait = tasks.wait
    monkeypatch.setattr(tasks, "wait", step_and_wait)
    monkeypatch.setattr(tasks, "desk", desk)
    return desk


def generate(desk: tasks.Desk, monkeypatch: Any, meta: dict[str, str], **asked: Any) -> Any:
    """What a slot does with a job."""
    body = {"prompt": CANARY, "model": "tiny", "seed": 1, "steps": 12, "scheduler": "ddim", **asked}
    request = GenerationRequest.model_validate(body)
    generation = desk.jobs.submit(request, "tenant-a", carried=meta)
    job = Job.fetch(generation.id, desk.jobs.connection, serializer=JSONSerializer)
    monkeypatch.setattr(tasks, "get_current_job", lambda: job)
    return tasks.generate(**job.kwargs)


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"safelatent_{name}", labels) or 0.0


def test_a_generation_is_counted_with_its_batch_and_its_safety(desk, monkeypatch) -> None:
    generate(desk, monkeypatch, {}, n=2, safety={"level": "strong", "telemetry": "none"})
    generate(desk, monkeypatch, {}, safety={"level": "off"})
    seen = desk.observer.metrics
    ended = {"tenant": "tenant-a", "status": "succeeded", "reason": "none"}
    assert value(seen, "generations_total", **ended) == 2
    assert value(seen, "generation_attempts_total", attempt="first") == 2
    assert value(seen, "images_total", outcome="delivered") == 3
    assert value(seen, "pixels_total") == 3 * 32 * 32
    assert value(seen, "denoiser_call_rows_count") == 24
    assert value(seen, "denoiser_call_rows_sum") == 12 * (2 * 3) + 12 * 2
    assert value(seen, "phase_duration_seconds_count", phase="denoise") == 24
    for phase, calls in (("encode", 1), ("decode", 2), ("check", 2)):  # a text is encoded once
        assert value(seen, "phase_duration_seconds_count", phase=phase) == calls
    assert value(seen, "safety_requests_total", level="strong") == 1
    assert value(seen, "safety_applied_total", applied="true", reason="none") == 1
    assert value(seen, "safety_applied_total", applied="false", reason="level_off") == 1
    for strength in ("undone", "cosine"):  # whatever telemetry the caller asked for
        assert value(seen, f"safety_{strength}_ratio_count", level="strong") == 2
        assert value(seen, f"safety_{strength}_ratio_count", level="off") == 0
    assert value(seen, "images_running") == value(seen, "images_waiting") == 0


def test_a_generation_that_fails_is_counted_by_its_problem(desk, monkeypatch, log: Log) -> None:
    generate(desk, monkeypatch, {}, width=36, height=30, safety={"level": "off"})
    failed = {"tenant": "tenant-a", "status": "failed", "reason": "invalid-request"}
    assert value(desk.observer.metrics, "generations_total", **failed) == 1
    [line] = log.lines("worker.jobs")
    assert (line["level"], line["status"], line["problem"]) == (
        "error",
        "failed",
        "invalid-request",
    )


def test_a_check_that_fails_is_seen_to_fail_closed(desk, monkeypatch) -> None:
    class Broken:
        name, version = "broken", "1"

        def judge(self, pictures: list[np.ndarray]) -> list[Check]:
            raise RuntimeError("broken on purpose")

    desk.engine.checks = Checks([Broken()])
    generate(desk, monkeypatch, {}, safety={"level": "off", "checks": "report"})
    seen = desk.observer.metrics
    assert value(seen, "safety_check_errors_total", check="broken") == 1
    assert value(seen, "safety_failed_closed_images_total") == 1
    assert value(seen, "safety_blocked_images_total", category="check_failed", stage="output") == 1
    assert value(seen, "images_total", outcome="blocked") == 1


def test_a_step_that_fails_does_not_last_until_the_next(family: StableDiffusion) -> None:
    def predict(*arguments: Any) -> Any:
        raise RuntimeError("broken on purpose")

    observer, engine = Observer(), Engine(Bent(family, predict))
    observer.watch(engine)
    [failed] = outcomes(engine, [spec()])
    assert isinstance(failed, RuntimeError) and observer._step_began is None


def test_categories_and_tenants_without_number_are_other() -> None:
    metrics, unseen = Metrics(), Telemetry(0, 0, [], [], [], None)
    for i in range(60):
        why = Blocked(category=f"c{i}", check="x", score=1, threshold=0, policy="p")
        metrics.saw_image("off", 1, unseen, [], why)
        metrics.saw_generation(f"t{i}", "cancelled", "none", None)
    assert value(metrics, "safety_blocked_images_total", category="other", stage="output") == 10
    other = {"tenant": "other", "status": "cancelled", "reason": "none"}
    assert value(metrics, "generations_total", **other) == 10


def test_watching_changes_no_image(family: StableDiffusion, checkpoint: Any) -> None:
    watched = Engine(load(checkpoint))
    Observer().watch(watched)
    [theirs] = make(family, spec("max"))
    image = watched.submit(spec("max"))
    while not image.future.done():
        watched.step()
    assert torch.equal(image.future.result().latents, theirs.latents)


def test_a_job_is_one_line_with_its_ids_and_without_its_prompt(desk, monkeypatch, log: Log) -> None:
    asked = {
        "negative_prompt": f"no {CANARY}",
        "metadata": {"k": CANARY},
        "safety": {"level": "max"},
    }
    generate(desk, monkeypatch, {"request_id": "mine-7"}, **asked)
    [line] = log.lines("worker.jobs")
    assert (line["request_id"], line["tenant"], line["attempt"]) == ("mine-7", "tenant-a", 1)
    assert (line["status"], line["level"], line["safety_level"]) == ("succeeded", "info", "max")
    assert (line["applied"], line["blocked"], line["n"]) == (True, 0, 1)
    assert line["duration_s"] >= line["denoise_s"] > 0
    assert CANARY not in log.text
    desk.observer.prompts = True
    generate(desk, monkeypatch, {}, **asked)
    assert log.lines("worker.jobs")[1]["prompt"] == CANARY


def test_a_job_that_is_no_request_does_not_tell_its_prompt(desk, monkeypatch, log: Log) -> None:
    generate(desk, monkeypatch, {})
    job = tasks.get_current_job()
    wrong = {**job.kwargs["request"], "steps": CANARY}
    with pytest.raises(ValueError, match="steps") as raised:
        tasks.generate(jobs.SCHEMA_VERSION, wrong)
    assert CANARY not in str(raised.value)
    assert log.lines("worker.jobs")[-1]["status"] == "again"


@pytest.fixture
def exported(observer: Observer) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observer.spans = Spans(provider)
    yield exporter
    provider.shutdown()


def test_one_trace_goes_from_http_to_the_pictures(
    desk, monkeypatch, exported: InMemorySpanExporter, redis_url: str
) -> None:
    assert traces.carried() == {}
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", desk.observer.spans.provider)
    settings = Settings(redis_url=redis_url, model="tiny", store_url="memory:///")
    body = {"prompt": CANARY, "steps": 12}
    with serving(create_app(settings)) as url:
        id = httpx.post(f"{url}/generate", json=body, headers={"X-Request-ID": "r"}).json()["id"]
    job = Job.fetch(id, desk.jobs.connection, serializer=JSONSerializer)
    assert job.meta["request_id"] == "r"
    monkeypatch.setattr(tasks, "get_current_job", lambda: job)
    tasks.generate(**job.kwargs)
    found = exported.get_finished_spans()
    assert {"POST /generate", "queue", "denoise", "decode"} <= {span.name for span in found}
    assert len({span.context.trace_id for span in found}) == 1


def test_the_spans_of_a_generation_are_in_the_trace_of_its_request(
    desk, monkeypatch, exported: InMemorySpanExporter
) -> None:
    trace_id, request_span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    generate(desk, monkeypatch, {"traceparent": f"00-{trace_id}-{request_span}-01"}, n=2)
    found = {span.name: span for span in exported.get_finished_spans()}
    assert list(found) == ["queue", "encode", "denoise", "decode", "check", "generation"]
    for span in found.values():
        assert trace.format_trace_id(span.context.trace_id) == trace_id
        assert CANARY not in span.to_json()
    root = found["generation"]
    for name in ("queue", "generation"):
        assert trace.format_span_id(found[name].parent.span_id) == request_span
    phases = [found[name] for name in ("encode", "denoise", "decode", "check")]
    for before, after in zip(phases, phases[1:], strict=False):
        assert before.parent.span_id == root.context.span_id
        assert before.start_time <= before.end_time == pytest.approx(after.start_time, abs=1e6)
    assert root.start_time <= phases[0].start_time
    calls = [event.attributes["call"] for event in found["denoise"].events]
    assert set(calls) == {5, 10} and spans.EVERY == 5


def test_a_job_that_is_cancelled_ends_its_span(desk, exported: InMemorySpanExporter) -> None:
    job = Job.create("worker.tasks.generate", connection=desk.jobs.connection)
    job.created_at = datetime.now(UTC)
    with pytest.raises(tasks.Cancelled), desk.observer.job(job, tasks.Cancelled):
        raise tasks.Cancelled(job.id)
    *_, root = exported.get_finished_spans()
    assert root.attributes["error.type"] == "Cancelled"
    ended = {"tenant": "other", "status": "cancelled", "reason": "none"}
    assert value(desk.observer.metrics, "generations_total", **ended) == 1
