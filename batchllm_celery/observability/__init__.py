"""Listeners: logs, metrics, batch-llm's observers. The engine emits events and knows none of them.

Prometheus and OpenTelemetry need their extras: import `observability.prometheus` or
`observability.otel` for them.
"""

from batchllm_celery.observability.logging import LogListener
from batchllm_celery.observability.metrics import MetricsObserver
from batchllm_celery.observability.observers import (
    BaseObserver,
    ObserverFeed,
    ProcessingEvent,
    ProcessorObserver,
    translate,
)

__all__ = [
    "BaseObserver",
    "LogListener",
    "MetricsObserver",
    "ObserverFeed",
    "ProcessingEvent",
    "ProcessorObserver",
    "translate",
]
