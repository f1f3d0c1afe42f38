"""What the limiter costs: microseconds in the server per script, and round trips per item.

Run: python -m benchmarks.limiter_cost
"""

from __future__ import annotations

import asyncio
import statistics
import time

import redis

from batchllm_celery.connection import Connection
from batchllm_celery.keys import Keys
from batchllm_celery.limiter import CallOutcome, Estimate, Limiter
from batchllm_celery.limiter.protocol import (
    AcquireReply,
    AcquireRequest,
    EndedCalls,
    LimitReport,
    acquire_arguments,
)
from batchllm_celery.limiter.quota_state import configure_arguments
from batchllm_celery.limiter.scripts import ACQUIRE, CONFIGURE
from batchllm_celery.models import Quota, QuotaLimits, TokenUsage
from tests.support import ValkeyServer

ONE = Estimate(400, 100)
#: The machine is never idle: the best of so many rounds is what the script costs.
ROUNDS, CALLS = 20, 100
QUOTAS = {
    "requests": QuotaLimits(requests_per_minute=60e9),
    "requests+tokens": QuotaLimits(requests_per_minute=60e9, tokens_per_minute=60e12),
    "all dimensions": QuotaLimits(
        requests_per_minute=60e9,
        tokens_per_minute=60e12,
        input_tokens_per_minute=60e12,
        output_tokens_per_minute=60e12,
        requests_per_day=10**9,
        max_concurrency=10**6,
    ),
}


#: Of these the calls in flight are limited by what is learnt, and each request carries headers.
LEARNING = {"tokens, learning": QUOTAS["requests+tokens"]}


def server_time(url: str) -> None:
    client = redis.Redis.from_url(url)
    for name, limits in (QUOTAS | LEARNING).items():
        learning = name in LEARNING
        label = name.replace(" ", "-").replace(",", "")
        quota = Quota(name=label, limits=limits, adaptive_concurrency=learning)
        keys = Keys("cost").quota(quota.name)
        client.eval(CONFIGURE.text, 2, keys.state, keys.channel, *configure_arguments(quota))
        sha = client.script_load(ACQUIRE.text)
        head = [4, keys.state, keys.procs, keys.waiting, keys.channel]
        first = client.evalsha(sha, *head, *acquire_arguments("p1", AcquireRequest()))
        epoch = AcquireReply.parse(first).epoch
        for starts in (1, 16, 200):
            estimates = [ONE] * starts if name != "requests" else []
            request = AcquireRequest(
                wanted=starts,
                known_epoch=epoch,
                successes=starts,
                debt_input=-starts,
                debt_output=starts,
            )
            ended = EndedCalls(1, starts, 0, float(starts), 100.0 * starts, 0.01 * starts)
            report = LimitReport(True, 0.5e6, 1e9, 1e12, remaining_requests=1e9)
            learnt = ([ended], report) if learning else ()
            measured = []
            for sequence in range(ROUNDS * CALLS):
                if sequence % CALLS == 0:
                    client.config_resetstat()
                request.sequence = 1_000_000 * starts + sequence
                arguments = acquire_arguments("p1", request, estimates, *learnt)
                reply = AcquireReply.parse(client.evalsha(sha, *head, *arguments))
                # All of them were granted, but for those that the learnt limit leaves no room for.
                assert len(reply.starts_us) == starts or learning
                if sequence % CALLS == CALLS - 1:
                    measured.append(client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"])
            print(
                f"  {name:16} {starts:4d} starts: {min(measured):6.1f} us in the server "
                f"(median {statistics.median(measured):.1f})"
            )


async def round_trips(url: str, rate: float, slots: int, latency: float, seconds: float) -> None:
    async with (
        Connection(url) as connection,
        Limiter(connection, Keys(f"rt{rate}{slots}"), process_id="p1") as limiter,
    ):
        limits = QuotaLimits(
            requests_per_minute=max(rate, 1) * 60, tokens_per_minute=max(rate, 1) * 60_000
        )
        quota = Quota(name="q", limits=limits) if rate else Quota(name="q")
        await limiter.configure(quota)
        await connection.client.config_resetstat()
        done = 0
        end = time.monotonic() + seconds

        async def work() -> None:
            nonlocal done
            while time.monotonic() < end:
                permit = await limiter.acquire("q", Estimate(400, 100))
                await asyncio.sleep(latency)
                usage = TokenUsage(input_tokens=390, output_tokens=90)
                limiter.settle(permit, CallOutcome.SUCCEEDED, usage=usage)
                done += 1

        cpu = time.process_time()
        await asyncio.gather(*(work() for _ in range(slots)))
        cpu = time.process_time() - cpu
        calls = (await connection.client.info("commandstats"))["cmdstat_evalsha"]["calls"]
        print(
            f"  quota {rate or 'unknown':>7}/s, {slots:4d} slots: "
            f"{done / seconds:6.0f} starts/s, "
            f"{calls / done:.3f} round trips per item, {cpu / done * 1e3:.3f} ms CPU per item"
        )


async def main() -> None:
    valkey = ValkeyServer().start()
    try:
        print("in the server (settles included)")
        server_time(valkey.url)
        print("from one process (CPU: limiter, redis-py and the loop of this benchmark)")
        for rate, slots in ((50, 100), (200, 400), (1000, 50), (0, 500), (1000, 25)):
            await round_trips(valkey.url, rate, slots, 0.5, 8.0)
        await round_trips(valkey.url, 0, 500, 0.05, 8.0)
    finally:
        valkey.stop()


if __name__ == "__main__":
    asyncio.run(main())
