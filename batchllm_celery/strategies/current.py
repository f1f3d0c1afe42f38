"""Which item a strategy's code is answering at the moment."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from batchllm_celery.errors import UsageError


@dataclass(frozen=True, slots=True)
class CurrentItem:
    """The item of the running `execute`.

    Args:
        batch_id: its batch; empty without one (in-process API, tests).
        item_id: as submitted; of `summarise.delay` the task's id.
        index: its place in the batch.
        attempt: 1 for the first.
        context: as submitted.
    """

    batch_id: str
    item_id: str
    index: int
    attempt: int
    context: Any


_current: ContextVar[CurrentItem] = ContextVar("batchllm_item")


def current_item() -> CurrentItem:
    """The item that the calling code answers: in a strategy's `execute`, and in all that it calls
    or starts as a task.

    Raises:
        UsageError: outside of `execute`.
    """
    try:
        return _current.get()
    except LookupError:
        raise UsageError("current_item() is known in a strategy's execute() only") from None


def begin_item(item: CurrentItem) -> None:
    """Let `current_item` be `item` in the running task: each item has one of its own."""
    _current.set(item)
