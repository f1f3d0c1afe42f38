"""What happens, as frozen values; listeners turn it into logs, metrics and traces.

The engine emits and knows no listener. No event holds a prompt, an output or a key.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from batchllm_celery.errors import FailureKind

logger = logging.getLogger("batchllm_celery")


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True, slots=True)
class BatchStarted(Event):
    batch_id: str


@dataclass(frozen=True, slots=True)
class BatchFinished(Event):
    batch_id: str
    succeeded: int
    failed: int


@dataclass(frozen=True, slots=True)
class StrategyPrepared(Event):
    strategy: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ItemStarted(Event):
    """Once per item and process, before its first attempt."""

    batch_id: str
    item_id: str


@dataclass(frozen=True, slots=True)
class AttemptStarted(Event):
    batch_id: str
    item_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class AttemptFailed(Event):
    batch_id: str
    item_id: str
    attempt: int
    kind: FailureKind
    error_type: str
    wait: float | None
    """Seconds until the next attempt; None: there is none."""


@dataclass(frozen=True, slots=True)
class ItemFinished(Event):
    batch_id: str
    item_id: str
    success: bool
    kind: FailureKind | None
    attempts: int
    seconds: float
    input_tokens: int
    output_tokens: int
    cached_input_tokens: int
    cost: float | None
    error_type: str | None = None
    """`Type` of a failure's `Type: message`."""


@dataclass(frozen=True, slots=True)
class RateLimitHit(Event):
    """A provider refused a call of this process."""

    quota: str
    retry_after: float | None


@dataclass(frozen=True, slots=True)
class CooldownStarted(Event):
    """The fleet cools down; emitted once per process and epoch."""

    quota: str
    epoch: int
    seconds: float
    consecutive: int


@dataclass(frozen=True, slots=True)
class CooldownEnded(Event):
    quota: str
    epoch: int
    seconds: float


@dataclass(frozen=True, slots=True)
class QuotaOversize(Event):
    """A call needs more tokens than the quota's bucket holds; it runs alone when that is full."""

    quota: str
    tokens: int
    """Estimated tokens of the largest call."""


@dataclass(frozen=True, slots=True)
class ConnectionLost(Event):
    """Redis is away; we retry until it is back."""

    error: str


@dataclass(frozen=True, slots=True)
class ConnectionRestored(Event):
    seconds: float


@dataclass(frozen=True, slots=True)
class LoopBlocked(Event):
    """User code keeps the event loop from running."""

    seconds: float
    stack: str


@dataclass(frozen=True, slots=True)
class WorkerStarted(Event):
    worker_id: str


@dataclass(frozen=True, slots=True)
class WorkerStopped(Event):
    worker_id: str


Listener = Callable[[Event], None]


class Events:
    """Hands each event to every listener. A listener that raises is logged, never felt."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = list(listeners)

    def __bool__(self) -> bool:
        """Whether anybody listens: lets hot paths skip building an event."""
        return bool(self._listeners)

    def wants(self, kind: type[Event]) -> bool:
        """Whether anybody listens to events of `kind`; a listener may say so by a `wants` of its
        own, else it gets all."""
        for listener in self._listeners:
            wants = getattr(listener, "wants", None)
            if wants is None or wants(kind):
                return True
        return False

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def emit(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("listener_failed event=%s", type(event).__name__)
