"""A worker's first minutes: it waits for Redis, and tells probes that it lives."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from batchllm_celery.connection import client_url, safe_url
from batchllm_celery.connection.redis_connection import passes_by_itself
from batchllm_celery.errors import describe

logger = logging.getLogger("batchllm_celery")

#: Between two log lines of a worker that waits for Redis, in seconds.
REPEAT_SECONDS = 300.0
_TIMEOUT = 3.0
_BETWEEN_TRIES = 0.5


def ready_file(heartbeat_file: Path) -> Path:
    """The file that is touched while Redis answers too, beside the one of the event loop."""
    return heartbeat_file.with_name(f"{heartbeat_file.name}.ready")


def wait_for_redis(url: str, check: Callable[[], object]) -> None:
    """Return as soon as Redis answers; log one WARNING meanwhile, and repeat it rarely.

    Args:
        url: of Redis.
        check: called between two tries; ends the wait by raising.

    Raises:
        redis.RedisError: what waiting can't cure, such as a wrong password.
    """
    began = time.monotonic()
    logged_at: float | None = None
    while (error := error_of(url)) is not None:
        if not can_pass(error):
            raise error
        now = time.monotonic()
        if logged_at is None or now - logged_at >= REPEAT_SECONDS:
            logged_at = now
            logger.warning(
                "redis.waiting url=%s seconds=%.0f error=%s",
                safe_url(url),
                now - began,
                describe(error),
            )
        check()
        time.sleep(_BETWEEN_TRIES)
    if logged_at is not None:
        logger.warning("redis.found seconds=%.1f", time.monotonic() - began)


def can_pass(error: Exception | None) -> bool:
    """Whether waiting may cure what `error_of` gave."""
    return error is None or passes_by_itself(error)


def error_of(url: str) -> Exception | None:
    """What a PING of this Redis raises; None if it is answered."""
    try:
        with redis.Redis.from_url(
            client_url(url),
            socket_timeout=_TIMEOUT,
            socket_connect_timeout=_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        ) as client:
            client.ping()
    except (redis.RedisError, OSError) as error:
        return error
    return None


async def touch_forever(
    path: Path, interval: float, alive: Callable[[], bool] = lambda: True
) -> None:
    """Touch `path` every `interval` seconds while `alive()`: the loop that we run on turns."""
    complained = False
    while True:
        try:
            if alive():
                path.touch()  # noqa: ASYNC240 - microseconds, once a second
        except OSError as error:
            if not complained:
                logger.warning("heartbeat_file.failed error=%s", describe(error))
            complained = True
        await asyncio.sleep(interval)
