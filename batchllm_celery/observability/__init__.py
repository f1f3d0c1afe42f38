"""Listeners: logs, Prometheus, OpenTelemetry. The engine emits events and knows none of them.

Prometheus and OpenTelemetry need their extras: import `observability.prometheus` or
`observability.otel` for them. batch-llm's observers are in `compat`; their names here are a
documented path.
"""

import importlib
from typing import TYPE_CHECKING, Any

from batchllm_celery.observability.logging import LogListener

if TYPE_CHECKING:
    from batchllm_celery.compat.metrics import MetricsObserver
    from batchllm_celery.compat.observers import BaseObserver, ProcessingEvent, ProcessorObserver

__all__ = ["BaseObserver", "LogListener", "MetricsObserver", "ProcessingEvent", "ProcessorObserver"]

_COMPAT = {
    "BaseObserver": "observers",
    "MetricsObserver": "metrics",
    "ProcessingEvent": "observers",
    "ProcessorObserver": "observers",
}


def __getattr__(name: str) -> Any:
    if name not in _COMPAT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"batchllm_celery.compat.{_COMPAT[name]}"), name)
