"""How the parts of the ledger reach Redis."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from redis.exceptions import ResponseError

from batchllm_celery.connection import Connection, Script, is_broken, why
from batchllm_celery.errors import BatchNotFoundError, BatchUnreadableError
from batchllm_celery.events import Events
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import scripts
from batchllm_celery.models import BatchState
from batchllm_celery.settings import Settings

logger = logging.getLogger("batchllm_celery")

T = TypeVar("T")

Argument = bytes | str | int | float

#: Items that one sweep stops at a time, and payload bytes that it reads: a few milliseconds.
SWEEP_ITEMS = 1000
SWEEP_BYTES = 8 * 1024 * 1024
#: Longest wait of `close` for calls under way.
CLOSE_SECONDS = 5.0


@lru_cache(maxsize=1024)
def key_list(keys: Keys, batch_id: str) -> tuple[str, ...]:
    """The keys of a batch in the order in which the scripts take them."""
    names = keys.batch(batch_id)
    return tuple(getattr(names, name) for name in names.__dataclass_fields__)


def text(value: bytes | str) -> str:
    """A word of a reply."""
    return value.decode() if isinstance(value, bytes) else value


def unreadable(batch_id: str, reason: str) -> BatchUnreadableError:
    """What somebody is told who asks for a broken batch."""
    return BatchUnreadableError(
        f"batch {batch_id!r} can't be read in Redis ({reason}): "
        f"`batchllm doctor` says how to remove it"
    )


class LedgerCalls:
    """What worker side, producer side and control share: patient scripts and the sweep."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        process_id: str,
        settings: Settings,
        events: Events | None = None,
    ) -> None:
        self.process_id = process_id
        self._connection = connection
        self._keys = keys
        self._settings = settings
        self._events = Events() if events is None else events
        self._sweeping: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Future[Any]] = set()

    async def close(self) -> None:
        """Let outcomes that are on their way arrive, for some seconds; stop sweeps (anybody may
        go on with them)."""
        for sweep in self._sweeping.values():
            sweep.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def sweep(self, batch_id: str) -> BatchState:
        """Give every unheld item of a stopped batch its outcome, 1,000 at a time.

        Anybody may call it at any time: it does nothing to a batch that is not stopped.
        """
        while True:
            state, left = await self._run(scripts.SWEEP, batch_id, [SWEEP_ITEMS, SWEEP_BYTES])
            if not left:
                return BatchState(text(state))

    def _note(self, batch_id: str, state: BatchState) -> None:
        """Sweep, in the background, a batch that turns out to be stopped."""
        if state.stopped and batch_id not in self._sweeping:
            task = self._spawn(self._sweep_quietly(batch_id))
            self._sweeping[batch_id] = task
            task.add_done_callback(lambda _: self._sweeping.pop(batch_id, None))

    async def _sweep_quietly(self, batch_id: str) -> None:
        try:
            await self.sweep(batch_id)
        except (BatchNotFoundError, BatchUnreadableError):
            return
        except Exception:
            logger.exception("ledger.sweep_failed batch_id=%s", batch_id)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task: asyncio.Task[T] = asyncio.get_running_loop().create_task(work)
        self._outlive(task)
        return task

    def _outlive(self, work: asyncio.Future[Any]) -> None:
        """Let `work` end although whoever asked for it is cancelled; `close` waits for it."""
        self._tasks.add(work)
        work.add_done_callback(self._tasks.discard)

    async def _run(self, script: Script, batch_id: str, args: Sequence[Argument] = ()) -> Any:
        keys, client = key_list(self._keys, batch_id), self._connection.client
        try:
            reply = await self._connection.patiently(lambda: script(client, keys, args))
        except ResponseError as error:
            if not is_broken(error):
                raise
            self._connection.broken.add("batch", batch_id, error)
            raise unreadable(batch_id, why(error)) from error
        if reply is None:
            raise BatchNotFoundError(
                f"batch {batch_id!r} is unknown: never submitted to this Redis and namespace, "
                f"or kept no longer"
            )
        return reply
