"""Listeners: metrics with batch-llm's names, log lines, Prometheus, OpenTelemetry, observers."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest

from batchllm_celery import events
from batchllm_celery.compat import observers
from batchllm_celery.compat.metrics import MetricsObserver
from batchllm_celery.compat.observers import ObserverFeed, ProcessingEvent
from batchllm_celery.errors import FailureKind
from batchllm_celery.events import Event, Events
from batchllm_celery.observability import LogListener
from batchllm_celery.observability.logging import _LINES, line_of
from batchllm_celery.observability.otel import OpenTelemetryListener
from batchllm_celery.observability.prometheus import PrometheusListener


def finished(kind: FailureKind | None = None, error_type: str | None = None) -> Event:
    return events.ItemFinished(
        "b", "item 1", kind is None, kind, 2, 1.5, 100, 20, 80, 0.25, error_type
    )


STORY: list[Event] = [
    events.ItemStarted("b", "item 1"),
    events.RateLimitHit("q", 2.0),
    events.CooldownStarted("q", 1, 2.0, 1),
    events.CooldownEnded("q", 1, 2.0),
    finished(),
    finished(FailureKind.LOGIC_ERROR, 'Value"Error'),
]


def told() -> MetricsObserver:
    metrics = MetricsObserver()
    for event in STORY:
        metrics(event)
    return metrics


def test_metrics_count_items_errors_and_cooldowns() -> None:
    """Names and meaning are batch-llm's; each is an attribute too (B2)."""
    metrics = told()
    assert metrics.get_metrics() == {
        "items_processed": 2,
        "items_succeeded": 1,
        "items_failed": 1,
        "rate_limits_hit": 1,
        "total_cooldown_time": 2.0,
        "processing_times": [1.5],
        "error_counts": {'Value"Error': 1},
        "avg_processing_time": 1.5,
        "success_rate": 0.5,
    }
    assert metrics.items_failed == 1
    with pytest.raises(AttributeError):
        _ = metrics.nothing_of_that_name


async def test_metrics_may_be_awaited_as_in_batch_llm() -> None:
    """`await metrics.get_metrics()` and `metrics.get_metrics()` are the same."""
    metrics = told()
    assert await metrics.get_metrics() == metrics.get_metrics()
    assert await metrics.export_json() == metrics.export_json()


def test_reset_begins_at_zero() -> None:
    """Nothing of the story before is left."""
    metrics = told()
    metrics.reset()
    assert metrics.get_metrics() == MetricsObserver().get_metrics()
    assert metrics.items_processed == 0


def test_exports_are_json_and_a_dict_without_the_list_of_times() -> None:
    """A million processing times are a number in an export."""
    metrics = told()
    exported = metrics.export_dict()
    assert exported["processing_times_count"] == 1
    assert "processing_times" not in exported
    assert json.loads(metrics.export_json()) == exported


def test_the_prometheus_export_has_types_and_escaped_labels() -> None:
    """Any scraper reads it."""
    lines = told().export_prometheus().splitlines()
    assert "# TYPE batch_llm_items_processed counter" in lines
    assert "batch_llm_items_processed 2" in lines
    assert "# TYPE batch_llm_success_rate gauge" in lines
    assert "batch_llm_success_rate 0.5" in lines
    assert 'batch_llm_errors_total{error_type="Value\\"Error"} 1' in lines


def test_log_lines_are_a_name_and_fields(caplog: pytest.LogCaptureFixture) -> None:
    """Absent fields are left out, and one event is one line whatever an item is called."""
    failed = events.AttemptFailed(
        "b", "two\nlines", 1, FailureKind.CONNECTION, "ConnectionError", 2.13
    )
    with caplog.at_level(logging.INFO, logger="batchllm_celery"):
        LogListener()(failed)
        LogListener()(finished())  # DEBUG: not shown
    assert caplog.messages == [
        'item.attempt_failed batch_id=b item_id="two\\nlines" attempt=1 kind=connection '
        "error_type=ConnectionError wait=2.13"
    ]


def test_every_event_has_a_line() -> None:
    """A new event must be given its name and level."""
    kinds = {kind for kind in vars(events).values() if isinstance(kind, type)}
    wanted = {kind for kind in kinds if issubclass(kind, Event) and kind is not Event}
    assert set(_LINES) == wanted


def test_fields_that_are_none_are_left_out() -> None:
    """A success has neither kind nor error type."""
    assert "kind=" not in line_of(finished())


def test_prometheus_counts_outcomes_tokens_and_cost() -> None:
    """Under our own names, with labels."""
    registry = CollectorRegistry()
    listener = PrometheusListener(registry)
    for event in STORY:
        listener(event)
    text = generate_latest(registry).decode()
    assert 'batchllm_items_total{kind="",outcome="succeeded"} 1.0' in text
    assert 'batchllm_items_total{kind="logic_error",outcome="failed"} 1.0' in text
    assert 'batchllm_tokens_total{direction="cached_input"} 160.0' in text
    assert "batchllm_cost_dollars_total 0.5" in text
    assert 'batchllm_cooldown_seconds_total{quota="q"} 2.0' in text


def test_opentelemetry_gets_a_span_and_counts_per_item() -> None:
    """The span covers the item's time and carries its tokens, never its text."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    listener = OpenTelemetryListener(tracers, meters)
    for event in STORY:
        listener(event)
    good, bad = exporter.get_finished_spans()
    assert good.end_time is not None
    assert good.start_time is not None
    assert (good.end_time - good.start_time) / 1e9 == pytest.approx(1.5)
    assert good.attributes is not None
    assert good.attributes["gen_ai.usage.input_tokens"] == 100
    assert bad.attributes is not None
    assert bad.attributes["error.type"] == "logic_error"
    data = reader.get_metrics_data()
    assert data is not None
    assert {m.name for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics} == {
        "batchllm.items",
        "gen_ai.client.token.usage",
        "batchllm.rate_limits",
    }
    tracers.shutdown()
    meters.shutdown()


class Collects:
    def __init__(self) -> None:
        self.seen: list[tuple[ProcessingEvent, dict[str, Any]]] = []

    async def on_event(self, event: ProcessingEvent, data: dict[str, Any]) -> None:
        self.seen.append((event, data))


class Fails(Collects):
    async def on_event(self, event: ProcessingEvent, data: dict[str, Any]) -> None:
        raise RuntimeError("broken observer")


class Hangs(Collects):
    async def on_event(self, event: ProcessingEvent, data: dict[str, Any]) -> None:
        await asyncio.sleep(60)


async def test_observers_hear_everything_in_order_before_the_feed_closes() -> None:
    """batch-llm's event names, with data of their own copy."""
    observer = Collects()
    async with ObserverFeed([observer]) as feed:
        engine = Events(feed)
        for event in [*STORY, events.AttemptStarted("b", "1", 1)]:
            engine.emit(event)
    assert [event for event, _ in observer.seen] == [
        ProcessingEvent.ITEM_STARTED,
        ProcessingEvent.RATE_LIMIT_HIT,
        ProcessingEvent.COOLDOWN_STARTED,
        ProcessingEvent.COOLDOWN_ENDED,
        ProcessingEvent.ITEM_COMPLETED,
        ProcessingEvent.ITEM_FAILED,
    ]
    assert observer.seen[2][1]["duration"] == 2.0
    assert observer.seen[5][1]["error_type"] == 'Value"Error'


async def test_a_broken_or_slow_observer_does_not_keep_the_others_from_hearing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both are logged."""
    monkeypatch.setattr(observers, "OBSERVER_TIMEOUT", 0.02)
    good = Collects()
    with caplog.at_level(logging.WARNING):
        async with ObserverFeed([Fails(), Hangs(), good]) as feed:
            feed(finished())
    assert len(good.seen) == 1
    assert [record.getMessage().split()[1] for record in caplog.records] == [
        "name=Fails",
        "name=Hangs",
    ]


async def test_the_end_does_not_wait_for_ever_for_observers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What they have not heard by then is dropped, with a word."""
    monkeypatch.setattr(observers, "DRAIN_TIMEOUT", 0.05)
    with caplog.at_level(logging.WARNING):
        async with ObserverFeed([Hangs()]) as feed:
            feed(finished())
            feed(finished())
    assert "observers_behind events=1" in caplog.messages
