"""Providers without a quota, and headers that tell one: fleets of real limiters in virtual time.

Per server and rule: answers as a share of what the best fixed limit serves, calls refused, median
latency next to that limit's, round trips to Redis a call.

Run: python -m benchmarks.congestion [--only WORDS] [--seconds 600]
     python -m benchmarks.congestion --workers 1000 --seconds 20   one quota, so many processes
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from batchllm_celery.models import Quota, QuotaLimits
from batchllm_celery.simulation.config import RateLimitHeaders, SimulationConfig
from benchmarks.lab import table
from tests.integration.virtual_fleet import Load, Seen, run
from tests.integration.virtual_redis import VirtualRedis
from tests.support import ValkeyServer

UNLIMITED = QuotaLimits.unlimited()
SIMPLE = Quota(name="q", limits=UNLIMITED)
THROUGHPUT = SIMPLE.model_copy(update={"adaptive_concurrency": True})


def fixed(limit: int) -> Quota:
    return Quota(name="q", limits=UNLIMITED.model_copy(update={"max_concurrency": limit}))


@dataclass(frozen=True)
class Server:
    """One provider; `best` is its best fixed limit, `mixed` prompts have 100 to 10,000 tokens."""

    settings: dict[str, Any]
    best: int
    mixed: bool = False


LENGTHS = {"output_tokens": 300, "output_tail": 0.8}
SERVERS = {
    "refuses beyond 4": Server({"refuse_beyond": 4, "latency": 2.0}, 4),
    "refuses beyond 32": Server({"refuse_beyond": 32, "latency": 2.0}, 32),
    "refuses beyond 200": Server({"refuse_beyond": 200, "latency": 2.0}, 200),
    "64 decode, the rest queues": Server({"decode_slots": 64, **LENGTHS}, 64),
    "64 decode, 32 queue, 503": Server({"decode_slots": 64, "decode_queue": 32, **LENGTHS}, 64),
    "64 decode, mixed prompts": Server(
        {"decode_slots": 64, "input_seconds": 0.1, **LENGTHS}, 64, mixed=True
    ),
    "529 to half, 20 of 120 s": Server(
        {"latency": 1.0, "burst_every": 120.0, "overload_status": 529}, 100
    ),
    "529 to 3 %, always": Server(
        {"latency": 1.0, "burst_every": 10.0, "burst_seconds": 10.0, "burst_share": 0.03}, 400
    ),
}


def mixed_prompt(draw: random.Random) -> int:
    return round(4 * 10 ** draw.uniform(2, 4))


def measure(redis: VirtualRedis, server: Server, quota: Quota, seconds: float) -> Seen:
    load = Load(prompt=mixed_prompt) if server.mixed else Load()
    return run(redis, SimulationConfig(**server.settings), quota, seconds, loads=[load])


def rows(redis: VirtualRedis, only: str, seconds: float) -> Iterator[tuple[str, ...]]:
    for name, server in SERVERS.items():
        if only not in name:
            continue
        since = seconds / 3
        best = measure(redis, server, fixed(server.best), seconds)
        for rule, quota in (("refusals", SIMPLE), ("throughput", THROUGHPUT)):
            seen = measure(redis, server, quota, seconds)
            share = seen.rate(since, seconds) / best.rate(since, seconds)
            slower = seen.latency(since, seconds) / best.latency(since, seconds)
            yield (
                name,
                rule,
                f"{share:.1%}",
                f"{seen.refused_share(since, seconds):.1%}",
                f"{slower:.2f}",
                f"{seen.worst_row}",
                f"{seen.round_trips / len(seen.served):.2f}",
            )


def many_workers(redis: VirtualRedis, workers: int, seconds: float) -> None:
    """So many processes of four slots each on one quota of their own size, told by headers."""
    rate = 2.0 * workers
    provider = SimulationConfig(
        rpm=60 * rate, latency=0.5, rate_limit_headers=RateLimitHeaders.OPENAI
    )
    redis.client.config_resetstat()
    began = time.monotonic()
    quota = Quota(name="q", limits=QuotaLimits(requests_per_minute=60 * rate))
    seen = run(redis, provider, quota, seconds, processes=workers, slots=4)
    spent = redis.client.info("commandstats")["cmdstat_evalsha"]
    since = seconds / 3
    print(
        f"{workers} workers, {rate:.0f}/s: used {seen.rate(since, seconds) / rate:.1%}, "
        f"refused {seen.refused_share(0, seconds):.2%}, "
        f"{seen.round_trips / len(seen.served):.2f} round trips a call, "
        f"{spent['usec'] / len(seen.served):.0f} us in the server a call, "
        f"{spent['usec'] / seconds / 1e4:.0f} % of a core ({time.monotonic() - began:.0f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--workers", type=int, help="processes on one quota, in place of servers")
    options = parser.parse_args()
    valkey = ValkeyServer().start()
    try:
        redis = VirtualRedis(valkey.url)
        if options.workers:
            many_workers(redis, options.workers, options.seconds)
            return
        head = ("server", "rule", "of the best", "refused", "p50", "worst row", "round trips")
        print(table([head, *rows(redis, options.only, options.seconds)]))
    finally:
        valkey.stop()


if __name__ == "__main__":
    main()
