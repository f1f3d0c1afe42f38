"""Random histories of a fleet before the limiter's scripts: what holds whatever happens."""

from __future__ import annotations

import uuid
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from batchllm_celery.limiter import CallOutcome, Estimate
from batchllm_celery.limiter.protocol import AcquireReply, AcquireRequest, acquire_arguments
from batchllm_celery.limiter.scripts import ACQUIRE
from batchllm_celery.models import CooldownPolicy, Quota, QuotaLimits
from tests.integration.limiter_fleet import BREAKER_FAILURES, Fleet, Process
from tests.integration.virtual_redis import VirtualRedis
from tests.support import ValkeyServer

LIMITS = {
    "requests_per_minute": st.sampled_from([120, 600, 18_000]),
    "tokens_per_minute": st.sampled_from([6_000, 300_000]),
    "input_tokens_per_minute": st.sampled_from([4_000, 200_000]),
    "output_tokens_per_minute": st.sampled_from([2_000, 100_000]),
    "requests_per_day": st.sampled_from([12, 100]),
    "max_concurrency": st.sampled_from([1, 4, 20]),
}
SLOW_START = CooldownPolicy(kind="slow_start", cooldowns=(1.0, 2.0, 5.0), ramp=(0.5, 0.4, 0.2))
NAMES = st.sampled_from("abc")


class FleetHistories(RuleBasedStateMachine):
    """The fleet itself states what must hold (`Fleet.check_...`)."""

    server: VirtualRedis

    @initialize(
        limits=st.fixed_dictionaries({}, optional=LIMITS),
        policy=st.sampled_from([CooldownPolicy(), SLOW_START]),
        burst=st.sampled_from([0.0, 0.1, 1.0]),
    )
    def configure(self, limits: dict[str, Any], policy: CooldownPolicy, burst: float) -> None:
        quota = Quota(name="q", limits=QuotaLimits(**limits), policy=policy, burst_seconds=burst)
        self.server.now = round(self.server.now + 1000, 6)
        self.fleet = Fleet(self.server, quota)

    def teardown(self) -> None:
        if hasattr(self, "fleet"):
            self.fleet.close()

    def process(self, name: str) -> Process:
        return self.fleet.processes[name]

    @rule(
        name=NAMES,
        count=st.integers(1, 12),
        estimate=st.builds(Estimate, st.integers(1, 400), st.integers(0, 200), st.booleans()),
        priority=st.sampled_from([0, 0, 5]),
    )
    def join(self, name: str, count: int, estimate: Estimate, priority: int) -> None:
        for _ in range(count):
            self.fleet.join(self.process(name), estimate, priority)
        self.fleet.act(self.process(name))

    @rule(seconds=st.sampled_from([0.0001, 0.05, 0.4, 1.0, 2.5]))
    def time_passes(self, seconds: float) -> None:
        self.fleet.pass_time(seconds)

    @precondition(lambda self: any(p.calls for p in self.fleet.processes.values()))
    @rule(
        data=st.data(),
        outcome=st.sampled_from(CallOutcome),
        used=st.floats(0.1, 2.0),
        wait=st.one_of(st.none(), st.floats(0, 20)),
    )
    def a_call_ends(
        self, data: st.DataObject, outcome: CallOutcome, used: float, wait: float | None
    ) -> None:
        if outcome is CallOutcome.DAY_EXHAUSTED:
            return  # for hours nothing would happen
        busy = [process for process in self.fleet.processes.values() if process.calls]
        process = data.draw(st.sampled_from(busy))
        before, permit = self.fleet.state(), process.calls[0]
        self.fleet.end(process, outcome, used=used, wait=wait)
        after = self.fleet.state()
        current = permit.epoch == before.epoch
        if outcome is CallOutcome.REFUSED and current:
            # One cooldown, as long as was asked for at least; the pace is not raised by it.
            assert after.epoch > before.epoch
            assert after.consecutive == before.consecutive + 1
            assert after.cooldown_remaining >= min(wait or 0, 600) - 1e-5
            assert after.rate_factor <= before.rate_factor + 1e-9
        else:
            assert after.epoch == before.epoch
            assert after.consecutive <= before.consecutive
        if outcome is CallOutcome.SUCCEEDED and current:
            assert (after.consecutive, after.failures_in_a_row) == (0, 0)

    @rule(name=NAMES)
    def a_waiter_is_cancelled(self, name: str) -> None:
        process = self.process(name)
        for waiter in process.waiters[:1]:
            process.waiters.remove(waiter)
            process.queue.leave(waiter)

    @rule(name=NAMES)
    def a_request_is_repeated(self, name: str) -> None:
        """The reply was lost: the same one comes, and nothing is counted twice."""
        last = self.process(name).last
        assert last is not None
        before = self.fleet.state()
        raw = self.server.call(ACQUIRE, self.fleet.keys, last[0])
        assert AcquireReply.parse(raw) == last[1]
        assert self.fleet.state() == before

    @rule()
    def redis_restarts(self) -> None:
        """Nothing that was handed out before counts, and nobody starts for a while."""
        before = self.fleet.state()
        self.server.now = round(self.server.now + 0.5, 6)
        self.server.run_id = uuid.uuid4().hex
        reply = self.fleet.ask(self.process("a"))
        assert reply.epoch > before.epoch
        assert reply.cooldown >= self.fleet.quota.horizon_seconds + 1 - 1e-5

    @rule()
    def the_clock_goes_back(self) -> None:
        """A clock that was set back a little stands still."""
        last, now = self.process("a").last, self.server.now
        before = last[1].now_us if last else 0
        self.server.now = now - 1.0
        arguments = acquire_arguments(f"bystander-{uuid.uuid4().hex}", AcquireRequest(sequence=1))
        reply = AcquireReply.parse(self.server.call(ACQUIRE, self.fleet.keys, arguments))
        self.server.now = now
        assert reply.now_us >= before

    @invariant()
    def the_state_makes_sense(self) -> None:
        if not hasattr(self, "fleet"):
            return
        state = self.fleet.state()
        assert 0 < state.rate_factor <= 1
        assert state.in_flight >= 0
        assert state.probing == (state.failures_in_a_row >= BREAKER_FAILURES)


def test_no_history_breaks_what_the_limiter_promises(valkey: ValkeyServer) -> None:
    """All six dimensions, both policies, cooldowns, the breaker, restarts, cancelled waiters."""
    FleetHistories.server = VirtualRedis(valkey.url)
    run_state_machine_as_test(
        FleetHistories,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            phases=[Phase.reuse, Phase.generate],  # a history is short enough to be read as it is
            suppress_health_check=list(HealthCheck),
        ),
    )
