"""An event loop with a clock of its own: an hour takes as long as its events."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from batchllm_celery.simulation.config import SimulationConfig
from batchllm_celery.simulation.provider import Provider

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Waits for nobody: the loop's time passes in place of it."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing is left to happen: everybody waits for ever")
        self.loop.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes when nobody has anything to do."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop = self
        self.now = 0.0
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run until `work` is done, and cancel what is left."""

        async def whole() -> T:
            try:
                return await work
            finally:
                rest = asyncio.all_tasks() - {asyncio.current_task()}
                for task in rest:
                    task.cancel()
                await asyncio.gather(*rest, return_exceptions=True)

        asyncio.set_event_loop(self)
        try:
            return self.run_until_complete(whole())
        finally:
            asyncio.set_event_loop(None)
            self.close()


def virtual_provider(config: SimulationConfig) -> Provider:
    """A simulated provider on the running loop's clock."""
    loop = asyncio.get_running_loop()
    return Provider(config, clock=lambda: 1_800_000_000.0 + loop.time(), timer=loop.time)
