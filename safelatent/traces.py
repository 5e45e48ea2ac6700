"""OpenTelemetry traces: where they go, and how a trace crosses the queue.

Without OTEL_EXPORTER_OTLP_ENDPOINT, or without the extra `otel`, nothing is recorded. FastAPI makes
the span of a request by itself; a job carries it to the worker as W3C trace context.
"""

import logging
import os

from opentelemetry import propagate, trace

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def configure(name: str) -> None:
    """Export this process's spans as service `name`, where the environment says to."""
    if not any(os.environ.get(each) for each in ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("no traces: %s (pip install 'safelatent[otel]')", error)
        return
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def carried() -> dict[str, str]:
    """What a job takes along of the current span: `traceparent`; nothing where none is recorded."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return {name: value for name, value in carrier.items() if name == "traceparent"}
