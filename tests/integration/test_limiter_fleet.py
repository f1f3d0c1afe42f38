"""The limiter under contention: several limiters, one real Valkey, real time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from batchllm_celery.compat.rate_limits import policy_from
from batchllm_celery.connection import Connection
from batchllm_celery.errors import QuotaConflictError, QuotaUnavailableError
from batchllm_celery.events import CooldownStarted, Event, Events
from batchllm_celery.keys import Keys
from batchllm_celery.limiter import CallOutcome, Estimate, Limiter, Permit
from batchllm_celery.models import Quota, QuotaLimits, RateLimitConfig, TokenUsage
from tests.support import Stalls, ValkeyServer, assert_within_rate, wait_until_async

ONE = Estimate(100, 50)


class Fleet:
    """Limiters as so many processes would have them, and the moments at which calls started.

    All of them live in one loop: how long the machine leaves it without a turn is their arrival
    jitter, and is noted.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self.url, self.keys = url, Keys(namespace)
        self.starts: list[tuple[float, str]] = []
        self.limiters: dict[str, Limiter] = {}
        self.seen: list[Event] = []
        self.stalls = Stalls()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Fleet:
        watch = asyncio.create_task(self.stalls.watch_loop())
        self._stack.callback(watch.cancel)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    def late(self, since: float, until: float) -> float:
        """By how much a start between these moments may be late: by a stall in it, or a reply
        that was read late and had the starts of the next half second."""
        return self.stalls.longest(since - 1, until)

    async def join(self, name: str) -> Limiter:
        connection = await self._stack.enter_async_context(Connection(self.url))
        limiter = Limiter(connection, self.keys, process_id=name, events=Events(self.seen.append))
        await self._stack.enter_async_context(limiter)
        self.limiters[name] = limiter
        return limiter

    async def call(
        self, name: str, quota: str, estimate: Estimate = ONE, seconds: float = 0.0
    ) -> None:
        """One call that succeeds."""
        limiter = self.limiters[name]
        permit = await limiter.acquire(quota, estimate)
        self.starts.append((time.monotonic(), name))
        await asyncio.sleep(seconds)
        usage = TokenUsage(input_tokens=estimate.input_tokens, output_tokens=estimate.output_tokens)
        limiter.settle(permit, CallOutcome.SUCCEEDED, usage=usage)

    def assert_within_quota(self, rate: float, *windows: float) -> None:
        """With the default burst of 0.1 s, and the jitter that this loop had."""
        moments = [at for at, _ in self.starts]
        assert_within_rate(moments, windows, rate, 0.1, lambda *span: 0.02 + self.late(*span))


@pytest.fixture
async def fleet(redis_url: str, namespace: str) -> AsyncIterator[Fleet]:
    async with Fleet(redis_url, namespace) as opened:
        yield opened


def per_second(rate: float, **more: object) -> Quota:
    return Quota(name="q", limits=QuotaLimits(requests_per_minute=rate * 60), **more)  # type: ignore[arg-type]  # a test's shorthand


async def flood(fleet: Fleet, names: list[str], count: int, seconds: float) -> None:
    """Everybody wants `count` calls; stop after `seconds`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(fleet.call(name, "q") for name in names for _ in range(count)))


async def test_no_window_holds_more_than_the_quota_even_when_a_process_joins(fleet: Fleet) -> None:
    """Four processes, then a fifth: every rolling window has at most rate * window + burst + 1."""
    names = [f"p{i}" for i in range(5)]
    for name in names:
        await fleet.join(name)
    await fleet.limiters["p0"].configure(per_second(100))
    await asyncio.gather(
        flood(fleet, names[:4], 300, 4.0),
        _later(1.5, flood(fleet, names[4:], 300, 2.5)),
    )
    fleet.assert_within_quota(100, 0.1, 0.5, 1.0, 3.0)
    moments = sorted(at for at, _ in fleet.starts)
    assert len(moments) >= 100 * (moments[-1] - moments[0] - fleet.stalls.total()) * 0.97


async def test_waiters_cancelled_while_a_request_is_written_harm_nobody(fleet: Fleet) -> None:
    """They are cancelled when their permits are on the way: nobody else is held up by that."""
    limiter = await fleet.join("p")
    limits = QuotaLimits(requests_per_minute=60_000, input_tokens_per_minute=60_000_000)
    await limiter.configure(Quota(name="q", limits=limits))
    await fleet.call("p", "q")
    await asyncio.sleep(0.3)
    waiting: list[asyncio.Task[Permit]] = []

    def estimate_then_cancel() -> Estimate:
        """The request that is being written asks for it; so does each caller before it waits."""
        estimate_then_cancel.calls += 1  # type: ignore[attr-defined]  # a counter of its own
        if estimate_then_cancel.calls > len(waiting):  # type: ignore[attr-defined]  # as above
            for task in waiting[:5]:
                task.cancel()
        return ONE

    estimate_then_cancel.calls = 0  # type: ignore[attr-defined]  # as above
    waiting += [asyncio.create_task(limiter.acquire("q", estimate_then_cancel)) for _ in range(20)]
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in done[:5])
    assert all(isinstance(one, Permit) for one in done[5:])


async def test_a_lost_channel_is_subscribed_to_again(fleet: Fleet, connection: Connection) -> None:
    """After its connection was cut, without a new quota to make it look."""
    limiter = await fleet.join("p")
    await limiter.configure(per_second(100))
    await fleet.call("p", "q")
    client: Any = connection.client
    channel = fleet.keys.quota("q").channel

    async def heard() -> bool:
        return bool((await client.pubsub_numsub(channel))[0][1])

    await wait_until_async(heard)
    await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")

    async def deaf() -> bool:
        return not await heard()

    await wait_until_async(deaf)
    await wait_until_async(heard)


async def test_a_request_that_fails_is_not_made_again_and_again(fleet: Fleet) -> None:
    """Whatever the fault is: who waits gets the error, no loop burns the machine, closing works."""
    limiter = await fleet.join("p")
    limits = QuotaLimits(tokens_per_minute=6_000)
    await limiter.configure(Quota(name="q", limits=limits))
    await fleet.call("p", "q", Estimate(6_000))  # whoever comes now waits for a minute
    writing = requests = 0

    def estimate() -> Estimate:
        """Fails whenever a request is written, not when a caller comes."""
        nonlocal requests
        if writing:
            return ONE
        requests += 1
        raise OverflowError

    ends = time.monotonic() + 0.4
    while time.monotonic() < ends:
        writing = 1
        waiter = asyncio.create_task(limiter.acquire("q", estimate))
        await asyncio.sleep(0)
        writing = 0
        with pytest.raises(OverflowError):
            await waiter
    assert 1 <= requests <= 3


async def _later(seconds: float, coroutine: object) -> None:
    await asyncio.sleep(seconds)
    await coroutine  # type: ignore[misc]  # a test's shorthand


async def test_two_processes_of_unequal_appetite_share_alike(fleet: Fleet) -> None:
    """Processes with 500 and with 60 waiters get between 45 and 55 % of the starts each."""
    for name in ("greedy", "modest"):
        await fleet.join(name)
    await fleet.limiters["greedy"].configure(per_second(60))

    async def worker(name: str) -> None:
        while True:
            await fleet.call(name, "q", seconds=0.1)

    tasks = [asyncio.create_task(worker("greedy")) for _ in range(500)]
    tasks += [asyncio.create_task(worker("modest")) for _ in range(60)]
    await wait_until_async(lambda: len(fleet.starts) >= 600, timeout=60)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    modest = sum(1 for _, name in fleet.starts if name == "modest")
    assert 0.45 <= modest / len(fleet.starts) <= 0.55, (modest, len(fleet.starts))


async def test_forty_refusals_at_once_are_one_cooldown(fleet: Fleet) -> None:
    """40 simultaneous 429s from 4 processes: one cooldown, one step of escalation, all succeed."""
    names = [f"p{i}" for i in range(4)]
    for name in names:
        await fleet.join(name)
    quota = per_second(1_000, burst_seconds=1.0)
    await fleet.limiters["p0"].configure(quota)
    barrier = asyncio.Barrier(40)
    again: list[float] = []

    async def call(name: str) -> None:
        limiter = fleet.limiters[name]
        permit = await limiter.acquire("q", ONE)
        await barrier.wait()
        limiter.settle(permit, CallOutcome.REFUSED, retry_after=0.8)
        permit = await limiter.acquire("q", ONE)
        again.append(time.monotonic())
        limiter.settle(permit, CallOutcome.SUCCEEDED)

    begun = time.monotonic()
    await asyncio.gather(*(call(name) for name in names for _ in range(10)))
    state = await fleet.limiters["p0"].state("q")
    cooldowns = {e.epoch for e in fleet.seen if isinstance(e, CooldownStarted)}
    assert len(again) == 40
    assert len(cooldowns) == 1
    assert {e.consecutive for e in fleet.seen if isinstance(e, CooldownStarted)} == {1}
    assert min(again) - begun >= 0.8
    assert state.consecutive in (0, 1)


async def test_a_refusal_stops_every_process_at_once(fleet: Fleet) -> None:
    """From 50 ms after one 429 until the cooldown's end no process starts a call."""
    names = [f"p{i}" for i in range(4)]
    for name in names:
        await fleet.join(name)
    unlucky = await fleet.join("unlucky")
    await unlucky.configure(per_second(200))
    flooding = asyncio.create_task(flood(fleet, names, 600, 4.0))
    await wait_until_async(lambda: len(fleet.starts) > 100)
    permit = await unlucky.acquire("q", ONE)
    refused_at = time.monotonic()
    unlucky.settle(permit, CallOutcome.REFUSED, retry_after=1.5)
    await flooding
    stopped = refused_at + 0.05 + fleet.late(refused_at, refused_at + 0.05)
    during = [at - refused_at for at, _ in fleet.starts if stopped < at < refused_at + 1.5]
    after = [at for at, _ in fleet.starts if at >= refused_at + 1.5]
    assert during == []
    assert after
    assert after[0] < refused_at + 1.8 + fleet.late(refused_at, after[0])


async def test_slow_start_is_one_sequence_for_the_fleet(fleet: Fleet) -> None:
    """With batch-llm's policy the i-th start of the fleet comes d_i after the one before it."""
    config = RateLimitConfig(
        cooldown_seconds=0.5,
        slow_start_items=10,
        slow_start_initial_delay=0.4,
        slow_start_final_delay=0.1,
    )
    names = [f"p{i}" for i in range(4)]
    for name in names:
        await fleet.join(name)
    await fleet.limiters["p0"].configure(Quota(name="q", policy=policy_from(config)))
    permit = await fleet.limiters["p0"].acquire("q", ONE)
    refused_at = time.monotonic()
    fleet.limiters["p0"].settle(permit, CallOutcome.REFUSED)
    await asyncio.sleep(0.05)
    await asyncio.gather(*(fleet.call(name, "q") for name in names for _ in range(4)))
    moments = sorted(at for at, _ in fleet.starts)
    delays = config.slow_start_delays()
    assert moments[0] - refused_at >= 0.5
    for i in range(1, 10):
        assert moments[i] >= refused_at + 0.5 + sum(delays[1 : i + 1])
        late = fleet.late(moments[i - 1], moments[i - 1])
        assert moments[i] - moments[i - 1] >= 0.95 * delays[i] - 0.01 - late


async def test_limits_change_for_everybody_within_a_second(fleet: Fleet) -> None:
    """A quota raised twentyfold at run time is used by a process that waits at the old rate."""
    for name in ("p0", "p1"):
        await fleet.join(name)
    await fleet.limiters["p0"].configure(per_second(2))
    flooding = asyncio.create_task(flood(fleet, ["p1"], 100, 3.0))
    await wait_until_async(lambda: len(fleet.starts) >= 2)
    changed = time.monotonic()
    await fleet.limiters["p0"].configure(per_second(40), update=True)
    await flooding
    second = [at for at, _ in fleet.starts if changed + 0.5 < at < changed + 1.5]
    assert len(second) >= 36 - 40 * fleet.late(changed, changed + 1.5)


async def test_a_differing_limit_is_refused_with_both_values(fleet: Fleet) -> None:
    """The same quota with another limit is a conflict that names what is in force."""
    limiter = await fleet.join("p0")
    await limiter.configure(per_second(2))
    assert await limiter.configure(per_second(2)) == per_second(2)
    with pytest.raises(QuotaConflictError, match=r"requests_per_minute: 120.0 .*, 180.0"):
        await limiter.configure(per_second(3))


async def test_concurrency_is_never_exceeded_and_no_slot_idles(fleet: Fleet) -> None:
    """Three processes with 6 slots between them: never 7 in flight, and nearly always 6."""
    names = ["a", "b", "c"]
    for name in names:
        await fleet.join(name)
    limits = QuotaLimits(max_concurrency=6, requests_per_minute=60_000)
    await fleet.limiters["a"].configure(Quota(name="q", limits=limits))
    running = most = 0

    async def call(name: str) -> None:
        nonlocal running, most
        permit = await fleet.limiters[name].acquire("q", ONE)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.1)
        running -= 1
        fleet.limiters[name].settle(permit, CallOutcome.SUCCEEDED)

    begun = time.monotonic()
    await asyncio.gather(*(call(name) for name in names for _ in range(40)))
    assert most == 6
    assert time.monotonic() - begun < 2 * 120 / 6 * 0.1


async def test_the_day_is_over_for_all_waiters_at_once(fleet: Fleet) -> None:
    """Requests beyond the day's are refused at once with the moment of the reset."""
    limiter = await fleet.join("p0")
    await limiter.configure(Quota(name="q", limits=QuotaLimits(requests_per_day=5)))
    results = await asyncio.gather(
        *(fleet.call("p0", "q") for _ in range(8)), return_exceptions=True
    )
    errors = [r for r in results if isinstance(r, QuotaUnavailableError)]
    assert len(fleet.starts) == 5
    assert len(errors) == 3
    assert time.time() < errors[0].resets_at <= time.time() + 86_400
    assert (await limiter.state("q")).day_used == 5


async def test_a_provider_that_says_the_day_is_over_is_believed(fleet: Fleet) -> None:
    """After DAY_EXHAUSTED nobody starts; waiters get the error."""
    limiter = await fleet.join("p0")
    permit = await limiter.acquire("q", ONE)
    limiter.settle(permit, CallOutcome.DAY_EXHAUSTED)

    async def refused() -> bool:
        try:
            limiter.settle(await limiter.acquire("q", ONE), CallOutcome.UNUSED)
        except QuotaUnavailableError:
            return True
        return False

    await wait_until_async(refused, timeout=3)


async def test_requests_larger_than_the_bucket_run(fleet: Fleet) -> None:
    """A request of 3 seconds' worth of tokens runs, and those after it pay."""
    limiter = await fleet.join("p0")
    await limiter.configure(Quota(name="q", limits=QuotaLimits(tokens_per_minute=6_000)))
    begun = time.monotonic()
    await fleet.call("p0", "q", Estimate(250, 50))
    assert time.monotonic() - begun < 0.5
    await fleet.call("p0", "q", Estimate(10, 0))
    assert 2.5 < time.monotonic() - begun < 3.6


async def test_unused_tokens_are_refunded_and_overuse_is_owed(fleet: Fleet) -> None:
    """The bucket ends up where the actual tokens put it, not the estimates."""
    limiter = await fleet.join("p0")
    await limiter.configure(Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    permit = await limiter.acquire("q", Estimate(1_000, 1_000))
    usage = TokenUsage(input_tokens=3_000, output_tokens=2_000)
    limiter.settle(permit, CallOutcome.SUCCEEDED, usage=usage)
    limiter.settle(permit, CallOutcome.SUCCEEDED, usage=usage)

    async def owed() -> float:
        return (await limiter.state("q")).owed_seconds["tokens"]

    await wait_until_async(lambda: _over(owed, 3.0))
    assert await owed() < 5.2


async def _over(value: object, bound: float) -> bool:
    return bool(await value() > bound)  # type: ignore[operator]  # a test's shorthand


async def test_a_stalled_process_fires_nothing_late(fleet: Fleet) -> None:
    """A loop that stood still for a second with starts in hand does not make them together."""
    await fleet.join("p0")
    await fleet.limiters["p0"].configure(per_second(50))
    flooding = asyncio.create_task(flood(fleet, ["p0"], 300, 3.5))
    await wait_until_async(lambda: len(fleet.starts) > 20)
    time.sleep(1.0)  # the stall itself
    await flooding
    stalls = fleet.stalls.seen
    stalls.remove(max(stalls, key=lambda stall: stall[1] - stall[0]))  # of that, nothing is late
    fleet.assert_within_quota(50, 0.5)


async def test_cancelled_waiters_cost_nothing(fleet: Fleet) -> None:
    """Places of cancelled waiters go to those behind them."""
    await fleet.join("p0")
    await fleet.limiters["p0"].configure(per_second(20))
    impatient = [asyncio.create_task(fleet.call("p0", "q")) for _ in range(40)]
    await asyncio.sleep(0.1)
    for task in impatient:
        task.cancel()
    await asyncio.gather(*impatient, return_exceptions=True)
    done = len(fleet.starts)
    begun = time.monotonic()
    await flood(fleet, ["p0"], 100, 2.0)
    assert len(fleet.starts) - done >= 36 - 20 * fleet.late(begun, time.monotonic())


async def test_redis_killed_and_restarted_in_mid_run_never_exceeds_the_quota(
    namespace: str,
) -> None:
    """After a restart nothing starts for horizon + 1 s, then the run goes on at the quota."""
    server = ValkeyServer().start()
    try:
        async with Fleet(server.url, namespace) as fleet:
            for name in ("p0", "p1"):
                await fleet.join(name)
            await fleet.limiters["p0"].configure(per_second(50, horizon_seconds=1.0))
            flooding = asyncio.create_task(flood(fleet, ["p0", "p1"], 400, 8.0))
            await wait_until_async(lambda: len(fleet.starts) > 60)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            restarted = time.monotonic()
            await flooding
            late = fleet.late(restarted, restarted)
            since, until = restarted + 0.25 + late, restarted + 1.9 - late
            assert [at - restarted for at, _ in fleet.starts if since < at < until] == []
            assert len([at for at, _ in fleet.starts if at > restarted + 2]) > 100
            fleet.assert_within_quota(50, 1.0)
    finally:
        server.stop()


async def test_a_busy_process_makes_few_round_trips(fleet: Fleet, connection: Connection) -> None:
    """At 100 starts a second, settles included, at most 0.2 round trips per item."""
    await fleet.join("p0")
    await fleet.limiters["p0"].configure(per_second(100))
    before = (await connection.client.info("commandstats"))["cmdstat_evalsha"]["calls"]
    await flood(fleet, ["p0"], 400, 3.0)
    after = (await connection.client.info("commandstats"))["cmdstat_evalsha"]["calls"]
    assert (after - before) / len(fleet.starts) <= 0.2
