"""What a process opens once: its way to Redis, the ledger, the limiter, the registry."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Self, TypeVar

from batchllm_celery.connection import Connection
from batchllm_celery.events import Events
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import Ledger, new_process_id
from batchllm_celery.limiter import Limiter
from batchllm_celery.settings import Settings

if TYPE_CHECKING:
    from batchllm_celery.strategies.base import ProcessResources
    from batchllm_celery.strategies.registry import Registry

T = TypeVar("T")


class Services:
    """The parts of one process: each is made at its first use, all are closed in reverse order.

    An async context manager, bound to the event loop on which its parts are used.

        async with Services(settings, url) as services:
            await services.ledger.batches.progress("b1")

    A part that is not used costs nothing: a producer imports no strategy.

    Args:
        settings: namespace, lease, limits; its `slots` are the calls in flight at most.
        url: of Redis.
        events: told of outages and of the limiter's decisions; default nobody.
        process_id: unique for ever; default a new one.
        denied_seconds: as for `Connection`.
    """

    def __init__(
        self,
        settings: Settings,
        url: str,
        *,
        events: Events | None = None,
        process_id: str | None = None,
        denied_seconds: float = 0.0,
    ) -> None:
        self.settings = settings
        self.url = url
        self.events = Events() if events is None else events
        self.process_id = process_id or new_process_id()
        self._denied_seconds = denied_seconds
        self._opening = asyncio.Lock()
        self._limiter_is_open = False
        self.stack = AsyncExitStack()
        """What is pushed here is closed with the parts: before those that were made earlier."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every part that was made; idempotent."""
        await self.stack.aclose()

    async def enter(self, context: AbstractAsyncContextManager[T]) -> T:
        """Hold a context manager until the parts are closed."""
        return await self.stack.enter_async_context(context)

    @cached_property
    def connection(self) -> Connection:
        connection = Connection(self.url, events=self.events, denied_seconds=self._denied_seconds)
        self.stack.push_async_exit(connection)
        return connection

    @cached_property
    def keys(self) -> Keys:
        return Keys(self.settings.namespace, self.connection.database)

    @cached_property
    def ledger(self) -> Ledger:
        ledger = Ledger(
            self.connection, self.keys, process_id=self.process_id, settings=self.settings
        )
        self.stack.push_async_exit(ledger)
        return ledger

    @cached_property
    def limiter(self) -> Limiter:
        """Whoever asks it for permits enters it first: `await services.enter(services.limiter)`."""
        return Limiter(self.connection, self.keys, process_id=self.process_id, events=self.events)

    async def open_limiter(self) -> Limiter:
        """The limiter, ready to be asked for permits; it is entered once, however many call this.
        (A worker enters it itself, when it opens its parts.)"""
        async with self._opening:
            if not self._limiter_is_open:
                await self.enter(self.limiter)
                self._limiter_is_open = True
        return self.limiter

    @cached_property
    def resources(self) -> ProcessResources:
        """What the process's strategies share."""
        from batchllm_celery.strategies.base import ProcessResources

        return ProcessResources(
            connection=self.connection,
            keys=self.keys,
            settings=self.settings,
            slots=self.settings.slots,
            events=self.events,
        )

    @cached_property
    def registry(self) -> Registry:
        from batchllm_celery.strategies.registry import Registry

        registry = Registry(self.resources)
        self.stack.push_async_callback(registry.close)
        return registry
