"""Events as log lines of a name and fields: `item.attempt_failed item_id=7 kind=rate_limited`."""

from __future__ import annotations

import json
import logging
from dataclasses import fields

from batchllm_celery import events
from batchllm_celery.events import Event

_LINES: dict[type[Event], tuple[str, int]] = {
    events.BatchStarted: ("batch.started", logging.INFO),
    events.BatchFinished: ("batch.finished", logging.INFO),
    events.StrategyPrepared: ("strategy.prepared", logging.INFO),
    events.ItemStarted: ("item.started", logging.DEBUG),
    events.AttemptStarted: ("item.attempt_started", logging.DEBUG),
    events.AttemptFailed: ("item.attempt_failed", logging.INFO),
    events.ItemFinished: ("item.finished", logging.DEBUG),
    events.RateLimitHit: ("quota.refused", logging.INFO),
    events.CooldownStarted: ("quota.cooldown_started", logging.WARNING),
    events.CooldownEnded: ("quota.cooldown_ended", logging.INFO),
    events.QuotaOversize: ("quota.oversize", logging.WARNING),
    events.ConnectionLost: ("redis.lost", logging.WARNING),
    events.ConnectionRestored: ("redis.restored", logging.WARNING),
    events.LoopBlocked: ("loop.blocked", logging.WARNING),
    events.WorkerStarted: ("worker.started", logging.INFO),
    events.WorkerStopped: ("worker.stopped", logging.INFO),
}

_OTHER = ("", logging.DEBUG)


class LogListener:
    """Writes each event to a logger; whole-item events at DEBUG, trouble at WARNING.

    Args:
        logger: where to; default the package's own.
        level: events below it are not even formatted; default what the logger says.
    """

    def __init__(self, logger: logging.Logger | None = None, level: int = logging.NOTSET) -> None:
        self._logger = logger or logging.getLogger("batchllm_celery")
        self._level = level

    def wants(self, kind: type[Event]) -> bool:
        """Whether events of `kind` are logged at the present level: spares building those that
        are not."""
        level = _LINES.get(kind, _OTHER)[1]
        return level >= self._level and self._logger.isEnabledFor(level)

    def __call__(self, event: Event) -> None:
        """Log `event`."""
        name, level = _LINES.get(type(event), (type(event).__name__, logging.DEBUG))
        if level >= self._level and self._logger.isEnabledFor(level):
            self._logger.log(level, "%s %s", name, line_of(event))


def line_of(event: Event) -> str:
    """The event's fields as `name=value`, absent ones left out."""
    shown = ((field.name, getattr(event, field.name)) for field in fields(event))
    return " ".join(f"{name}={_value(value)}" for name, value in shown if value is not None)


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    text = str(value)
    # A quoted form keeps one event on one line, whatever an item is called.
    return text if text and text.isprintable() and " " not in text else json.dumps(text)
