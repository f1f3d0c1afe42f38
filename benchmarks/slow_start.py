"""Contention on the path of the slow start: 20 workers, 1,000 items (seed plan, 3.1).

    python -m benchmarks.slow_start

Every start after a cooldown is to come 2 ms after the one before it; calls take no time. Three
ways: the delay slept under one lock (batch-llm 0.3), a list made once and no sleep under the
lock (seed plan), and the limiter's start times, where the lock is gone: one script serves many.
By the plan no 50 ms hold more than 26 starts.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from batchllm_celery.compat.rate_limits import policy_from
from batchllm_celery.connection import Connection
from batchllm_celery.keys import Keys
from batchllm_celery.limiter import CallOutcome, Estimate, Limiter
from batchllm_celery.models import Quota, RateLimitConfig
from benchmarks.lab import table
from tests.support import ValkeyServer

WORKERS, ITEMS, DELAY = 20, 1_000, 0.002


@dataclass
class Clock:
    """When calls started, and how long workers stood before the lock."""

    starts: list[float] = field(default_factory=list)
    at_lock: float = 0.0


def under_the_lock(clock: Clock) -> Callable[[], Awaitable[None]]:
    lock = asyncio.Lock()

    async def start() -> None:
        asked = time.monotonic()
        async with lock:
            clock.at_lock += time.monotonic() - asked
            await asyncio.sleep(DELAY)

    return start


def list_made_once(clock: Clock) -> Callable[[], Awaitable[None]]:
    lock, delays, index = asyncio.Lock(), [DELAY] * ITEMS, 0

    async def start() -> None:
        nonlocal index
        asked = time.monotonic()
        async with lock:
            clock.at_lock += time.monotonic() - asked
            delay, index = delays[index], index + 1
        await asyncio.sleep(delay)

    return start


def start_times(limiter: Limiter) -> Callable[[], Awaitable[None]]:
    async def start() -> None:
        permit = await limiter.acquire("q", Estimate())
        limiter.settle(permit, CallOutcome.SUCCEEDED)

    return start


async def drive(clock: Clock, start: Callable[[], Awaitable[None]]) -> tuple[float, float]:
    """Wall and CPU seconds of all items."""
    left = iter(range(ITEMS))

    async def worker() -> None:
        for _ in left:
            await start()
            clock.starts.append(time.monotonic())

    begun, cpu = time.monotonic(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(WORKERS)))
    return time.monotonic() - begun, time.process_time() - cpu


async def ours(url: str, clock: Clock) -> tuple[float, float]:
    config = RateLimitConfig(
        cooldown_seconds=0.1,
        slow_start_items=ITEMS + 10,
        slow_start_initial_delay=DELAY,
        slow_start_final_delay=DELAY,
    )
    quota = Quota(name="q", policy=policy_from(config))
    async with (
        Connection(url) as connection,
        Limiter(connection, Keys("slow"), process_id="p") as limiter,
    ):
        await limiter.configure(quota)
        refused = await limiter.acquire("q", Estimate())
        limiter.settle(refused, CallOutcome.REFUSED)
        first = await limiter.acquire("q", Estimate())  # the cooldown is over
        limiter.settle(first, CallOutcome.SUCCEEDED)
        return await drive(clock, start_times(limiter))


def row(name: str, clock: Clock, wall: float, cpu: float) -> tuple[str, ...]:
    starts = sorted(clock.starts)
    most = max(bisect.bisect_left(starts, at + 0.05) - i for i, at in enumerate(starts))
    rate = f"{ITEMS / wall:,.0f}/s"
    return (name, rate, str(most), f"{clock.at_lock:.2f} s", f"{cpu / ITEMS * 1e3:.3f} ms")


async def main() -> None:
    rows: list[tuple[str, ...]] = [
        ("how", "starts", "most in 50 ms", "waited at the lock, all workers", "CPU a start")
    ]
    for name, way in (
        ("slept under one lock (batch-llm 0.3)", under_the_lock),
        ("list made once, slept outside (seed plan)", list_made_once),
    ):
        clock = Clock()
        rows.append(row(name, clock, *await drive(clock, way(clock))))
    valkey = ValkeyServer().start()
    try:
        clock = Clock()
        rows.append(
            row("start times of the fleet's limiter", clock, *await ours(valkey.url, clock))
        )
    finally:
        valkey.stop()
    print(table(rows))


if __name__ == "__main__":
    asyncio.run(main())
