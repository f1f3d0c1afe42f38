"""The limiter's pure parts: policies as data, estimates, sums of outcomes, the server's clock."""

from __future__ import annotations

import asyncio
import math
import struct
from typing import Any

import pytest
from pydantic import ValidationError

from batchllm_celery.limiter import (
    CallOutcome,
    Estimate,
    Estimator,
    ExponentialBackoffStrategy,
    FixedDelayStrategy,
    Permit,
    RateLimitStrategy,
    policy_from,
)
from batchllm_celery.limiter.pending import Pending, Unused
from batchllm_celery.limiter.wire import Reply, ServerClock
from batchllm_celery.models import QuotaLimits, RateLimitConfig, TokenUsage
from batchllm_celery.strategies import (
    CallableStrategy,
    EscalatingStrategy,
    GeminiStrategy,
    LLMCallStrategy,
    OpenAICompatibleStrategy,
    SimulatedStrategy,
    StructuredStrategy,
)


async def _ask(prompt: str) -> str:
    return prompt


def permit(generation: int = 1, **more: object) -> Permit:
    values = {"start": 0.0, "id": 1, "estimate": Estimate(100, 50)}
    return Permit(quota="q", generation=generation, **{**values, **more})  # type: ignore[arg-type]  # a test's shorthand


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


def test_sums_replace_estimates_by_actual_tokens() -> None:
    """A success refunds what it did not use; an unused permit gives everything back."""
    pending = Pending()
    usage = TokenUsage(input_tokens=80, output_tokens=70)
    pending.add(permit(), CallOutcome.SUCCEEDED, 11.0, usage)
    pending.add(permit(start=12.0), CallOutcome.UNUSED, 11.0)
    assert pending.arguments(1, 11.0)[:9] == [1, 1, 0, 1, 1, 100, 50, -20, 20]


def test_what_first_guesses_reserved_too_much_is_told_apart() -> None:
    """Beside it: what they reserved too little, and what a refused one gives back whole."""
    guess = Estimate(100, 50, guessed=True)
    pending = Pending()
    usage = TokenUsage(input_tokens=80, output_tokens=70)
    pending.add(permit(estimate=guess), CallOutcome.SUCCEEDED, 11.0, usage)
    assert (pending.guessed_input, pending.guessed_output) == (-20, 0)
    assert (pending.input_tokens, pending.output_tokens) == (0, 20)
    pending.add(permit(estimate=guess), CallOutcome.REFUSED, 11.0)
    assert (pending.input_tokens, pending.output_tokens) == (-100, 20 - 50)
    assert pending.arguments(0, 11.0)[7:11] == [-100, -30, -20, 0]


def test_of_unused_starts_only_those_ahead_go_to_others() -> None:
    """A start of the past made up for later would come on top of the rate; so would its tokens."""
    pending = Pending()
    for start, tokens in ((9.0, 100), (9.9, 10), (10.1, 7)):
        pending.unused.append(Unused(start, 2, Estimate(tokens, 1)))
    assert pending.arguments(2, now=10.0)[3:11] == [3, 1, 7, 1, 0, 0, -110, -2]
    assert pending.arguments(3, now=10.0)[3:11] == [3, 0, 0, 0, 0, 0, 0, 0]  # void since


@pytest.mark.parametrize(
    ("seconds", "sent"),
    [(math.inf, 32 * 86_400 * 10**6), (1e300, 32 * 86_400 * 10**6), (math.nan, -1), (-3.0, -1)],
)
def test_a_wait_that_nobody_can_wait_for_is_told_as_one_that_can(seconds: float, sent: int) -> None:
    """What a user's strategy raises must not break every question after it."""
    pending = Pending()
    pending.add(permit(), CallOutcome.REFUSED, 11.0, retry_after=seconds)
    assert pending.arguments(1, 11.0)[12] == sent
    pending.add(permit(), CallOutcome.DAY_EXHAUSTED, 11.0, retry_after=seconds)
    assert pending.arguments(1, 11.0)[14] == max(sent, 0)


def test_a_success_of_an_older_generation_is_late() -> None:
    """It counts as throughput, never as the success that ends an escalation."""
    pending = Pending()
    pending.add(permit(1), CallOutcome.SUCCEEDED, 11.0)
    pending.add(permit(2), CallOutcome.SUCCEEDED, 11.0)
    pending.add(permit(1), CallOutcome.SUCCEEDED, 11.0)
    assert (pending.successes, pending.late_successes) == (1, 2)
    assert pending.arguments(3, 0.0)[:3] == [3, 0, 3]


def test_the_longest_retry_after_of_the_newest_generation_counts() -> None:
    """Refusals of one burst are one event."""
    pending = Pending()
    pending.add(permit(2), CallOutcome.REFUSED, 11.0, retry_after=3.0)
    pending.add(permit(2), CallOutcome.REFUSED, 11.0)
    pending.add(permit(1), CallOutcome.REFUSED, 11.0, retry_after=9.0)
    assert (pending.refused_generation, pending.retry_after) == (2, 3.0)


def test_a_reply_is_read() -> None:
    """Times come in microseconds; flags say what the quota limits."""
    numbers = (17, 1_000_000, 3_000_000, 250_000, 0, 33, 2, 1, 0, 100_000)
    reply = Reply.parse(struct.pack("<5d3I2I", *numbers))
    assert reply.generation == 17
    assert reply.cooldown == 2.0
    assert reply.again_in == 0.25
    assert reply.starts_in == pytest.approx((0.0, 0.1))
    assert reply.by_tokens
    assert reply.limited
    assert not reply.by_slots


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
