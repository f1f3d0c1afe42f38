"""What a producing process opens once: the services, and the Celery app that sends messages."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from batchllm_celery.embedded import resolve_url, revive_when_lost
from batchllm_celery.events import Events
from batchllm_celery.producer.steps import Blocking, OnLoop, Step
from batchllm_celery.queue import App, make_app, publish, redis_of
from batchllm_celery.services import Services
from batchllm_celery.settings import Settings

T = TypeVar("T")


class Session:
    """The parts of one producer, opened at first use and closed in reverse order.

    All I/O runs on the process's loop thread; a `step` crosses over from any thread or loop.
    """

    def __init__(self, settings: Settings, app: App | None, events: Events) -> None:
        self.settings = settings
        self._events = events
        self._app = app
        self._own_app: App | None = None
        self._url: str | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._inherited: list[Services] = []
        revive_when_lost(events)
        self._services: Services | None = None

    @property
    def url(self) -> str:
        """Redis; starts or attaches to the embedded server where none is configured."""
        self._forget_after_fork()
        with self._lock:
            if self._url is None:
                app, settings = self._app, self.settings
                self._url = resolve_url(settings) if app is None else redis_of(app, settings)
            return self._url

    @property
    def app(self) -> App:
        """The Celery app that messages are sent with."""
        self._forget_after_fork()
        if self._app is not None:
            return self._app
        if self._own_app is None:
            self._own_app = make_app(self.settings, self.url)
        return self._own_app

    def step(self, work: Callable[[Session], Coroutine[Any, Any, T]]) -> Step[T]:
        """`work(session)` on the loop thread, after what it needs has been opened."""
        return OnLoop(lambda: self.do(work))

    async def do(self, work: Callable[[Session], Coroutine[Any, Any, T]]) -> T:
        """Run `work(session)`; on our own loop only."""
        await self._open()
        return await work(self)

    @property
    def services(self) -> Services:
        """Redis, the ledger, the limiter; only on the loop thread, inside `step` and `do`."""
        assert self._services is not None
        return self._services

    def publish(
        self,
        batch_id: str,
        indexes: Sequence[int],
        queue: str,
        priority: int,
        give_up: Callable[[], bool] = lambda: False,
        strategy: str | None = None,
    ) -> bool:
        """Send one message; blocks, so never on the loop thread. False where it gave up."""
        return publish(
            self.app,
            batch_id,
            indexes,
            queue=queue,
            priority=priority,
            give_up=give_up,
            strategy=strategy,
        )

    def _forget_after_fork(self) -> None:
        """A child opens its own: what the parent has belongs to the parent's loop. It is kept, not
        closed: closing it here would unregister descriptors that parent and child share."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._lock = threading.Lock()  # another thread of the parent may have held it
            if self._services is not None:
                self._inherited.append(self._services)
            self._services = None
            if self._own_app is not None:
                self._own_app = None  # its sockets are the parent's
            elif self._app is not None:
                after_fork: Any = self._app
                after_fork._after_fork()  # as Celery does it in the children that it forks

    async def _open(self) -> None:
        self._forget_after_fork()
        if self._services is None:
            await asyncio.to_thread(lambda: self.url)  # it may start a server
            self.open_services()

    def open_services(self) -> Services:
        """The services before anything is connected; on our own loop only."""
        if self._services is None:
            self._services = Services(self.settings, self.url, events=self._events)
        return self._services

    def step_close(self) -> Step[None]:
        """`close`, from anywhere; starts no loop where nothing was opened."""
        return OnLoop(self.close) if self._services is not None else Blocking(lambda: None)

    async def close(self) -> None:
        """Release locks and connections; repeating it is harmless. On our own loop only."""
        self._forget_after_fork()
        services, self._services = self._services, None
        if services is not None:
            await services.close()
