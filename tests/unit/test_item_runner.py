"""One item from prepare to its outcome, on a limiter and a gate that do what a test says."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import BaseModel

from batchllm_celery.errors import (
    FailureKind,
    FrameworkTimeoutError,
    ProviderError,
    QuotaUnavailableError,
)
from batchllm_celery.events import (
    AttemptFailed,
    AttemptStarted,
    Event,
    Events,
    ItemFinished,
    ItemStarted,
)
from batchllm_celery.execution import Gate, ItemJob, ItemRunner, OpenGate, Prices, Stopped
from batchllm_celery.execution.pricing import given_prices
from batchllm_celery.limiter import CallOutcome, Estimator
from batchllm_celery.models import (
    BatchState,
    Completion,
    ProcessorConfig,
    RetryConfig,
    RetryState,
    TokenUsage,
    WorkItemResult,
)
from batchllm_celery.models.rate_limits import RateLimits
from batchllm_celery.strategies import EscalatingStrategy
from batchllm_celery.strategies.base import LLMCallStrategy
from batchllm_celery.strategies.failures import stamp_model
from tests.support import wait_until_async

FAST = RetryConfig(initial_wait=0.001, max_wait=0.001, jitter=False)
FIFTEEN = {"input_tokens": 10, "output_tokens": 5}


@dataclass
class FakePermit:
    estimate: Any


@dataclass
class FakeLimiter:
    """Grants at once, unless told otherwise, and writes down how calls ended."""

    settled: list[CallOutcome] = field(default_factory=list)
    usages: list[TokenUsage | None] = field(default_factory=list)
    retry_afters: list[float | None] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    limits: list[RateLimits | None] = field(default_factory=list)
    others_succeed: bool = False
    error: Exception | None = None
    wait: float = 0.0
    open: int = 0
    stale: int = 0
    void: bool = False
    retries: list[bool] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)

    def beside_successes(self, quota: str) -> bool:
        return self.others_succeed

    def may_start(self, permit: FakePermit) -> bool:
        self.stale -= 1
        return self.stale < 0

    def is_void(self, permit: FakePermit) -> bool:
        return self.void

    async def acquire(
        self, quota: str, estimate: Any, *, priority: int, retry: bool, tried: int
    ) -> FakePermit:
        self.retries.append(retry)
        self.tried.append(tried)
        if self.wait:
            await asyncio.sleep(self.wait)
        if self.error is not None:
            raise self.error
        self.open += 1
        return FakePermit(estimate())

    def settle(
        self,
        permit: FakePermit,
        outcome: CallOutcome,
        *,
        usage: TokenUsage | None = None,
        retry_after: float | None = None,
        latency: float = 0.0,
        limits: RateLimits | None = None,
    ) -> None:
        self.latencies.append(latency)
        self.limits.append(limits)
        self.open -= 1
        self.settled.append(outcome)
        self.usages.append(usage)
        self.retry_afters.append(retry_after)


class Scripted(LLMCallStrategy[Any]):
    """Does what `steps` say, one per call of execute; the last one repeats."""

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)
        self.attempts: list[int] = []
        self.log: list[str] = []
        self.errors: list[tuple[Exception, int, RetryState | None]] = []

    async def prepare(self) -> None:
        self.log.append("prepare")

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Any:
        self.attempts.append(attempt)
        self.log.append("execute")
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if callable(step):
            step = await step()
        if isinstance(step, BaseException):
            raise step
        return step

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        self.log.append("on_error")
        self.errors.append((exception, attempt, state))

    async def cleanup(self) -> None:
        self.log.append("cleanup")


@dataclass
class Bench:
    """A runner with everything around it, and what came of it."""

    limiter: FakeLimiter = field(default_factory=FakeLimiter)
    events: list[Event] = field(default_factory=list)
    json_output: bool = True
    runner: ItemRunner = field(init=False)

    def __post_init__(self) -> None:
        self.runner = ItemRunner(
            cast(Any, self.limiter),
            Estimator(),
            Events(self.events.append),
            Prices(),
            json_output=self.json_output,
        )

    def job(self, strategy: LLMCallStrategy[Any], **changes: Any) -> ItemJob:
        config = changes.pop("config", ProcessorConfig(retry=FAST, timeout_per_item=5))
        values: dict[str, Any] = {
            "batch_id": "b",
            "item_id": "item-1",
            "index": 3,
            "prompt": "secret prompt",
            "context": {"row": 1},
            "strategy": strategy,
            "prepare": strategy.prepare,
            "quota": "q",
            "config": config,
            "gate": OpenGate(),
        }
        return ItemJob(**values | changes)

    async def run(self, strategy: LLMCallStrategy[Any], **changes: Any) -> Any:
        return await self.runner.run(self.job(strategy, **changes))

    async def result(
        self, strategy: LLMCallStrategy[Any], **changes: Any
    ) -> WorkItemResult[Any, Any]:
        result = await self.run(strategy, **changes)
        assert isinstance(result, WorkItemResult)
        assert self.limiter.open == 0, "every permit is settled exactly once"
        return result


def refused(retry_after: float | None = None) -> ProviderError:
    return ProviderError(
        "slow down", kind=FailureKind.RATE_LIMITED, status=429, retry_after=retry_after
    )


def pause(seconds: float) -> Callable[[], Awaitable[Any]]:
    async def step() -> Any:
        await asyncio.sleep(seconds)
        return "late", FIFTEEN

    return step


async def test_a_good_item_is_prepared_executed_and_cleaned_up() -> None:
    """The result carries output, tokens, attempts, context, index and times."""
    bench, strategy = Bench(), Scripted(("hello", FIFTEEN))
    result = await bench.result(strategy, queued_seconds=2.0)
    assert strategy.log == ["prepare", "execute", "cleanup"]
    assert (result.success, result.output, result.error, result.error_kind) == (
        True, "hello", None, None,
    )  # fmt: skip
    assert (result.item_id, result.index, result.context) == ("item-1", 3, {"row": 1})
    assert result.token_usage == {
        "input_tokens": 10, "output_tokens": 5, "total_tokens": 15, "cached_input_tokens": 0,
    }  # fmt: skip
    assert result.attempts == 1
    assert result.timing.queued == 2.0
    assert result.timing.total >= 2.0
    assert bench.limiter.settled == [CallOutcome.SUCCEEDED]
    assert bench.limiter.usages[0] == result.token_usage


async def test_execute_gets_its_four_arguments_by_position() -> None:
    """A strategy may name its parameters as it likes, and give `state` no default."""
    seen: list[Any] = []

    class Own(LLMCallStrategy[str]):
        async def execute(self, *given: Any) -> Any:
            seen.extend(given)
            return "ok", {}

    await Bench().result(Own())
    assert seen[:3] == ["secret prompt", 1, 5]
    assert isinstance(seen[3], RetryState)


async def test_tokens_of_failed_attempts_are_counted() -> None:
    """A failed attempt of 15 tokens and a good one of 15 give 30 (B1)."""
    failed = ProviderError("bad", kind=FailureKind.VALIDATION, usage=FIFTEEN)
    result = await Bench().result(Scripted(failed, ("ok", FIFTEEN)))
    assert result.success
    assert result.attempts == 2
    assert result.token_usage.total_tokens == 30


async def test_each_attempt_that_fails_costs_as_well() -> None:
    """The cost of an item is that of all its calls."""
    failed = ProviderError("bad", kind=FailureKind.VALIDATION, usage=FIFTEEN)
    once, twice = Scripted(("ok", FIFTEEN)), Scripted(failed, ("ok", FIFTEEN))
    once.model_name = twice.model_name = "gemini:gemini-2.5-flash"
    cheap = (await Bench().result(once)).cost
    dear = (await Bench().result(twice)).cost
    assert cheap is not None
    assert dear == pytest.approx(2 * cheap)


async def test_tokens_cost_what_the_model_costs_that_spent_them(tmp_path: Path) -> None:
    """A strategy of several models says which one failed, and which one answered."""
    file = tmp_path / "prices.json"
    prices = {"fake:good": {"input": 0, "output": 1000}, "fake:weak": {"input": 0, "output": 1}}
    file.write_text(json.dumps(prices))
    bench = Bench()
    bench.runner.prices = Prices(file)
    failed = ProviderError("bad", kind=FailureKind.VALIDATION, usage=FIFTEEN)
    stamp_model(failed, "fake:good")
    answer = Completion("ok", TokenUsage.of(FIFTEEN), {"model": "fake:weak"})
    result = await bench.result(Scripted(failed, answer))
    assert result.cost == pytest.approx(5 * 0.001 + 5 * 0.000001)


async def test_a_429_uses_up_no_attempt() -> None:
    """Three refusals and a success are a success at attempt 1, with max_attempts=3 (B3)."""
    bench, strategy = Bench(), Scripted(refused(7), refused(), refused(), ("ok", FIFTEEN))
    result = await bench.result(strategy)
    assert result.success
    assert strategy.attempts == [1, 1, 1, 1]
    assert result.attempts == 1
    assert bench.limiter.settled == [CallOutcome.REFUSED] * 3 + [CallOutcome.SUCCEEDED]
    assert bench.limiter.retry_afters[0] == 7


async def test_an_item_that_is_refused_while_others_succeed_fails_at_last() -> None:
    """A request that is too large for its quota must not cool the fleet down for ever."""
    bench = Bench()
    config = ProcessorConfig(retry=FAST, max_rate_limit_retries=4)

    async def refuse() -> Any:
        bench.runner.successes["q"] = bench.runner.successes.get("q", 0) + 1  # others succeed
        return refused()

    strategy = Scripted(refuse)
    result = await bench.result(strategy, config=config)
    assert result.error_kind is FailureKind.RATE_LIMITED
    assert len(strategy.attempts) == 5
    assert result.error == "ProviderError: slow down"


async def test_an_item_waits_on_while_nobody_succeeds() -> None:
    """A quota that is spent refuses everybody: that is no reason to fail an item."""
    config = ProcessorConfig(retry=FAST, max_rate_limit_retries=2)
    strategy = Scripted(*[refused()] * 30, ("ok", {}))
    result = await Bench().result(strategy, config=config)
    assert result.success


async def test_a_number_that_looks_like_a_status_is_not_one() -> None:
    """ValueError("Expected 4290 tokens") is a logic error: one execute, no cooldown (B4)."""
    bench, strategy = Bench(), Scripted(ValueError("Expected 4290 tokens"))
    result = await bench.result(strategy)
    assert result.error_kind is FailureKind.LOGIC_ERROR
    assert result.error == "ValueError: Expected 4290 tokens"
    assert strategy.attempts == [1]
    assert bench.limiter.settled == [CallOutcome.FAILED]


async def test_our_time_limit_has_its_own_error_with_the_numbers() -> None:
    """on_error sees a FrameworkTimeoutError with item, elapsed and limit; the cause is kept."""
    strategy = Scripted(pause(30), ("ok", {}))
    config = ProcessorConfig(retry=FAST, timeout_per_item=0.05)
    started = time.monotonic()
    result = await Bench().result(strategy, config=config)
    took = time.monotonic() - started
    assert result.success
    assert result.attempts == 2
    error, attempt, _ = strategy.errors[0]
    assert isinstance(error, FrameworkTimeoutError)
    assert error.elapsed is not None
    assert 0.049 < error.elapsed < took
    assert str(error) == f"Framework timeout after {error.elapsed:.1f}s (limit: 0.1s)"
    assert (attempt, error.item_id, error.timeout_limit) == (1, "item-1", 0.05)
    assert isinstance(error.__cause__, TimeoutError)


async def test_the_providers_own_timeout_stays_the_providers() -> None:
    """A TimeoutError that the client raised is not ours (B7)."""
    strategy = Scripted(TimeoutError("read timed out"))
    result = await Bench().result(strategy)
    assert result.error_kind is FailureKind.PROVIDER_TIMEOUT
    assert result.error == "TimeoutError: read timed out"
    assert result.attempts == 3


async def test_a_client_that_hides_our_cancellation_is_still_our_timeout() -> None:
    """SDKs turn a cancelled call into errors of their own: whose clock ran out decides."""

    async def hides() -> Any:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            raise ConnectionError("connection closed") from None

    config = ProcessorConfig(retry=RetryConfig(max_attempts=1), timeout_per_item=0.02)
    result = await Bench().result(Scripted(hides), config=config)
    assert result.error_kind is FailureKind.FRAMEWORK_TIMEOUT


async def test_item_timeout_bounds_waits_too() -> None:
    """Waiting for the quota counts, and cleanup still runs."""
    bench, strategy = Bench(FakeLimiter(wait=30)), Scripted(("ok", {}))
    started = time.monotonic()
    result = await bench.result(strategy, config=ProcessorConfig(item_timeout=0.05))
    took = time.monotonic() - started
    assert took < 5
    assert result.error_kind is FailureKind.FRAMEWORK_TIMEOUT
    message = r"FrameworkTimeoutError: Framework timeout after (\d\.\d)s \(limit: 0\.1s\)"
    told = re.fullmatch(message, str(result.error))
    assert told is not None
    assert 0.05 <= float(told[1]) <= took + 0.05  # one decimal
    assert strategy.log == ["prepare", "cleanup"]


async def test_item_timeout_in_mid_call_settles_the_permit() -> None:
    """The call may have been billed, so its tokens stay counted."""
    bench = Bench()
    result = await bench.result(Scripted(pause(30)), config=ProcessorConfig(item_timeout=0.05))
    assert result.error_kind is FailureKind.FRAMEWORK_TIMEOUT
    assert bench.limiter.settled == [CallOutcome.FAILED]


@pytest.mark.parametrize(
    "config",
    [
        ProcessorConfig(retry=RetryConfig(max_attempts=1), timeout_per_item=0.02),
        ProcessorConfig(item_timeout=0.05),
    ],
)
async def test_a_call_given_up_by_a_time_limit_is_told(config: ProcessorConfig) -> None:
    """The provider may bill it: the ledger counts it."""
    gate = ToldGate(None)
    await Bench().result(Scripted(pause(30)), config=config, gate=gate)
    assert gate.given_up == 1


async def test_an_item_that_spent_its_time_being_refused_failed_for_that() -> None:
    """At the item timeout, refusals are named as the reason."""

    async def refuse() -> Any:
        await asyncio.sleep(0.01)
        return refused()

    result = await Bench().result(Scripted(refuse), config=ProcessorConfig(item_timeout=0.1))
    assert result.error_kind is FailureKind.RATE_LIMITED


async def test_on_error_comes_before_the_retry_with_the_same_state() -> None:
    """Feedback left in the state reaches the next attempt; a raising on_error is only logged."""
    states: list[Any] = []

    class Learns(Scripted):
        async def execute(
            self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
        ) -> Any:
            states.append(None if state is None else state.get("feedback"))
            return await super().execute(prompt, attempt, timeout, state)

        async def on_error(
            self, exception: Exception, attempt: int, state: RetryState | None = None
        ) -> None:
            assert state is not None
            state.set("feedback", str(exception))
            raise RuntimeError("on_error is broken")

    bad = ProviderError("not JSON", kind=FailureKind.VALIDATION)
    result = await Bench().result(Learns(bad, ("ok", {})))
    assert result.success
    assert states == [None, "not JSON"]


async def test_validation_failures_are_retried_without_a_wait() -> None:
    """With a backoff of a minute, three tries at a valid answer still take no time."""
    bad = ProviderError("not JSON", kind=FailureKind.VALIDATION, usage=FIFTEEN)
    config = ProcessorConfig(retry=RetryConfig(initial_wait=60))
    result = await Bench().result(Scripted(bad), config=config)
    assert result.error_kind is FailureKind.VALIDATION
    assert result.token_usage.total_tokens == 45
    assert result.timing.waited < 1


async def test_a_failed_prepare_fails_the_item_with_its_message_and_cleans_up() -> None:
    """Execute is not called, on_error neither, cleanup is."""
    strategy = Scripted(("ok", {}))

    async def prepare() -> None:
        raise RuntimeError("no such model")

    result = await Bench().result(strategy, prepare=prepare)
    assert result.error == "RuntimeError: no such model"
    assert strategy.log == ["cleanup"]
    assert result.attempts == 0


async def test_a_failing_cleanup_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The item has its result already."""

    class Untidy(Scripted):
        async def cleanup(self) -> None:
            raise OSError("disk full")

    with caplog.at_level(logging.WARNING):
        result = await Bench().result(Untidy(("ok", {})))
    assert result.success
    assert "Cleanup failed for item-1: disk full" in caplog.messages


@pytest.mark.parametrize("hook", ["cleanup", "on_error"])
async def test_a_hook_that_hangs_holds_no_outcome(hook: str) -> None:
    """It has the time of an attempt: the answer is paid for, and others wait for the slot."""

    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    strategy = Scripted(ProviderError("busy"), ("ok", {}))
    setattr(strategy, hook, hang)
    async with asyncio.timeout(20):
        config = ProcessorConfig(retry=FAST, timeout_per_item=0.05)
        result = await Bench().result(strategy, config=config)
    assert result.output == "ok"


async def test_overload_is_reported_and_uses_up_attempts() -> None:
    """A 503 backs off and counts; the limiter hears of it."""
    bench = Bench()
    busy = ProviderError("busy", kind=FailureKind.OVERLOADED, status=503)
    result = await bench.result(Scripted(busy))
    assert result.attempts == 3
    assert bench.limiter.settled == [CallOutcome.OVERLOADED] * 3


async def test_a_days_quota_that_ends_in_a_call_parks_the_item() -> None:
    """The item goes back without an outcome, with the time to come again."""
    bench = Bench()
    gone = ProviderError("per day", kind=FailureKind.QUOTA_EXHAUSTED, retry_after=100)
    before = time.time()
    stopped = await bench.run(Scripted(gone))
    assert isinstance(stopped, Stopped)
    assert stopped.reason is BatchState.PARKED
    assert stopped.until is not None
    assert before + 99 < stopped.until < time.time() + 101
    assert bench.limiter.settled == [CallOutcome.DAY_EXHAUSTED]


async def test_a_days_quota_that_is_known_to_be_spent_parks_without_a_call() -> None:
    """The limiter's word is enough, and its reset time is passed on."""
    bench = Bench(FakeLimiter(error=QuotaUnavailableError("q", 1e9)))
    strategy = Scripted(("ok", {}))
    assert await bench.run(strategy) == Stopped(BatchState.PARKED, 1e9)
    assert strategy.log == ["prepare", "cleanup"]


async def test_a_permit_that_went_stale_at_the_gate_is_given_back() -> None:
    """The item asks for another one; it does not fire late into a cooldown."""
    bench, strategy = Bench(FakeLimiter(stale=2)), Scripted(("ok", {}))
    assert (await bench.result(strategy)).success
    assert bench.limiter.settled == [CallOutcome.UNUSED] * 2 + [CallOutcome.SUCCEEDED]


async def test_a_slow_gate_delays_a_call_and_never_makes_it_late() -> None:
    """Stale permits all go back; the gate's word holds for the next one, and is asked once."""
    bench, strategy = Bench(FakeLimiter(stale=50)), Scripted(("ok", {}))
    gate = ToldGate(FailureKind.CANCELLED, when=2)  # the second question would end it
    assert (await bench.result(strategy, gate=gate)).success
    assert bench.limiter.settled == [CallOutcome.UNUSED] * 50 + [CallOutcome.SUCCEEDED]
    assert bench.limiter.retries == [False] + [True] * 50


async def test_an_item_that_waits_out_a_cooldown_is_in_no_call() -> None:
    """Let in, then held up by another's refusal: the ledger hears that it is not calling, and is
    asked again when the wait is over."""
    bench, strategy = Bench(FakeLimiter(stale=1, void=True)), Scripted(("ok", {}))
    gate = ToldGate(FailureKind.CANCELLED, when=2)
    result = await bench.result(strategy, gate=gate)
    assert result.error_kind is FailureKind.CANCELLED  # the second question was asked
    assert gate.saved == [(0, 0, {}, 0)]
    assert gate.calling == [False]


async def test_a_stale_permit_is_no_call_until_the_next_one_comes() -> None:
    """A worker that stops meanwhile does not wait for it; the gate's word holds."""
    bench, strategy = Bench(FakeLimiter(stale=1)), Scripted(("ok", {}))
    gate = ToldGate(None)
    assert (await bench.result(strategy, gate=gate)).success
    assert gate.saved == []
    assert gate.calling == [False, True]


async def test_a_refused_item_goes_before_those_that_had_no_turn() -> None:
    """Its first place is at the end of the line, the later ones are at its head."""
    bench, strategy = Bench(), Scripted(refused(), refused(), ("ok", {}))
    assert (await bench.result(strategy)).success
    assert bench.limiter.retries == [False, True, True]


@pytest.mark.parametrize("known", [False, True])
async def test_a_days_quota_fails_the_item_by_choice(known: bool) -> None:
    """With parks=False nobody comes back tomorrow."""
    error = QuotaUnavailableError("q", 1e9) if known else None
    gone = ProviderError("per day", kind=FailureKind.QUOTA_EXHAUSTED)
    result = await Bench(FakeLimiter(error=error)).result(Scripted(gone), parks=False)
    assert result.error_kind is FailureKind.QUOTA_EXHAUSTED


async def test_what_happens_at_the_days_end_is_asked_when_it_comes() -> None:
    """The quota's setting may have been changed since the item was claimed."""
    answers = [False, True]

    async def parks() -> bool:
        return answers.pop(0)

    error = QuotaUnavailableError("q", 1e9)
    bench = Bench(FakeLimiter(error=error))
    assert (await bench.result(Scripted(("ok", {})), parks=parks)).error_kind == "quota_exhausted"
    assert isinstance(await bench.run(Scripted(("ok", {})), parks=parks), Stopped)


async def test_cancellation_passes_settles_and_cleans_up() -> None:
    """CancelledError is never swallowed, and leaves nothing behind."""
    bench, strategy = Bench(), Scripted(pause(30))
    task = asyncio.create_task(bench.run(strategy))
    await wait_until_async(lambda: strategy.attempts)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.limiter.settled == [CallOutcome.FAILED]
    assert strategy.log[-1] == "cleanup"


async def test_a_call_that_cancels_itself_is_a_failed_attempt() -> None:
    """A client that cancels its own tasks does not take the item with it: it is tried again."""

    async def cancelled(*_: object) -> Any:
        inner = asyncio.create_task(asyncio.sleep(30))
        inner.cancel()
        await inner

    bench = Bench()
    result = await bench.result(Scripted(cancelled, ("ok", {})))
    assert result.success
    assert bench.limiter.settled == [CallOutcome.FAILED, CallOutcome.SUCCEEDED]


class ToldGate(OpenGate):
    """Says `word` at the call that `when` counts; keeps what it was told to save."""

    def __init__(self, word: Any, when: int = 1) -> None:
        self.word = word
        self.when = when
        self.saved: list[tuple[int, int, dict[str, Any], int]] = []
        self.given_up = 0
        self.calling: list[bool] = []

    def gave_up(self) -> None:
        self.given_up += 1

    def calls(self, under_way: bool) -> None:
        self.calling.append(under_way)

    async def begin(self) -> FailureKind | BatchState | None:
        self.when -= 1
        if self.when > 0:
            return None
        if isinstance(self.word, BaseException):
            raise self.word
        answer: FailureKind | BatchState | None = self.word
        return answer

    async def save(
        self, attempts: int, refusals: int, state: RetryState, usage: TokenUsage, **_: Any
    ) -> None:
        self.saved.append((attempts, refusals, dict(state.data), usage.total_tokens))


async def test_a_cancelled_batch_ends_the_item_without_a_call() -> None:
    """The unused permit goes back."""
    bench, strategy = Bench(), Scripted(("ok", {}))
    result = await bench.result(strategy, gate=ToldGate(FailureKind.CANCELLED))
    assert result.error_kind is FailureKind.CANCELLED
    assert strategy.attempts == []
    assert bench.limiter.settled == [CallOutcome.UNUSED]


async def test_a_paused_batch_takes_the_item_back() -> None:
    """No outcome: it will be claimed again."""
    bench, strategy = Bench(), Scripted(("ok", {}))
    assert await bench.run(strategy, gate=ToldGate(BatchState.PAUSED)) == Stopped(BatchState.PAUSED)
    assert bench.limiter.settled == [CallOutcome.UNUSED]
    assert strategy.log == ["prepare", "cleanup"]


async def test_a_gate_that_fails_is_no_outcome_of_the_item() -> None:
    """Our own trouble passes through, the permit goes back, cleanup runs."""
    bench, strategy = Bench(), Scripted(("ok", {}))
    with pytest.raises(ConnectionError):
        await bench.run(strategy, gate=ToldGate(ConnectionError("redis")))
    assert bench.limiter.settled == [CallOutcome.UNUSED]
    assert strategy.log[-1] == "cleanup"


async def test_what_another_process_needs_is_saved_before_each_retry() -> None:
    """Attempts, refusals, state and tokens of the failed calls."""
    gate = ToldGate(None)
    broken = ProviderError("x", kind=FailureKind.CONNECTION, usage=FIFTEEN)
    await Bench().result(Scripted(broken, refused(), ("ok", FIFTEEN)), gate=gate)
    assert gate.saved == [(1, 0, {}, 15), (1, 1, {}, 15)]


async def test_an_item_goes_on_where_another_process_left_off() -> None:
    """After a move, attempts and tokens continue."""
    strategy = Scripted(("ok", FIFTEEN))
    result = await Bench().result(strategy, attempts=2, usage=TokenUsage(input_tokens=15))
    assert strategy.attempts == [3]
    assert result.attempts == 3
    assert result.token_usage.total_tokens == 30


async def test_a_retry_state_that_is_not_json_fails_the_item() -> None:
    """It could not survive a move, and must not be delivered for ever."""

    class Strict(ToldGate):
        async def save(self, *_: Any, **__: Any) -> None:
            raise TypeError("Object of type set is not JSON serializable")

    broken = ProviderError("x", kind=FailureKind.CONNECTION)
    result = await Bench().result(Scripted(broken), gate=Strict(None))
    assert result.error_kind is FailureKind.LOGIC_ERROR


async def test_a_dry_run_calls_no_provider_and_asks_no_quota() -> None:
    """Only dry_run is called: prepare may reach a provider too."""
    bench, strategy = Bench(), Scripted(AssertionError("called"))
    result = await bench.result(strategy, config=ProcessorConfig(dry_run=True))
    assert result.success
    assert result.output == "[DRY-RUN] Mock output for prompt: secret prompt..."
    assert result.token_usage.total_tokens == 150
    assert strategy.log == ["cleanup"]
    assert bench.limiter.settled == []


class Answer(BaseModel):
    value: float


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (Answer(value=1), {"value": 1.0}),
        ([Answer(value=2)], [{"value": 2.0}]),
        ("naïve", "naïve"),
        ("half \ud83d", "half ?"),
        ({"x": ["\ud83d"]}, {"x": ["?"]}),
        (float("nan"), None),
        ({"x": float("inf")}, {"x": None}),
        ((1, 2), [1, 2]),
        (None, None),
    ],
)
async def test_outputs_leave_as_json(output: Any, expected: Any) -> None:
    """Pydantic models become objects; what JSON can't say exactly becomes the nearest thing."""
    assert (await Bench().result(Scripted((output, {})))).output == expected


@pytest.mark.parametrize(
    "output",
    [object(), 10**5000, -(10**5000), {"a": [10**5000]}],
    ids=["object", "huge", "negative", "nested"],
)
async def test_an_output_without_json_form_fails_the_item_with_its_tokens(output: Any) -> None:
    """It was paid for, and must not be delivered again for ever."""
    result = await Bench().result(Scripted((output, FIFTEEN)))
    assert result.error_kind is FailureKind.LOGIC_ERROR
    assert result.error is not None
    assert result.error.startswith(f"TypeError: output of type {type(output).__name__}")
    assert result.token_usage.total_tokens == 15
    assert result.output is None


async def test_in_process_results_keep_the_strategys_own_objects() -> None:
    """Nothing has to leave the process there."""
    answer = Answer(value=1)
    result = await Bench(json_output=False).result(Scripted((answer, {})))
    assert result.output is answer


async def test_metadata_of_a_completion_reaches_the_result() -> None:
    """What has no JSON form in it is written as text."""
    done = Completion("ok", TokenUsage(), {"finish_reason": "STOP", "odd": {1, 2}})
    assert (await Bench().result(Scripted(done))).metadata == {
        "finish_reason": "STOP",
        "odd": [1, 2],
    }


@pytest.mark.parametrize("answer", ["just text", ("a", "b", "c"), ("ok", 7)])
async def test_an_answer_of_the_wrong_shape_is_the_strategys_mistake(answer: Any) -> None:
    """A bare string is not `(output, usage)`: no retry would change that."""
    strategy = Scripted(answer)
    result = await Bench().result(strategy)
    assert result.error_kind is FailureKind.LOGIC_ERROR
    assert strategy.attempts == [1]


async def test_events_tell_the_story_without_prompt_or_output() -> None:
    """Started once however many attempts; each failure; one end (B10)."""
    bench = Bench()
    broken = ProviderError("x", kind=FailureKind.CONNECTION)
    await bench.result(Scripted(broken, ("secret answer", FIFTEEN)))
    assert [type(event) for event in bench.events] == [
        ItemStarted, AttemptStarted, AttemptFailed, AttemptStarted, ItemFinished,
    ]  # fmt: skip
    assert "secret" not in repr(bench.events)
    failed = bench.events[2]
    assert isinstance(failed, AttemptFailed)
    assert (failed.attempt, failed.kind, failed.wait) == (1, FailureKind.CONNECTION, 0.001)


async def test_a_failed_item_says_so_in_its_last_event() -> None:
    """Kind and type of the error, for metrics."""
    bench = Bench()
    await bench.result(Scripted(ValueError("no")))
    last = bench.events[-1]
    assert isinstance(last, ItemFinished)
    assert (last.success, last.kind, last.error_type) == (
        False, FailureKind.LOGIC_ERROR, "ValueError",
    )  # fmt: skip


async def test_waits_and_calls_are_timed_apart() -> None:
    """`waited` for the quota, `executed` at the provider; every moment is in one of the parts."""
    bench = Bench(FakeLimiter(wait=0.05))
    result = await bench.result(Scripted(pause(0.1)))
    assert 0.04 < result.timing.waited < 0.09
    assert 0.09 < result.timing.executed < 0.2
    parts = result.timing.queued + result.timing.waited + result.timing.executed
    assert result.timing.total == pytest.approx(parts, abs=1e-9)


class SlowGate(OpenGate):
    """A Redis that takes its time."""

    async def begin(self) -> None:
        await asyncio.sleep(0.03)

    async def save(self, *_: Any, **__: Any) -> None:
        await asyncio.sleep(0.03)


@pytest.mark.parametrize(
    ("steps", "prepare", "queued", "waited", "executed"),
    [
        ([pause(0.02)], 0.1, 0.1, 0.03, 0.02),
        ([ProviderError("x", kind=FailureKind.CONNECTION), pause(0.02)], 0.0, 0.0, 0.09, 0.02),
        ([ProviderError("x", kind=FailureKind.INVALID_REQUEST)], 0.05, 0.05, 0.03, 0.0),
        ([OSError("no key")], -1.0, 0.0, 0.0, 0.0),
    ],
    ids=["a slow prepare", "a retry", "a failure", "a failed prepare"],
)
async def test_no_moment_of_an_item_is_lost(
    steps: list[Any], prepare: float, queued: float, waited: float, executed: float
) -> None:
    """Preparing is queueing; asking Redis, saving and backing off are waits."""

    class Slow(Scripted):
        async def prepare(self) -> None:
            if prepare < 0:
                raise OSError("no key")
            await asyncio.sleep(prepare)

    started = time.monotonic()
    result = await Bench().result(Slow(*steps), gate=SlowGate(), queued_seconds=2.0)
    took = time.monotonic() - started
    timing = result.timing
    assert timing.queued >= 2.0 + queued - 0.002
    assert timing.waited >= waited - 0.002
    assert timing.executed >= executed - 0.002
    parts = (timing.queued, timing.waited, timing.executed, timing.total)
    assert parts == tuple(round(part, 3) for part in parts)
    assert timing.total == pytest.approx(sum(parts[:3]), abs=1e-9)
    assert timing.total <= 2.0 + took + 0.002
    assert timing.total >= 2.0 + queued + waited + executed - 0.004


def forbidden(message: str = "Sorry, you have been blocked") -> ProviderError:
    return ProviderError(message, kind=FailureKind.CONTENT_BLOCKED, status=403)


async def test_a_403_on_everything_is_about_the_caller() -> None:
    """Twenty in a row of one batch, without a success: the last one has the kind that stops it."""
    bench = Bench()
    kinds = [
        (await bench.result(Scripted(forbidden()), batch_id="all")).error_kind for _ in range(20)
    ]
    assert kinds == [FailureKind.CONTENT_BLOCKED] * 19 + [FailureKind.AUTHENTICATION]
    other = await bench.result(Scripted(forbidden()), batch_id="another")
    assert other.error_kind is FailureKind.CONTENT_BLOCKED


@pytest.mark.parametrize(
    "between", [("fine", FIFTEEN), ProviderError("x", kind=FailureKind.CONTENT_BLOCKED)]
)
async def test_403s_of_some_rows_leave_the_others_alone(between: Any) -> None:
    """A success begins the count anew, and a safety filter's block is no 403."""
    bench = Bench()
    for number in range(60):
        step = between if number % 15 == 14 or isinstance(between, Exception) else forbidden()
        result = await bench.result(Scripted(step))
        assert result.error_kind in (None, FailureKind.CONTENT_BLOCKED)


async def test_a_token_budget_counts_an_estimate_where_the_server_tells_none() -> None:
    """Answers that fail to validate are paid for, too; what was estimated is marked, and costs
    nothing."""
    wrong = ProviderError("not JSON", kind=FailureKind.VALIDATION)
    result = await Bench().result(
        Scripted(wrong, ("a" * 300, {})), prompt="p" * 30, estimate_usage=True
    )
    assert result.token_usage == TokenUsage(input_tokens=20, output_tokens=100)
    assert result.metadata["usage_estimated"] is True
    assert result.cost is None
    told = await Bench().result(Scripted(("hello", FIFTEEN)), estimate_usage=True)
    assert (told.token_usage.total_tokens, told.metadata) == (15, {})
    unbound = await Bench().result(Scripted(("hello", {})))
    assert (unbound.token_usage.total_tokens, unbound.metadata) == (0, {})
    failed = await Bench().result(Scripted(OSError("never answered")), estimate_usage=True)
    assert (failed.token_usage.total_tokens, failed.metadata) == (0, {})


class Priced(Scripted):
    model_name = "openai:nobody-knows-it"


async def test_no_call_is_made_whose_price_nobody_knows_where_money_is_bounded() -> None:
    """The bound would never bind. A price that the batch brings is one."""
    strategy = Priced(("hello", {"input_tokens": 1_000_000, "output_tokens": 1_000_000}))
    result = await Bench().result(strategy, needs_prices=True)
    assert result.error_kind is FailureKind.INVALID_REQUEST
    assert "no price is known for openai:nobody-knows-it" in str(result.error)
    assert strategy.attempts == []
    for name in ("", "openai:nobody-knows-it"):
        prices = given_prices({name: (0.5, 2.0), "openai:other": (9.0, 9.0)})
        paid = await Bench().result(strategy, needs_prices=True, prices=prices)
        assert paid.cost == pytest.approx(2.5)
    unbound = await Bench().result(strategy)
    assert (unbound.success, unbound.cost) == (True, None)


async def test_each_model_that_an_item_may_escalate_to_needs_a_price() -> None:
    """The second one would be paid without being counted."""
    known, unknown = Scripted(("a", FIFTEEN)), Priced(("b", FIFTEEN))
    known.model_name = "openai:gpt-4.1-mini"
    levels = EscalatingStrategy([known, unknown])
    result = await Bench().result(levels, needs_prices=True)
    assert result.error_kind is FailureKind.INVALID_REQUEST
    assert (known.attempts, unknown.attempts) == ([], [])


def test_the_gate_protocol_is_what_open_gate_is() -> None:
    """OpenGate stands where the ledger's gate does."""
    gate: Gate = OpenGate()
    assert gate is not None


# -- overloads, logs and what strategies raise to end more than their item


def busy() -> ProviderError:
    return ProviderError("busy", kind=FailureKind.OVERLOADED, status=503)


async def test_an_overload_beside_successes_costs_no_attempt() -> None:
    """A server that takes four calls at once refuses the fifth: it is asked again, 20 times."""
    bench = Bench()
    bench.runner.succeeded_at["q"] = time.monotonic()
    strategy = Scripted(*[busy()] * 20, ("ok", FIFTEEN))
    result = await bench.result(strategy)
    assert result.success
    assert result.attempts == 1
    assert set(strategy.attempts) == {1}
    assert bench.limiter.settled == [CallOutcome.OVERLOADED] * 20 + [CallOutcome.SUCCEEDED]


async def test_overloads_cost_attempts_when_there_are_too_many_or_nobody_succeeds() -> None:
    """The 21st beside successes, and each one where no call gets through."""
    bench, many = Bench(), Scripted(busy())
    bench.runner.succeeded_at["q"] = time.monotonic()
    assert (await bench.result(many)).error_kind is FailureKind.OVERLOADED
    assert len(many.attempts) == 20 + 3
    alone, elsewhere = Scripted(busy()), Bench()
    elsewhere.runner.succeeded_at["another quota"] = time.monotonic()
    assert (await elsewhere.result(alone)).attempts == 3
    assert len(alone.attempts) == 3


async def test_overloads_of_the_first_moment_cost_nothing_once_others_succeed() -> None:
    """All slots asked at once, nobody had succeeded yet: the attempts are given back."""
    bench = Bench()

    async def others_are_answered() -> Any:
        bench.limiter.others_succeed = True
        return busy()

    strategy = Scripted(busy(), busy(), others_are_answered, *[busy()] * 3, ("ok", FIFTEEN))
    result = await bench.result(strategy)
    assert result.success
    assert result.attempts == 1


async def test_latencies_and_what_headers_said_reach_the_limiter() -> None:
    """Of good answers and of failures."""
    bench, limits = Bench(), RateLimits(quota="q")
    failure = ProviderError("no", kind=FailureKind.RATE_LIMITED)
    vars(failure)["limits"] = limits
    await bench.result(Scripted(failure, ("ok", FIFTEEN)))
    assert bench.limiter.limits == [limits, None]
    assert bench.limiter.latencies[1] > 0


async def test_without_a_ledger_the_calls_of_an_item_are_bounded_too() -> None:
    """The in-process API refuses the next call, naming the last error."""
    strategy = Scripted(refused())
    result = await Bench().result(strategy, gate=OpenGate(most_calls=7))
    assert len(strategy.attempts) == 7
    assert result.error_kind is FailureKind.EXHAUSTED
    assert "slow down" in (result.error or "")


async def test_a_bug_leaves_its_stack_in_the_log_once_and_no_word_of_the_row(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """File, line and type, once a minute for each place; the message may quote a prompt."""
    words = ["secret", "prompt"]

    async def quote() -> Any:
        raise KeyError(" ".join(words))

    bench = Bench()
    for _ in range(2):
        await bench.result(Scripted(quote))
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert [__file__ in message for message in errors] == [True]
    assert all("item-1" in message and "KeyError" in message for message in errors)
    assert not any("secret" in message for message in errors)


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError()])
async def test_what_a_provider_does_is_no_bug(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Time-outs and refused connections leave no stack in the log."""

    async def fail() -> Any:
        raise error

    result = await Bench().result(Scripted(fail, fail, fail))
    assert not result.success
    assert "raised at" not in caplog.text


async def test_a_coroutine_that_is_closed_is_not_answered() -> None:
    """GeneratorExit from outside ends the run, as Python wants it; one from inside is a bug."""

    async def forever() -> Any:
        await asyncio.sleep(60)

    bench = Bench()
    task = asyncio.ensure_future(bench.run(Scripted(forever)))
    await wait_until_async(lambda: bench.limiter.open == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.limiter.open == 0


async def test_a_figure_that_can_not_be_does_not_reach_the_quota() -> None:
    """10^12 tokens of one answer would hold a quota of 100,000 a minute up for years."""
    bench = Bench()
    result = await bench.result(Scripted(("ok", {"input_tokens": 10**12})))
    assert result.success
    assert result.token_usage.input_tokens == 10_000_000
    assert bench.limiter.usages == [None]


async def test_a_day_is_waited_for_no_longer_than_a_day() -> None:
    """Retry-After 1e300 would park the batch for ever."""
    error = ProviderError("x", kind=FailureKind.QUOTA_EXHAUSTED, retry_after=1e300)
    before = time.time()
    stopped = await Bench().run(Scripted(error))
    assert isinstance(stopped, Stopped)
    assert stopped.until is not None
    assert stopped.until <= before + 86_500
