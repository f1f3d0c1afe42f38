"""A fleet in virtual time: the real wait queues of three processes before the real scripts.

It keeps what the provider would see, and states what must hold of it. Of the scripts' constants it
knows those that are promised: starts lie at most half a second ahead, a reply allows starts for a
quarter of a second, five failures in a row open the breaker.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from batchllm_celery.errors import QuotaUnavailableError
from batchllm_celery.keys import Keys
from batchllm_celery.limiter import CallOutcome, Estimate, Permit, QuotaState
from batchllm_celery.limiter.permit import SettledCall
from batchllm_celery.limiter.protocol import AcquireReply, AcquireRequest, acquire_arguments
from batchllm_celery.limiter.quota_state import configure_arguments, read_state
from batchllm_celery.limiter.scripts import ACQUIRE, CONFIGURE, STATE
from batchllm_celery.limiter.wait_queue import FRESHNESS_LEASE, SentRequest, Waiter, WaitQueue
from batchllm_celery.models import Quota, QuotaLimits, TokenUsage
from tests.integration.virtual_redis import VirtualRedis

LOOKAHEAD = 0.5
BREAKER_FAILURES = 5
DAY = 86_400
#: Starts are rounded up to whole microseconds, sums of floats are not exact.
ROUNDING = 1e-5
#: How much too early a timer may run.
TIMER_PRECISION = 1e-4


@dataclass
class Bound:
    """GCRA's promise for one dimension: any window holds at most rate x its length + a burst.

    A window is from one start to a later one, which is not part of it. Debts and refunds that were
    settled within it count: what was returned may be used again.
    """

    rate: float
    burst: float
    granted: float = 0.0
    """Units so far."""
    starts: list[tuple[float, float]] = field(default_factory=list)
    """In the order in which they were granted, each with the units granted before."""

    def settle(self, units: float) -> None:
        self.granted += units

    def start(self, at: float, units: float) -> None:
        for since, before in self.starts:
            if since <= at:
                assert self.granted - before <= self.rate * (at - since + self.burst + ROUNDING)
        self.starts.append((at, self.granted))
        self.granted += units


@dataclass
class Process:
    """One process: its wait queue, its calls in flight, and the last request that it made."""

    name: str
    queue: WaitQueue = field(default_factory=lambda: WaitQueue("q"))
    waiters: list[Waiter] = field(default_factory=list)
    calls: list[Permit] = field(default_factory=list)
    sequence: int = 0
    last: tuple[list[bytes | str | int | float], AcquireReply] | None = None


class Fleet:
    """Three processes that share one quota.

    Args:
        server: runs the scripts in virtual time.
        quota: what they share.
        demand: so many waiters stand in each process at least, all the time.
        latency: a call ends by itself after so many seconds, as `provider` says; None: never.
    """

    def __init__(
        self,
        server: VirtualRedis,
        quota: Quota,
        *,
        demand: int = 0,
        latency: float | None = None,
    ) -> None:
        self.demand, self.latency = demand, latency
        self.provider = CallOutcome.SUCCEEDED
        self.server, self.quota, self.begun = server, quota, server.now
        keys = Keys(f"t{uuid.uuid4().hex[:8]}").quota(quota.name)
        self.keys = [keys.state, keys.procs, keys.waiting, keys.channel]
        self.server.call(CONFIGURE, [keys.state, keys.channel], configure_arguments(quota))
        self.processes = {name: Process(name) for name in "abc"}
        self.starts: list[tuple[float, str]] = []
        self.days: dict[int, int] = {}
        self.epoch = 0
        self.epoch_began = self.cooldown_until = 0.0
        self.loop = asyncio.new_event_loop()
        self.bounds: dict[str, Bound] = {}
        for process in self.processes.values():
            self.ask(process)

    @property
    def limits(self) -> QuotaLimits:
        return self.quota.limits

    def state(self) -> QuotaState:
        return read_state("q", *self.server.call(STATE, [self.keys[0], self.keys[2]]))

    # -- what processes do

    def join(self, process: Process, estimate: Estimate, priority: int = 0) -> Waiter:
        waiter = Waiter(lambda: estimate, self.loop.create_future(), priority)
        process.queue.join(waiter)
        process.waiters.append(waiter)
        return waiter

    def act(self, process: Process) -> None:
        """What a timer would do now: end and start what is due, ask what is to be asked."""
        while len(process.waiters) < self.demand:
            self.join(process, Estimate(40 + len(process.waiters), 20))
        if self.latency is not None:
            while process.calls and process.calls[0].start <= self.server.now - self.latency:
                self.end(process, self.provider)
        self.start_due(process)
        if process.queue.next_request() <= self.server.now:
            self.ask(process)

    def start_due(self, process: Process) -> None:
        now = self.server.now
        process.queue.grant_due(now)
        for waiter in [waiter for waiter in process.waiters if waiter.permit.done()]:
            process.waiters.remove(waiter)
            if waiter.permit.cancelled() or waiter.permit.exception():
                continue
            permit = waiter.permit.result()
            assert process.queue.may_start(permit, now)
            process.calls.append(permit)
            self.starts.append((now, process.name))
            self.check_start(permit)

    def ask(self, process: Process) -> AcquireReply:
        now, queue = self.server.now, process.queue
        process.sequence += 1
        sent = queue.make_request(process.sequence, now)
        arguments = acquire_arguments(
            process.name, sent.request, sent.estimates, sent.ended, sent.report
        )
        reply = AcquireReply.parse(self.server.call(ACQUIRE, self.keys, arguments))
        process.last = arguments, reply
        self.check_reply(sent, reply)
        queue.accept(sent, reply, sent_at=now, replied_at=now, now=now)
        if reply.exhausted_until_us and not queue.reservations:
            queue.fail(QuotaUnavailableError("q", reply.exhausted_until_us * 1e-6))
        self.check_fleet(reply)
        return reply

    def end(
        self,
        process: Process,
        outcome: CallOutcome,
        *,
        used: float = 1.0,
        wait: float | None = None,
    ) -> None:
        """The oldest call ends; it used `used` times its estimate."""
        permit = process.calls.pop(0)
        usage = None
        if outcome is CallOutcome.SUCCEEDED:
            reserved = permit.estimate
            usage = TokenUsage(
                input_tokens=round(reserved.input_tokens * used),
                output_tokens=round(reserved.output_tokens * used),
            )
        process.queue.settle(SettledCall(permit, outcome, usage, wait), self.server.now)
        self.ask(process)

    def pass_time(self, seconds: float) -> None:
        """All processes act every 50 ms."""
        end = round(self.server.now + seconds, 6)
        while self.server.now < end:
            self.server.now = round(min(self.server.now + 0.05, end), 6)
            for process in self.processes.values():
                self.act(process)

    # -- what must hold

    def check_reply(self, sent: SentRequest, reply: AcquireReply) -> None:
        request, now = sent.request, self.server.now
        assert reply.epoch >= self.epoch
        if reply.epoch > self.epoch:
            self.epoch, self.epoch_began = reply.epoch, now
            self.bounds = {
                name: Bound(rate / 60, self.quota.burst_seconds)
                for name, rate in self.limits.finite().items()
                if name.endswith("_per_minute")
            }
        else:
            for name, units in _settled(request):
                if name in self.bounds:
                    self.bounds[name].settle(units)
        self.cooldown_until = now + reply.cooldown
        assert len(reply.starts_us) <= request.wanted + request.prefetch
        estimates = sent.estimates or [Estimate()] * request.wanted
        tokens = [*estimates, *[sent.prefetched] * request.prefetch]
        earliest = reply.cooldown
        for start_us, estimate in zip(reply.starts_us, tokens, strict=False):
            start = start_us * 1e-6
            assert earliest <= start <= LOOKAHEAD + ROUNDING
            for name, units in _units(estimate):
                if name in self.bounds:
                    self.bounds[name].start(now + start, units)
        if self.limits.requests_per_day:
            day = int(now // DAY)
            used = self.days.get(day, 0)
            self.days[day] = max(used - request.unused, 0) + len(reply.starts_us)
            assert self.days[day] <= self.limits.requests_per_day
        if reply.probing:
            assert len(reply.starts_us) <= 1

    def check_fleet(self, reply: AcquireReply) -> None:
        """Slots: permits of all processes. The breaker: one call at a time."""
        held = [p.queue.in_flight + len(p.queue.reservations) for p in self.processes.values()]
        if self.limits.max_concurrency:
            assert sum(held) <= self.limits.max_concurrency
        probes = sum(permit.probe for p in self.processes.values() for permit in p.calls)
        probes += sum(one.probe for p in self.processes.values() for one in p.queue.reservations)
        assert probes <= 1
        client = self.server.client
        assert all(client.ttl(key) > 0 for key in self.keys[:3] if client.exists(key))

    def check_start(self, permit: Permit) -> None:
        """Who has not heard of a cooldown starts for as long as its last reply allows."""
        now = self.server.now
        if now < self.cooldown_until - TIMER_PRECISION:
            assert now <= self.epoch_began + FRESHNESS_LEASE


def _units(estimate: Estimate) -> Iterator[tuple[str, float]]:
    yield "requests_per_minute", 1
    yield "tokens_per_minute", estimate.input_tokens + estimate.output_tokens
    yield "input_tokens_per_minute", estimate.input_tokens
    yield "output_tokens_per_minute", estimate.output_tokens


def _settled(request: AcquireRequest) -> Iterator[tuple[str, float]]:
    """Units that a request owes, or returns (negative)."""
    more_input = request.debt_input - request.reusable_input + request.forfeited_input
    more_output = request.debt_output - request.reusable_output + request.forfeited_output
    yield "requests_per_minute", -request.reusable
    yield "tokens_per_minute", more_input + more_output
    yield "input_tokens_per_minute", more_input
    yield "output_tokens_per_minute", more_output
