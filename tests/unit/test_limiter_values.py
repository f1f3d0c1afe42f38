"""The limiter's pure parts: policies as data, estimates, sums of calls, records, the clock."""

from __future__ import annotations

import asyncio
import math
import struct
from typing import Any

import pytest
from pydantic import ValidationError

from batchllm_celery.compat.rate_limits import (
    ExponentialBackoffStrategy,
    FixedDelayStrategy,
    RateLimitStrategy,
    policy_from,
)
from batchllm_celery.limiter import (
    CallOutcome,
    Estimate,
    Estimator,
    Permit,
)
from batchllm_celery.limiter.permit import SettledCall
from batchllm_celery.limiter.protocol import AcquireReply, EndedCalls
from batchllm_celery.limiter.quota_client import ServerClock
from batchllm_celery.limiter.quota_state import LiveState, QuotaSetup
from batchllm_celery.limiter.records import lua_reader, pack, unpack
from batchllm_celery.limiter.settlements import Settlements
from batchllm_celery.models import Quota, QuotaLimits, RateLimitConfig, TokenUsage
from batchllm_celery.providers import GeminiStrategy, OpenAICompatibleStrategy, SimulatedStrategy
from batchllm_celery.strategies import (
    CallableStrategy,
    EscalatingStrategy,
    LLMCallStrategy,
    StructuredStrategy,
)


async def _ask(prompt: str) -> str:
    return prompt


def permit(epoch: int = 1, **more: object) -> Permit:
    values = {"start": 0.0, "id": 1, "estimate": Estimate(100, 50)}
    return Permit(quota="q", epoch=epoch, **{**values, **more})  # type: ignore[arg-type]  # a test's shorthand


def settle(*calls: SettledCall, epoch: int = 1, now: float = 11.0) -> dict[str, int]:
    """What a request would carry for these calls, if it differs from nothing."""
    settlements = Settlements()
    for call in calls:
        settlements.add(call, now)
    nothing = Settlements().request_fields(epoch, now)
    fields = settlements.request_fields(epoch, now)
    return {name: value for name, value in fields.items() if value != nothing[name]}


@pytest.mark.parametrize("said", [math.inf, "unlimited", " Unlimited "])
def test_unlimited_is_said_and_kept(said: Any) -> None:
    """It is another word than none: a limit that is named stays named in JSON."""
    limits = QuotaLimits(requests_per_minute=said, max_concurrency=4, requests_per_day=said)
    assert limits.finite() == {"max_concurrency": 4}
    assert limits.full_speed
    text = limits.model_dump_json()
    assert '"requests_per_minute":"unlimited"' in text
    assert '"max_concurrency":4}' in text
    assert QuotaLimits.model_validate_json(text) == limits
    assert QuotaLimits.unlimited().given() == dict.fromkeys(QuotaLimits.model_fields, math.inf)


@pytest.mark.parametrize(
    ("limits", "full_speed"),
    [
        (QuotaLimits(), False),
        (QuotaLimits.unlimited(), True),
        (QuotaLimits(tokens_per_minute=math.inf), True),
        (QuotaLimits(requests_per_minute=60, tokens_per_minute=math.inf), False),
        (QuotaLimits(max_concurrency=math.inf), False),
        (QuotaLimits(requests_per_day=math.inf, max_concurrency=8), False),
    ],
)
def test_full_speed_is_for_those_who_say_that_no_rate_limits(
    limits: QuotaLimits, full_speed: bool
) -> None:
    """A known rate limits whatever else is unlimited; slots and days say nothing of the rate."""
    assert limits.full_speed is full_speed


@pytest.mark.parametrize("wrong", [0, -1, math.nan, "infinite", "none"])
def test_a_limit_is_a_number_above_0_or_unlimited(wrong: Any) -> None:
    """Anything else is refused by name."""
    for name in QuotaLimits.model_fields:
        with pytest.raises(ValidationError, match=name):
            QuotaLimits(**{name: wrong})
    with pytest.raises(ValidationError, match="max_concurrency"):
        QuotaLimits(max_concurrency=2.5)


@pytest.mark.parametrize(
    ("strategy", "full_speed"),
    [
        (CallableStrategy(_ask), True),
        (CallableStrategy(_ask, model_name="openai:gpt-4.1-mini"), False),
        (StructuredStrategy(CallableStrategy(_ask), schema={"type": "object"}), True),
        (EscalatingStrategy([CallableStrategy(_ask), CallableStrategy(_ask)]), True),
        (EscalatingStrategy([CallableStrategy(_ask), GeminiStrategy("gemini-2.5-flash")]), False),
        (OpenAICompatibleStrategy("qwen3", base_url="http://localhost:8000/v1"), True),
        (OpenAICompatibleStrategy("gpt-5", base_url="https://api.openai.com/v1"), False),
        (SimulatedStrategy("simulated-1"), False),
    ],
)
def test_what_has_no_provider_begins_at_full_speed(
    strategy: LLMCallStrategy[Any], full_speed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local functions and servers of one's own; a provider's rate is found from below."""
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert strategy.full_speed is full_speed


def test_the_default_strategy_is_batch_llms() -> None:
    """300 s, times 1.5, at most 600 s; then 50 starts from 2 s down to 0.1 s."""
    policy = policy_from(ExponentialBackoffStrategy())
    assert policy.kind == "slow_start"
    assert policy.cooldowns == (300.0, 450.0, 600.0)
    assert len(policy.ramp) == 50
    assert policy.ramp[0] == 2.0
    assert policy.ramp[25] == pytest.approx(1.05)
    assert sum(policy.ramp) == pytest.approx(53.45)
    assert policy == policy_from(RateLimitConfig())


def test_no_configuration_is_the_adaptive_policy() -> None:
    """None brings no slow start."""
    assert policy_from(None).kind == "adaptive"


def test_a_fixed_delay_never_ends() -> None:
    """The delay after a fixed cooldown repeats for all starts."""
    policy = policy_from(FixedDelayStrategy(cooldown=5, delay=0.5))
    assert (policy.cooldowns, policy.ramp, policy.ramp_repeats) == ((5.0,), (0.5,), True)


def test_a_users_strategy_becomes_data() -> None:
    """Cooldowns and delays are asked for beforehand, in order."""

    class Linear(RateLimitStrategy):
        async def on_rate_limit(self, worker_id: int, consecutive_limit_count: int) -> float:
            return min(10.0 * consecutive_limit_count, 40.0)

        def should_apply_slow_start(self, items_since_resume: int) -> tuple[bool, float]:
            return items_since_resume < 3, 3.0 - items_since_resume

    policy = policy_from(Linear())
    assert policy.cooldowns == (10.0, 20.0, 30.0, 40.0)
    assert policy.ramp == (3.0, 2.0, 1.0)
    assert not policy.ramp_repeats
    assert policy.max_cooldown == 40.0


def test_a_strategy_that_waits_is_refused() -> None:
    """A cooldown must be computed, not awaited."""

    class Waits(FixedDelayStrategy):
        async def on_rate_limit(self, worker_id: int, consecutive_limit_count: int) -> float:
            await asyncio.sleep(0)
            return 1.0

    with pytest.raises(ValueError, match="without waiting"):
        policy_from(Waits())


def test_an_estimate_counts_bytes() -> None:
    """UTF-8 bytes / 3, so that Chinese counts about one token a character."""
    estimator = Estimator()
    assert estimator.estimate("s", "a" * 300).input_tokens == 100
    assert estimator.estimate("s", "汉" * 100).input_tokens == 100
    assert estimator.estimate("s", "x", 70) == Estimate(1, 70, guessed=True)


def test_estimates_learn_per_key() -> None:
    """Observed usage corrects the estimates of its own key only."""
    estimator = Estimator()
    for _ in range(30):
        estimator.observe("json", "a" * 300, TokenUsage(input_tokens=150, output_tokens=20))
    assert estimator.estimate("json", "a" * 300, 1000) == Estimate(150, 20)
    assert estimator.estimate("other", "a" * 300, 1000) == Estimate(100, 1000, guessed=True)


def test_what_is_reserved_for_many_sums_up_to_what_they_use() -> None:
    """Long prompts of few tokens beside short ones of many: nothing is reserved in excess for good.

    (By the mean of their ratios it would be four times as much.)
    """
    estimator = Estimator()
    sizes = {"a" * 3000: 500, "b" * 30: 40}
    for prompt, tokens in list(sizes.items()) * 50:
        estimator.observe("s", prompt, TokenUsage(input_tokens=tokens, output_tokens=1))
    reserved = sum(estimator.estimate("s", prompt).input_tokens for prompt in sizes)
    assert reserved == pytest.approx(sum(sizes.values()), rel=0.06)


def test_actual_tokens_replace_the_estimate() -> None:
    """A success returns what it did not use; an unused permit returns everything."""
    usage = TokenUsage(input_tokens=80, output_tokens=70)
    succeeded = SettledCall(permit(), CallOutcome.SUCCEEDED, usage)
    assert settle(succeeded) == {"successes": 1, "debt_input": -20, "debt_output": 20}
    unused = SettledCall(permit(start=12.0), CallOutcome.UNUSED)
    assert settle(unused) == {
        "unused": 1,
        "reusable": 1,
        "reusable_input": 100,
        "reusable_output": 50,
    }


def test_what_first_guesses_reserved_too_much_is_forfeited() -> None:
    """Not what they reserved too little, and not what a refused one returns."""
    guess = Estimate(100, 50, guessed=True)
    usage = TokenUsage(input_tokens=80, output_tokens=70)
    succeeded = SettledCall(permit(estimate=guess), CallOutcome.SUCCEEDED, usage)
    assert settle(succeeded) == {"successes": 1, "forfeited_input": -20, "debt_output": 20}
    refused = SettledCall(permit(estimate=guess), CallOutcome.REFUSED)
    assert settle(refused) == {"refused_epoch": 1, "debt_input": -100, "debt_output": -50}


def test_of_unused_starts_only_those_ahead_go_to_others() -> None:
    """A start of the past made up for later would come on top of the rate; so would its tokens."""
    unused = [
        SettledCall(permit(2, start=start, estimate=Estimate(tokens, 1)), CallOutcome.UNUSED)
        for start, tokens in ((9.0, 100), (9.9, 10), (10.1, 7))
    ]
    assert settle(*unused, epoch=2, now=10.0) == {
        "unused": 3,
        "reusable": 1,
        "reusable_input": 7,
        "reusable_output": 1,
        "forfeited_input": -110,
        "forfeited_output": -2,
    }
    assert settle(*unused, epoch=3, now=10.0) == {"unused": 3}  # void since


@pytest.mark.parametrize(
    ("seconds", "sent"),
    [(math.inf, 32 * 86_400 * 10**6), (1e300, 32 * 86_400 * 10**6), (math.nan, -1), (-3.0, -1)],
)
def test_a_wait_that_nobody_can_wait_for_is_passed_on_as_one_that_can(
    seconds: float, sent: int
) -> None:
    """What a user's strategy raises must not break every request after it."""
    fields = settle(SettledCall(permit(), CallOutcome.REFUSED, retry_after=seconds))
    assert fields.get("retry_after_us", -1) == sent
    fields = settle(SettledCall(permit(), CallOutcome.DAY_EXHAUSTED, retry_after=seconds))
    assert fields["day_exhausted_us"] == max(sent, 0)


def test_a_success_of_an_older_epoch_is_late() -> None:
    """It counts as throughput, never as the success that ends an escalation."""
    calls = [SettledCall(permit(epoch), CallOutcome.SUCCEEDED) for epoch in (1, 2, 1)]
    assert settle(*calls, epoch=2) == {"successes": 1, "late_successes": 2}
    assert settle(*calls, epoch=3) == {"late_successes": 3}


def test_the_longest_retry_after_of_the_newest_epoch_counts() -> None:
    """Refusals of one burst are one event."""
    refused = [
        SettledCall(permit(epoch), CallOutcome.REFUSED, retry_after=wait)
        for epoch, wait in ((2, 3.0), (2, None), (1, 9.0))
    ]
    fields = settle(*refused)
    assert (fields["refused_epoch"], fields["retry_after_us"]) == (2, 3_000_000)


def test_overloads_and_other_failures_are_told_apart() -> None:
    """Only the former say something about the provider's room."""
    outcomes = (CallOutcome.OVERLOADED, CallOutcome.FAILED, CallOutcome.OVERLOADED)
    fields = settle(*(SettledCall(permit(), outcome) for outcome in outcomes))
    assert fields == {"overloads": 2, "other_failures": 1}


def ended(version: int, outcome: CallOutcome, latency: float = 0.0, tokens: int = 0) -> SettledCall:
    usage = TokenUsage(output_tokens=tokens)
    return SettledCall(permit(limit_version=version), outcome, usage, latency=latency)


def test_calls_are_told_apart_by_the_limit_that_they_began_under() -> None:
    """Oldest first; nothing travels while there is neither a limit nor an overload."""
    settlements = Settlements()
    settlements.add(ended(-1, CallOutcome.SUCCEEDED), 11.0)
    assert settlements.ended_calls(limited=False) == []
    settlements.add(ended(7, CallOutcome.OVERLOADED), 11.0)
    settlements.add(ended(5, CallOutcome.SUCCEEDED, latency=2.0, tokens=80), 11.0)
    settlements.add(ended(5, CallOutcome.SUCCEEDED, latency=1.0, tokens=30), 11.0)
    sums = settlements.ended_calls(limited=False)
    assert [(one.version, one.successes, one.overloads) for one in sums] == [
        (-1, 1, 0),
        (5, 2, 0),
        (7, 0, 1),
    ]
    assert (sums[1].seconds, sums[1].tokens) == (3.0, 150.0)
    assert sums[1].squares == pytest.approx(4 / 100 + 1 / 50)
    assert unpack(EndedCalls, pack(sums[1])) == sums[1]


def test_what_calls_carry_of_old_limits_is_bounded() -> None:
    """Hundreds of versions in one request: the oldest are summed up."""
    settlements = Settlements()
    for version in range(100):
        settlements.add(ended(version, CallOutcome.OVERLOADED), 11.0)
    sums = settlements.ended_calls(limited=True)
    assert len(sums) <= 8
    assert sum(one.overloads for one in sums) == 100
    assert sums[-1].version == 99


def test_a_reply_is_read() -> None:
    """Numbers, flags, and the starts that follow them."""
    sent = AcquireReply(
        epoch=17,
        now_us=1_000_000,
        cooldown_until_us=3_000_000,
        ask_again_us=250_000.5,
        exhausted_until_us=0,
        consecutive_cooldowns=2,
        tokens_limited=True,
        slots_limited=False,
        probing=False,
        may_prefetch=True,
        oversize=False,
        held_up=True,
    )
    reply = AcquireReply.parse(pack(sent) + struct.pack("<2I", 0, 100_000))
    assert reply.starts_us == (0, 100_000)
    assert (reply.epoch, reply.ask_again_us, reply.consecutive_cooldowns) == (17, 250_000.5, 2)
    assert (reply.tokens_limited, reply.slots_limited, reply.held_up) == (True, False, True)
    assert reply.cooldown == 2.0


def test_a_record_keeps_numbers_and_strings() -> None:
    """Also where a newer version has added to it."""
    live = LiveState(epoch=7, search_rate=2.5, success_since_cut=False, run_id="abc")
    assert unpack(LiveState, pack(live)) == live
    assert unpack(LiveState, pack(live) + struct.pack("<d", 1.0)) == live


def test_lua_reads_the_defaults_of_a_quota_that_nobody_configured() -> None:
    """They are those of a `Quota` with nothing but a name."""
    assert QuotaSetup.of(Quota(name="q")) == QuotaSetup()
    assert "adaptive = 1.0" in lua_reader("setup", QuotaSetup)


def test_a_slow_reply_does_not_shift_starts() -> None:
    """The quickest round trip tells the offset; the answer stays within the round trip."""
    clock = ServerClock()
    assert clock.local(100.0, 100.010, 50_000_000) == pytest.approx(100.010)
    assert clock.local(101.0, 101.500, 51_001_000) == pytest.approx(101.011)


def test_a_server_whose_clock_jumped_does_not_shift_starts() -> None:
    """Whatever the server's clock says, its answer came between sending and receiving."""
    clock = ServerClock()
    clock.local(100.0, 100.010, 50_000_000)
    assert clock.local(101.0, 101.010, 90_000_000) == 101.010
    assert clock.local(102.0, 102.010, 10_000_000) == 102.0
