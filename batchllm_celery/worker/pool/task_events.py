"""Celery's task events, sent a few times a second."""

from __future__ import annotations

from typing import Any

#: Seconds that a task event may wait for others to be published with it.
GATHER_SECONDS = 0.1


def gather_task_events(consumer: Any) -> None:
    """Let a worker publish its buffered task events every `GATHER_SECONDS` or 24 events.

    Celery publishes them in every turn of its loop: three round trips for a short task.
    """
    if consumer.hub is None or consumer.event_dispatcher is None:
        return
    waiting = False

    def soon() -> None:
        nonlocal waiting
        if not waiting and consumer.hub is not None:
            waiting = True
            consumer.hub.call_later(GATHER_SECONDS, flush)

    def flush() -> None:
        nonlocal waiting
        waiting = False
        if consumer.event_dispatcher is not None:
            consumer.event_dispatcher.flush()

    consumer.on_send_event_buffered = soon  # what a dispatcher gets after a reconnect
    consumer.event_dispatcher.on_send_buffered = soon
