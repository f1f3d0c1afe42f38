"""Real limiters in virtual time: a connection whose commands reach a real Valkey, half a virtual
round trip later."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from batchllm_celery.connection import Script
from batchllm_celery.limiter import scripts
from tests.integration.virtual_redis import VirtualRedis

T = TypeVar("T")
_SCRIPTS = {script.sha: script for script in vars(scripts).values() if isinstance(script, Script)}


class VirtualConnection:
    """What a `Limiter` needs of a connection: scripts and channels, half a round trip away.

    Args:
        server: runs the scripts; its clock follows the loop's.
        round_trip: seconds there and back.
    """

    def __init__(self, server: VirtualRedis, round_trip: float = 0.001) -> None:
        self.server, self.round_trip = server, round_trip
        self.client = self
        self.broken: list[Any] = []
        self._loop = asyncio.get_running_loop()
        self._offset = server.now - self._loop.time()
        self._channels: dict[str, set[_Subscriber]] = defaultdict(set)
        self.calls = 0

    async def patiently(self, command: Callable[[], Awaitable[T]]) -> T:
        return await command()

    async def execute_command(self, name: str, *args: Any) -> Any:
        """EVALSHA of a script of the limiter."""
        await asyncio.sleep(self.round_trip / 2)
        self.calls += 1
        self.server.now = self._offset + self._loop.time()
        script, count = _SCRIPTS[args[0]], args[1]
        reply = self.server.call(script, list(args[2 : 2 + count]), args[2 + count :])
        for channel, message in self.server.published:
            for subscriber in self._channels[channel.decode()]:
                self._loop.call_later(
                    self.round_trip / 2,
                    subscriber.messages.put_nowait,
                    {"channel": channel, "data": message},
                )
        await asyncio.sleep(self.round_trip / 2)
        return reply

    @asynccontextmanager
    async def pubsub(self, **_: Any) -> AsyncIterator[_Subscriber]:
        subscriber = _Subscriber(self._channels)
        try:
            yield subscriber
        finally:
            for channel in self._channels.values():
                channel.discard(subscriber)

    @asynccontextmanager
    async def pipeline(self, **_: Any) -> AsyncIterator[_NoPipeline]:
        yield _NoPipeline()


class _Subscriber:
    def __init__(self, channels: dict[str, set[_Subscriber]]) -> None:
        self._channels = channels
        self.messages: asyncio.Queue[dict[str, bytes]] = asyncio.Queue()

    async def subscribe(self, channel: str) -> None:
        self._channels[channel].add(self)

    async def get_message(self, **_: Any) -> dict[str, bytes]:
        return await self.messages.get()


class _NoPipeline:
    """The list of quotas' names is of no interest here."""

    def zadd(self, *_: Any) -> None: ...

    zremrangebyscore = expire = zadd

    async def execute(self) -> None: ...
