"""Counters of a run, with batch-llm's names and exports."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

from batchllm_celery.compat.observers import BaseObserver, ProcessingEvent, translate
from batchllm_celery.events import Event

_COUNTERS = ("items_processed", "items_succeeded", "items_failed", "rate_limits_hit")
_GAUGES = ("avg_processing_time", "success_rate", "total_cooldown_time")


def _ready(value: Any) -> Generator[None, None, Any]:
    yield from ()
    return value


class Figures(dict[str, Any]):
    """Figures by name. May be awaited too, since batch-llm's `get_metrics` is a coroutine."""

    def __await__(self) -> Generator[None, None, dict[str, Any]]:
        return _ready(self)


class Text(str):
    """A text that may be awaited too."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, str]:
        return _ready(self)


class MetricsObserver(BaseObserver):
    """Counts items, errors, rate limits and cooldowns.

    Pass it to `ParallelBatchProcessor(observers=[...])`; it is a plain event listener too. Every
    figure is an attribute (`metrics.items_failed`) and an entry of `get_metrics()`.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> Figures:
        """Begin again at zero; gives the figures, all zero."""
        self._counts: dict[str, int] = dict.fromkeys(_COUNTERS, 0)
        self._cooldown_seconds = 0.0
        self._times: list[float] = []
        self._errors: dict[str, int] = {}
        return self.get_metrics()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in (figures := self.get_metrics()):
            return figures[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    async def on_event(self, event: ProcessingEvent, data: dict[str, Any]) -> None:
        """Count `event`."""
        self._note(event, data)

    def __call__(self, event: Event) -> None:
        """Count one of the engine's own events."""
        translated = translate(event)
        if translated is not None:
            self._note(*translated)

    def _note(self, event: ProcessingEvent, data: dict[str, Any]) -> None:
        if event is ProcessingEvent.ITEM_COMPLETED:
            self._count("items_processed", "items_succeeded")
            self._times.append(data["duration"])
        elif event is ProcessingEvent.ITEM_FAILED:
            self._count("items_processed", "items_failed")
            error = str(data.get("error_type") or "unknown")
            self._errors[error] = self._errors.get(error, 0) + 1
        elif event is ProcessingEvent.RATE_LIMIT_HIT:
            self._count("rate_limits_hit")
        elif event is ProcessingEvent.COOLDOWN_ENDED:
            self._cooldown_seconds += data["duration"]

    def _count(self, *names: str) -> None:
        for name in names:
            self._counts[name] += 1

    def get_metrics(self) -> Figures:
        """All figures by name; times in seconds, `success_rate` from 0 to 1."""
        processed = self._counts["items_processed"]
        times = list(self._times)
        return Figures(
            {
                **self._counts,
                "total_cooldown_time": self._cooldown_seconds,
                "processing_times": times,
                "error_counts": dict(self._errors),
                "avg_processing_time": sum(times) / len(times) if times else 0.0,
                "success_rate": self._counts["items_succeeded"] / processed if processed else 0.0,
            }
        )

    def export_dict(self) -> Figures:
        """The figures, with the number of processing times in place of their list."""
        figures = self.get_metrics()
        figures["processing_times_count"] = len(figures.pop("processing_times"))
        return figures

    def export_json(self) -> Text:
        """`export_dict` as indented JSON."""
        return Text(json.dumps(self.export_dict(), indent=2))

    def export_prometheus(self) -> Text:
        """The figures in Prometheus' text format, names prefixed with `batch_llm_`."""
        figures = self.get_metrics()
        lines: list[str] = []
        for names, kind in ((_COUNTERS, "counter"), (_GAUGES, "gauge")):
            for name in names:
                lines += [*_header(name, kind), f"batch_llm_{name} {figures[name]}"]
        lines += _header("errors_total", "counter")
        lines += [
            f'batch_llm_errors_total{{error_type="{_escape(error)}"}} {count}'
            for error, count in figures["error_counts"].items()
        ]
        return Text("\n".join(lines) + "\n")


def _header(name: str, kind: str) -> list[str]:
    words = name.replace("_", " ")
    return [f"# HELP batch_llm_{name} {words.capitalize()}.", f"# TYPE batch_llm_{name} {kind}"]


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
