"""The Redis client of one process: bounded, and patient while Redis is away."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import random
import re
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self, TypeVar

import redis.exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from batchllm_celery.connection.broken import BrokenEntries
from batchllm_celery.connection.reminder import Reminder
from batchllm_celery.connection.urls import client_url
from batchllm_celery.errors import RedisDeniedError, RedisUnavailableError, describe
from batchllm_celery.events import ConnectionLost, ConnectionRestored, Events
from batchllm_celery.redaction import safe_url

logger = logging.getLogger("batchllm_celery")

T = TypeVar("T")

PING_TIMEOUT = 3.0
FIRST_WAIT = 0.05
LONGEST_WAIT = 1.0

#: Error replies of a Redis that will take the same command later.
_PASSING_REPLIES = (
    "MISCONF", "BUSY ", "NOREPLICAS", "OOM ", "UNBLOCKED", "FAILOVER",
    "READONLY ", "MASTERDOWN ", "CLUSTERDOWN ", "TRYAGAIN ",
)  # fmt: skip
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
_DENIALS = (
    redis_errors.AuthenticationError,
    redis_errors.AuthenticationWrongNumberOfArgsError,
    redis_errors.AuthorizationError,
    redis_errors.NoPermissionError,
)
#: How servers say that a script may not do something: Valkey, and Redis.
_DENIED_IN_SCRIPT = ("ACL failure in script", "The user executing the script can't")
#: Redis 6.2 puts the place in a script before what a command in it answered.
_ANSWER_IN_SCRIPT = re.compile(r".*@user_script: ?\d+: -(?=[A-Z]+ )", re.DOTALL)


class Connection:
    """One process's Redis. An async context manager, bound to the loop it was opened on.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        events: hears of `ConnectionLost` and `ConnectionRestored`.
        max_connections: sockets at most; further commands wait for a free one.
        socket_timeout: seconds that connecting or a reply may take.
        denied_seconds: for how long `patiently` goes on when a Redis that has served this process
            denies it a right, or its password; 0: not at all.
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
        denied_seconds: float = 0.0,
    ) -> None:
        self.url = url
        self._denied_seconds = denied_seconds
        self._served = False
        self.broken = BrokenEntries()
        self._events = Events() if events is None else events
        self._outage: Reminder | None = None
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
    def database(self) -> int:
        """The number of the database that the URL names."""
        return int(self.client.connection_pool.connection_kwargs.get("db") or 0)

    @property
    def lost(self) -> bool:
        """Whether Redis is away, as far as `patiently` knows."""
        return self._outage is not None

    async def ping(self) -> None:
        """Return if Redis answers, within 3 seconds.

        Raises:
            RedisUnavailableError: in one line, with the URL (without its password) and why.
        """
        try:
            async with asyncio.timeout(PING_TIMEOUT):
                await self.client.execute_command("PING")
        except (redis_errors.RedisError, OSError) as error:
            if is_denial(error):
                raise RedisDeniedError(denied_words(error, self.url)) from error
            raise RedisUnavailableError(
                f"Redis at {safe_url(self.url)} can't be used: {_reason(error)}"
            ) from error

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Await `call()`, and repeat it with growing waits for as long as Redis is away.

        `call` may run twice although it succeeded the first time (the reply can be lost), so it
        must be idempotent. A wait of seconds is said in the log.

        Raises:
            RedisDeniedError: Redis denies a right, or the password.
            RedisError: what else waiting can't cure.
        """
        wait, denied_at = FIRST_WAIT, math.inf
        task = asyncio.current_task()
        cancelled = task.cancelling() if task is not None else 0
        while True:
            try:
                result = await call()
                if task is not None and task.cancelling() > cancelled:
                    # Python 3.11's `asyncio.wait_for`, through which redis-py sends, loses a
                    # cancel that comes just when the command has been sent.
                    raise asyncio.CancelledError
            except Exception as error:
                if is_denial(error):
                    denied_at = min(denied_at, time.monotonic())
                    # Rights and passwords are changed in more than one step.
                    patience = self._denied_seconds if self._served else 0.0
                    if time.monotonic() - denied_at >= patience:
                        raise RedisDeniedError(denied_words(error, self.url)) from error
                elif not passes_by_itself(error):
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
        if self._outage is None:
            self._outage = Reminder()
            self._events.emit(ConnectionLost(describe(error)))
        elif self._outage.due():
            where, why = safe_url(self.url), describe(error)
            logger.warning("redis.away seconds=%.0f url=%s %s", self._outage.seconds, where, why)

    def _note_success(self) -> None:
        self._served = True
        if self._outage is not None:
            seconds, self._outage = self._outage.seconds, None
            self._events.emit(ConnectionRestored(seconds))


def passes_by_itself(error: BaseException) -> bool:
    """Whether the same command may succeed later without anybody changing it."""
    if is_denial(error):
        return False
    if isinstance(error, _PASSING_ERRORS):
        return True
    return isinstance(error, redis_errors.ResponseError) and _ANSWER_IN_SCRIPT.sub(
        "", str(error)
    ).startswith(_PASSING_REPLIES)


def is_denial(error: BaseException) -> bool:
    """Whether Redis denies a right, or does not know the user or the password."""
    in_script = isinstance(error, redis_errors.ResponseError) and any(
        words in str(error) for words in _DENIED_IN_SCRIPT
    )
    return in_script or isinstance(error, _DENIALS)


def denied_words(error: BaseException, url: str) -> str:
    """One line about a denial: what was denied, where, and what to do."""
    return (
        f"Redis at {safe_url(url)} denies what batchllm needs: {_reason(error)}. "
        f"The rights that it needs are in docs/deploy.md (Rights in Redis)"
    )


def _client(
    url: str, max_connections: int, socket_timeout: float | None, connect_timeout: float
) -> Redis:
    return Redis.from_pool(
        BlockingConnectionPool.from_url(
            client_url(url),
            max_connections=max_connections,
            timeout=None,  # each command is bounded; a queue for sockets is not a failure
            socket_timeout=socket_timeout,
            socket_connect_timeout=connect_timeout,
            retry=Retry(NoBackoff(), 0),
            # RESP2 answers alike from every redis-py we support, and connects in one step.
            protocol=2,
        )
    )


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ssl.SSLError):  # its number is one of OpenSSL's, not the system's
        why = getattr(cause, "verify_message", "") or cause.reason or str(cause)
        return f"TLS failed: {why}"
    number = getattr(cause, "errno", None)
    if isinstance(cause, OSError) and number and number in errno.errorcode:
        return os.strerror(number)
    if isinstance(error, TimeoutError) or not str(error):
        return f"no answer within {PING_TIMEOUT:g} s"
    return str(error).splitlines()[0]
