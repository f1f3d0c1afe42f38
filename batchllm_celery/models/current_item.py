"""The item that a strategy works for at this moment."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CurrentItem:
    """Whose call this is.

    Args:
        batch_id: its batch; empty in a `ParallelBatchProcessor`.
        item_id: unique within the batch.
        index: its row's place in the input, from 0.
        attempt: 1 for the first; a refusal (429) does not count.
        context: what came with the row.
    """

    batch_id: str
    item_id: str
    index: int
    attempt: int
    context: Any = None


_current: ContextVar[CurrentItem | None] = ContextVar("batchllm_current_item", default=None)


def current_item() -> CurrentItem | None:
    """The item that is being answered, for logs, spans and idempotency keys; None outside of a
    strategy's `execute` and `dry_run`.

    Tasks and threads (`asyncio.to_thread`) that these start see it too.
    """
    return _current.get()


def set_current_item(item: CurrentItem | None) -> None:
    """Say whose call the running task makes from now on."""
    _current.set(item)
