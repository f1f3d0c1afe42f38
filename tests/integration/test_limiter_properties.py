"""Random histories of a fleet before the limiter's scripts: what holds whatever happens.

The fleet itself states what must hold after each step (`Fleet.check_...`).
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator

import pytest

from batchllm_celery.limiter import CallOutcome, Estimate
from batchllm_celery.limiter.protocol import AcquireReply, AcquireRequest, acquire_arguments
from batchllm_celery.limiter.scripts import ACQUIRE
from batchllm_celery.models import CooldownPolicy, Quota, QuotaLimits
from tests.integration.limiter_fleet import BREAKER_FAILURES, Fleet, Process
from tests.integration.virtual_redis import VirtualRedis
from tests.support import ValkeyServer

LIMITS = {
    "requests_per_minute": (120, 600, 18_000),
    "tokens_per_minute": (6_000, 300_000),
    "input_tokens_per_minute": (4_000, 200_000),
    "output_tokens_per_minute": (2_000, 100_000),
    "requests_per_day": (12, 400),
    "max_concurrency": (1, 4, 20),
}
SLOW_START = CooldownPolicy(kind="slow_start", cooldowns=(1.0, 2.0, 5.0), ramp=(0.5, 0.4, 0.2))
ENDS = (CallOutcome.SUCCEEDED, CallOutcome.REFUSED, CallOutcome.OVERLOADED, CallOutcome.FAILED)


@pytest.fixture
def server(valkey: ValkeyServer) -> Iterator[VirtualRedis]:
    virtual = VirtualRedis(valkey.url)
    yield virtual
    virtual.client.close()


class History:
    """Thirty things that happen to a fleet, as a seed has it."""

    def __init__(self, server: VirtualRedis, seed: int, dimension: str) -> None:
        self.draw = draw = random.Random(seed)
        others = draw.sample(sorted(LIMITS.keys() - {dimension}), draw.choice([0, 0, 1, 5]))
        quota = Quota(
            name="q",
            limits=QuotaLimits(
                **{name: draw.choice(LIMITS[name]) for name in (dimension, *others)}
            ),
            policy=draw.choice([CooldownPolicy(), SLOW_START]),
            burst_seconds=draw.choice([0.0, 0.1, 1.0]),
        )
        self.server = server
        self.fleet = Fleet(
            server, quota, demand=draw.choice([0, 30, 30]), latency=draw.choice([0.1, 0.6])
        )
        self.steps = {
            self.waiters_come: 20,
            self.time_passes: 40,
            self.a_call_ends: 15,
            self.the_provider_changes: 8,
            self.waiters_are_cancelled: 5,
            self.a_request_is_repeated: 5,
            self.the_clock_goes_back: 4,
            self.redis_restarts: 1,
        }

    def run(self) -> None:
        for step in self.draw.choices(list(self.steps), list(self.steps.values()), k=30):
            step()
            state = self.fleet.state()
            assert 0 < state.rate_factor <= 1
            assert state.in_flight >= 0
            assert state.probing == (state.failures_in_a_row >= BREAKER_FAILURES)
        self.fleet.loop.close()

    def process(self) -> Process:
        return self.draw.choice(list(self.fleet.processes.values()))

    def waiters_come(self) -> None:
        process, draw = self.process(), self.draw
        estimate = Estimate(draw.randint(1, 400), draw.randint(0, 200), draw.random() < 0.3)
        for _ in range(draw.randint(1, 12)):
            self.fleet.join(process, estimate, draw.choice([0, 0, 5]))
        self.fleet.act(process)

    def time_passes(self) -> None:
        self.fleet.pass_time(self.draw.choice([0.0001, 0.05, 0.4, 1.0, 2.5]))

    def a_call_ends(self) -> None:
        busy = [process for process in self.fleet.processes.values() if process.calls]
        if not busy:
            return
        process, outcome = self.draw.choice(busy), self.draw.choice(ENDS)
        wait = self.draw.choice([None, 0.0, 0.5, 3.0])
        before, permit = self.fleet.state(), process.calls[0]
        self.fleet.end(process, outcome, used=self.draw.uniform(0.1, 2.0), wait=wait)
        after, current = self.fleet.state(), permit.epoch == before.epoch
        if outcome is CallOutcome.REFUSED and current:
            # One cooldown, at least as long as was asked for, and the pace is not raised by it.
            assert after.epoch > before.epoch
            assert after.consecutive == before.consecutive + 1
            assert after.cooldown_remaining >= (wait or 0) - 1e-5
            assert after.rate_factor <= before.rate_factor + 1e-9
        else:
            assert after.epoch == before.epoch
            assert after.consecutive <= before.consecutive
        if outcome is CallOutcome.SUCCEEDED and current:
            assert (after.consecutive, after.failures_in_a_row) == (0, 0)

    def the_provider_changes(self) -> None:
        """How calls that end by themselves end from now on."""
        self.fleet.provider = self.draw.choice(ENDS)

    def waiters_are_cancelled(self) -> None:
        process = self.process()
        for waiter in process.waiters[: self.draw.randint(1, 5)]:
            process.waiters.remove(waiter)
            process.queue.leave(waiter)

    def a_request_is_repeated(self) -> None:
        """The reply was lost: the same one comes, and nothing is counted twice."""
        last = self.process().last
        assert last is not None
        before = self.fleet.state()
        assert AcquireReply.parse(self.server.call(ACQUIRE, self.fleet.keys, last[0])) == last[1]
        assert self.fleet.state() == before

    def redis_restarts(self) -> None:
        """Nothing that was handed out before counts, and nobody starts for a while."""
        before = self.fleet.state()
        self.server.now = round(self.server.now + 0.5, 6)
        self.server.run_id = uuid.uuid4().hex
        reply = self.fleet.ask(self.process())
        assert reply.epoch > before.epoch
        assert reply.cooldown >= self.fleet.quota.horizon_seconds + 1 - 1e-5

    def the_clock_goes_back(self) -> None:
        """A clock that was set back a little stands still."""
        last, now = self.process().last, self.server.now
        assert last is not None
        self.server.now = round(now - 1.0, 6)
        arguments = acquire_arguments(f"bystander-{uuid.uuid4().hex}", AcquireRequest(sequence=1))
        reply = AcquireReply.parse(self.server.call(ACQUIRE, self.fleet.keys, arguments))
        self.server.now = now
        assert reply.now_us >= last[1].now_us


@pytest.mark.parametrize("dimension", LIMITS)
def test_no_history_breaks_what_the_limiter_promises(server: VirtualRedis, dimension: str) -> None:
    """Rates, the day and slots are kept; one cooldown for a burst; one probe; lost replies."""
    for seed in range(12):
        server.now += 100_000
        History(server, seed, dimension).run()


@pytest.mark.parametrize("limits", [QuotaLimits(requests_per_minute=600), QuotaLimits()])
def test_one_probe_at_a_time_until_the_provider_takes_calls_again(
    server: VirtualRedis, limits: QuotaLimits
) -> None:
    """The breaker under load: three processes, a provider that is down and comes back."""
    fleet = Fleet(server, Quota(name="q", limits=limits), demand=10, latency=0.1)
    fleet.pass_time(3)
    fleet.provider = CallOutcome.OVERLOADED
    begun = len(fleet.starts)
    fleet.pass_time(30)  # ten seconds after the last success overloads begin to count
    assert fleet.state().probing
    assert len(fleet.starts) - begun <= 60
    begun = len(fleet.starts)
    fleet.pass_time(60)
    assert 1 <= len(fleet.starts) - begun <= 10
    fleet.provider = CallOutcome.SUCCEEDED
    fleet.pass_time(40)
    assert not fleet.state().probing
    begun = len(fleet.starts)
    fleet.pass_time(5)
    assert len(fleet.starts) - begun >= 40
    fleet.loop.close()


@pytest.mark.parametrize(
    "limits", [QuotaLimits(requests_per_minute=1_200), QuotaLimits(max_concurrency=6)]
)
def test_processes_that_always_wait_share_alike(server: VirtualRedis, limits: QuotaLimits) -> None:
    """Whatever is scarce, the rate or the slots; and nearly all of it is used."""
    fleet = Fleet(server, Quota(name="q", limits=limits), demand=30, latency=0.3)
    fleet.pass_time(60)
    names = [name for _, name in fleet.starts]
    for name in fleet.processes:
        assert 0.28 <= names.count(name) / len(names) <= 0.39
    assert len(names) / 60 >= 0.8 * 20
    fleet.loop.close()
