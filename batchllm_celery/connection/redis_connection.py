"""The Redis client of one process: bounded, and patient while Redis is away."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self, TypeVar

import redis.exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from batchllm_celery.connection.broken import BrokenEntries
from batchllm_celery.connection.urls import safe_url
from batchllm_celery.errors import RedisUnavailableError, UsageError, describe
from batchllm_celery.events import ConnectionLost, ConnectionRestored, Events

T = TypeVar("T")

PING_TIMEOUT = 3.0
FIRST_WAIT = 0.05
LONGEST_WAIT = 1.0

#: Error replies of a Redis that will take the same command later.
_PASSING_REPLIES = ("MISCONF", "BUSY ", "NOREPLICAS", "OOM ", "UNBLOCKED", "FAILOVER")
_PASSING_ERRORS = (
    ConnectionError,  # the builtin: a socket's own error
    redis_errors.ConnectionError,  # BusyLoadingError and MaxConnectionsError are among them
    redis_errors.TimeoutError,
    redis_errors.ReadOnlyError,
    redis_errors.ClusterDownError,
    redis_errors.MasterDownError,
    redis_errors.TryAgainError,
    redis_errors.OutOfMemoryError,
)
_LASTING_ERRORS = (
    redis_errors.AuthenticationError,
    redis_errors.AuthenticationWrongNumberOfArgsError,
    redis_errors.AuthorizationError,
)


class Connection:
    """One process's Redis. An async context manager, bound to the loop it was opened on.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        events: hears of `ConnectionLost` and `ConnectionRestored`.
        max_connections: sockets at most; further commands wait for a free one.
        socket_timeout: seconds that connecting or a reply may take.
    """

    client: Redis
    """Replies are bytes; it never retries by itself: see `patiently`."""

    def __init__(
        self,
        url: str,
        *,
        events: Events | None = None,
        max_connections: int = 16,
        socket_timeout: float = 5.0,
    ) -> None:
        self.url = url
        self.broken = BrokenEntries()
        self._events = Events() if events is None else events
        self._lost_at: float | None = None
        self.client = _client(url, max_connections, socket_timeout, socket_timeout)
        # A subscriber waits as long as nothing is said, on a socket of its own.
        self._subscribers = _client(url, 1_000, None, socket_timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all sockets; idempotent."""
        for client in (self._subscribers, self.client):
            await client.aclose()
            await client.connection_pool.disconnect()

    @property
    def lost(self) -> bool:
        """Whether Redis is away, as far as `patiently` knows."""
        return self._lost_at is not None

    async def ping(self) -> None:
        """Return if Redis answers, within 3 seconds.

        Raises:
            RedisUnavailableError: in one line, with the URL (without its password) and why.
        """
        try:
            async with asyncio.timeout(PING_TIMEOUT):
                await self.client.execute_command("PING")
        except (redis_errors.RedisError, OSError) as error:
            raise RedisUnavailableError(
                f"Redis at {safe_url(self.url)} can't be used: {_reason(error)}"
            ) from error

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Await `call()`, and repeat it with growing waits for as long as Redis is away.

        `call` may run twice although it succeeded the first time (the reply can be lost), so it
        must be idempotent. Errors that waiting can't cure are raised.
        """
        wait = FIRST_WAIT
        while True:
            try:
                result = await call()
            except Exception as error:
                if not passes_by_itself(error):
                    raise
                self._note_loss(error)
            else:
                self._note_success()
                return result
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, LONGEST_WAIT)

    def pubsub(self, **options: Any) -> PubSub:
        """A subscriber on a socket of its own, without a read timeout. Close it after use."""
        return self._subscribers.pubsub(**options)

    def _note_loss(self, error: Exception) -> None:
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            self._events.emit(ConnectionLost(describe(error)))

    def _note_success(self) -> None:
        if self._lost_at is not None:
            seconds, self._lost_at = time.monotonic() - self._lost_at, None
            self._events.emit(ConnectionRestored(seconds))


def passes_by_itself(error: Exception) -> bool:
    """Whether the same command may succeed later without anybody changing it."""
    if isinstance(error, _LASTING_ERRORS):
        return False
    if isinstance(error, _PASSING_ERRORS):
        return True
    return isinstance(error, redis_errors.ResponseError) and str(error).startswith(_PASSING_REPLIES)


def _client(
    url: str, max_connections: int, socket_timeout: float | None, connect_timeout: float
) -> Redis:
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=None,  # each command is bounded; a queue for sockets is not a failure
            socket_timeout=socket_timeout,
            socket_connect_timeout=connect_timeout,
            retry=Retry(NoBackoff(), 0),
            # RESP2 answers alike from every redis-py we support, and connects in one step.
            protocol=2,
        )
    except ValueError as error:
        raise UsageError(
            f"{safe_url(url)!r} is not a Redis URL: it must begin with redis://, rediss:// or unix://"
        ) from error
    return Redis.from_pool(pool)


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__
    number = getattr(cause, "errno", None)
    if isinstance(cause, OSError) and number and number in errno.errorcode:
        return os.strerror(number)
    if isinstance(error, TimeoutError) or not str(error):
        return f"no answer within {PING_TIMEOUT:g} s"
    return str(error).splitlines()[0]
