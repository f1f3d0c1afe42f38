"""Events as OpenTelemetry spans and metrics (extra `otel`)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import MeterProvider
from opentelemetry.sdk import metrics as sdk_metrics
from opentelemetry.sdk import trace as sdk_trace
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Status, StatusCode, TracerProvider

from batchllm_celery import events
from batchllm_celery.events import Event


class OpenTelemetryListener:
    """One span per item (its times, tokens, failure kind) and the metrics of the fleet.

    Args:
        tracer_provider: default the global one.
        meter_provider: default the global one.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        self._owned: list[Callable[[], object]] = []
        self._tracer = trace.get_tracer("batchllm_celery", tracer_provider=tracer_provider)
        meter = metrics.get_meter("batchllm_celery", meter_provider=meter_provider)
        self._items = meter.create_counter("batchllm.items", description="Items with an outcome")
        self._tokens = meter.create_counter("gen_ai.client.token.usage", unit="{token}")
        self._refusals = meter.create_counter("batchllm.rate_limits")
        self._attempts = meter.create_counter("batchllm.attempt_failures")

    def close(self) -> None:
        """Send what has not been sent, if the providers are our own; idempotent."""
        for shut_down in self._owned:
            shut_down()
        self._owned = []

    def __call__(self, event: Event) -> None:
        """Record `event`."""
        if isinstance(event, events.ItemFinished):
            self._item_finished(event)
        elif isinstance(event, events.AttemptFailed):
            self._attempts.add(1, {"kind": event.kind.value})
        elif isinstance(event, events.RateLimitHit):
            self._refusals.add(1, {"quota": event.quota})

    def _item_finished(self, event: events.ItemFinished) -> None:
        outcome = "ok" if event.kind is None else event.kind.value
        self._items.add(1, {"outcome": outcome})
        self._tokens.add(event.input_tokens, {"gen_ai.token.type": "input"})
        self._tokens.add(event.output_tokens, {"gen_ai.token.type": "output"})
        # The event comes when the item is over, so its span is written with a start in the past.
        end = time.time_ns()
        span = self._tracer.start_span(
            "batchllm.item",
            start_time=end - int(event.seconds * 1e9),
            attributes={
                "batchllm.batch_id": event.batch_id,
                "batchllm.item_id": event.item_id,
                "batchllm.attempts": event.attempts,
                "gen_ai.usage.input_tokens": event.input_tokens,
                "gen_ai.usage.output_tokens": event.output_tokens,
            },
        )
        if event.kind is not None:
            span.set_attribute("error.type", event.kind.value)
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_time=end)


def open_listener() -> OpenTelemetryListener:
    """A listener that sends by OTLP over HTTP, as OpenTelemetry's own `OTEL_...` variables say.

    Providers that are set up in this process already (by `opentelemetry-instrument` or a module of
    yours) are used as they are.
    """
    if isinstance(trace.get_tracer_provider(), sdk_trace.TracerProvider):
        return OpenTelemetryListener()
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    resource = Resource.create({} if named else {"service.name": "batchllm-worker"})
    tracers = sdk_trace.TracerProvider(resource=resource)
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    meters = sdk_metrics.MeterProvider([reader], resource=resource)
    listener = OpenTelemetryListener(tracers, meters)
    listener._owned = [tracers.shutdown, meters.shutdown]
    return listener
