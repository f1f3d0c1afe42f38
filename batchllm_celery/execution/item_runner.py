"""Drives one item: prepare -> [permit -> gate -> execute -> settle] until it ends -> cleanup.

Exceptions of a strategy become one `Failure` here and go no further. Exceptions of our own parts
(Redis away, say) pass: they are no outcome of the item.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from pydantic_core import PydanticSerializationError, from_json, to_json, to_jsonable_python

from batchllm_celery.errors import (
    FailureKind,
    FrameworkTimeoutError,
    QuotaUnavailableError,
    describe,
)
from batchllm_celery.events import AttemptFailed, AttemptStarted, Events, ItemFinished, ItemStarted
from batchllm_celery.execution.pricing import Prices
from batchllm_celery.execution.retry import delay_before_next, refused_too_often
from batchllm_celery.limiter import CallOutcome, Estimator, Limiter, Permit
from batchllm_celery.models import (
    FAILURE_POLICIES,
    NO_TOKENS,
    BatchState,
    Completion,
    Failure,
    ProcessorConfig,
    RetryState,
    Timing,
    TokenUsage,
    WorkItemResult,
)
from batchllm_celery.strategies.base import LLMCallStrategy, as_completion
from batchllm_celery.strategies.failures import classify, classify_for, priced_as

logger = logging.getLogger("batchllm_celery")

#: The word of the gate holds so many seconds. A permit may go stale (250 ms) while it is asked: the
#: item then takes another one, at the head of the line, and if that comes soon, calls at once. So
#: no call ever starts without a fresh permit, and a slow Redis delays it, but not for ever.
GATE_HOLDS = 2.0

_OUTCOMES = {
    FailureKind.RATE_LIMITED: CallOutcome.REFUSED,
    FailureKind.QUOTA_EXHAUSTED: CallOutcome.DAY_EXHAUSTED,
    FailureKind.OVERLOADED: CallOutcome.OVERLOADED,
}


class Gate(Protocol):
    """Asked before each call whether it may start; told what to remember before each wait."""

    async def begin(self) -> FailureKind | BatchState | None:
        """None: go on. A kind: the item ends with it. A state: the item goes back, no outcome."""

    async def save(
        self, attempts: int, refusals: int, state: RetryState, usage: TokenUsage
    ) -> None:
        """Keep what another process needs to go on from here."""

    def gave_up(self) -> None:
        """A call ran into a time limit of ours: the provider may bill it all the same."""

    def calls(self, under_way: bool) -> None:
        """A call starts now; or not yet, although `begin` let it in: it waits for a permit."""


class OpenGate:
    """A gate for one process without a ledger: always open, remembers nothing."""

    async def begin(self) -> FailureKind | BatchState | None:
        """Go on."""
        return None

    async def save(
        self, attempts: int, refusals: int, state: RetryState, usage: TokenUsage
    ) -> None:
        """Nothing to keep: the item can't move."""

    def gave_up(self) -> None:
        """Nobody counts."""

    def calls(self, under_way: bool) -> None:
        """Nobody asks."""


@dataclass(slots=True)
class ItemJob:
    """One item as the runner gets it; the counters go on from where another process left off.

    Args:
        prepare: brings the strategy into service, once per process (`Registry.prepare`).
        quota: name of the quota that its calls draw on.
        priority: 0 for usual; higher ones get this process' permits first.
        parks: whether the day's exhausted quota sends the item back (else it fails); a function is
            asked when that happens, because the quota's setting may change in mid-run.
    """

    batch_id: str
    item_id: str
    index: int
    prompt: str
    context: Any
    strategy: LLMCallStrategy[Any]
    prepare: Callable[[], Awaitable[None]]
    quota: str
    config: ProcessorConfig
    gate: Gate
    state: RetryState = field(default_factory=RetryState)
    attempts: int = 0
    refusals: int = 0
    usage: TokenUsage = NO_TOKENS
    queued_seconds: float = 0.0
    priority: int = 0
    parks: bool | Callable[[], Awaitable[bool]] = True
    error: Exception | None = None
    """The last exception of the strategy, for whoever runs in the same process."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The item has no outcome: it goes back to where it came from.

    Args:
        reason: the batch's state that stopped it (paused, parked).
        until: Unix time when the quota is there again, where it is known.
    """

    reason: BatchState
    until: float | None = None


_Outcome = Completion[Any] | Failure | Stopped


class ItemRunner:
    """Runs items of one process, any number at a time.

    Args:
        limiter: hands out start times.
        estimator: guesses a call's tokens and learns from the answers.
        events: who is told.
        prices: for each result's cost.
        json_output: whether outputs must leave the process as JSON (pydantic models are turned
            into it; what can't be fails its item). False keeps the strategy's own objects.
    """

    def __init__(
        self,
        limiter: Limiter,
        estimator: Estimator,
        events: Events,
        prices: Prices,
        *,
        json_output: bool = True,
    ) -> None:
        self.limiter = limiter
        self.estimator = estimator
        self.events = events
        self.prices = prices
        self.json_output = json_output
        self.successes: dict[str, int] = {}
        """Successful calls per quota, to tell a spent quota from an item that is refused."""

    async def run(self, job: ItemJob) -> WorkItemResult[Any, Any] | Stopped:
        """Drive `job` to its outcome. `cleanup` runs whatever happens.

        Raises:
            asyncio.CancelledError: when cancelled; the permit is settled and `cleanup` run.
        """
        if self.events.wants(ItemStarted):
            self.events.emit(ItemStarted(job.batch_id, job.item_id))
        run = _Run(self, job)
        try:
            outcome = await run.within_item_timeout()
        finally:
            await _clean_up(job)
        if isinstance(outcome, Stopped):
            return outcome
        result = run.result(outcome)
        if self.events.wants(ItemFinished):
            self.events.emit(_finished(job.batch_id, result))
        return result


def _not_ours(error: BaseException) -> bool:
    """Whether a cancellation came from inside the strategy (a client that cancels its own tasks):
    then the item is not to end with it."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and not task.cancelling()


async def _clean_up(job: ItemJob) -> None:
    try:
        await job.strategy.cleanup()
    except Exception as error:
        logger.warning(f"Cleanup failed for {job.item_id}: {error}")


class _Run:
    """One item's way through the runner: its clocks, and the steps of an attempt."""

    __slots__ = (
        "baseline",
        "cost",
        "executed",
        "had_turn",
        "job",
        "last",
        "let_in",
        "limit",
        "runner",
        "started",
        "waited",
    )

    def __init__(self, runner: ItemRunner, job: ItemJob) -> None:
        self.runner = runner
        self.job = job
        self.started = time.monotonic()
        self.waited = 0.0
        self.executed = 0.0
        self.limit = job.config.timeout_per_item
        self.last: Failure | None = None
        self.baseline: int | None = None
        self.had_turn = job.refusals > 0
        self.let_in = -math.inf
        self.cost = self._price(job.usage) if job.usage else None

    async def within_item_timeout(self) -> _Outcome:
        limit = self.job.config.item_timeout
        if limit is None:
            return await self._drive()
        try:
            async with asyncio.timeout(limit) as scope:
                return await self._drive()
        except TimeoutError:
            if not scope.expired():
                raise
            return self._out_of_time(limit)

    def _out_of_time(self, limit: float) -> Failure:
        # An item that spent its time being refused failed for that, not for slowness.
        if self.last is not None and self.last.kind is FailureKind.RATE_LIMITED:
            return self.last
        error = self._timeout_error(time.monotonic() - self.started, limit)
        self.job.error = error
        return classify(error)

    def _timeout_error(self, elapsed: float, limit: float) -> FrameworkTimeoutError:
        return FrameworkTimeoutError(
            f"Framework timeout after {elapsed:.1f}s (limit: {limit:.1f}s)",
            item_id=self.job.item_id,
            elapsed=elapsed,
            timeout_limit=limit,
        )

    async def _drive(self) -> _Outcome:
        if self.job.config.dry_run:
            return await self._rehearse()
        try:
            await self.job.prepare()
        except Exception as error:
            return self._failure(error)
        if self.job.strategy.model_name and not self.runner.prices.loaded:
            await self.runner.prices.load()
        while True:
            outcome = await self._attempt()
            if outcome is not None:
                return outcome

    async def _rehearse(self) -> _Outcome:
        """`dry_run` in place of the provider: no prepare (it may call one), no limiter."""
        refusal = _told(await self.job.gate.begin())
        if refusal is not None:
            return refusal
        self.job.attempts += 1
        try:
            completion = as_completion(await self.job.strategy.dry_run(self.job.prompt))
        except Exception as error:
            return self._failure(error)
        self._spend(completion.usage)
        return completion

    async def _attempt(self) -> _Outcome | None:
        """One call; None if another one follows."""
        try:
            permit = await self._permit()
        except QuotaUnavailableError as error:
            return await self._day_is_over(classify(error), error.until)
        if time.monotonic() - self.let_in > GATE_HOLDS:
            refusal = await self._ask_gate(permit)
            if refusal is not None:
                return refusal
        if not self.runner.limiter.may_start(permit):
            return await self._stand_back(permit)
        self.let_in = -math.inf
        answer = await self._call(permit)
        if isinstance(answer, Completion):
            self._succeeded(permit, answer)
            return answer
        return await self._failed(permit, answer)

    async def _permit(self) -> Permit:
        job, runner = self.job, self.runner
        strategy = job.strategy
        estimate = partial(
            runner.estimator.estimate, _estimate_key(job), job.prompt, strategy.max_output_tokens
        )
        asked = time.monotonic()
        try:
            return await runner.limiter.acquire(
                job.quota, estimate, priority=job.priority, retry=self.had_turn
            )
        finally:
            self.waited += time.monotonic() - asked

    async def _ask_gate(self, permit: Permit) -> Failure | Stopped | None:
        try:
            refusal = _told(await self.job.gate.begin())
        except BaseException:
            self.runner.limiter.settle(permit, CallOutcome.UNUSED)
            raise
        if refusal is not None:
            self.runner.limiter.settle(permit, CallOutcome.UNUSED)
        self.let_in = time.monotonic()
        return refusal

    async def _stand_back(self, permit: Permit) -> _Outcome | None:
        """Give a permit back that went stale while the gate was asked, and wait for another.

        After one that a cooldown made void the next comes no sooner than its end: till then the
        item is in no call, for the ledger either, or a death in this wait would count against it.
        """
        self.had_turn = True
        self.job.gate.calls(False)
        self.runner.limiter.settle(permit, CallOutcome.UNUSED)
        if not self.runner.limiter.is_void(permit):
            return None
        self.let_in = -math.inf
        return await self._save()

    async def _call(self, permit: Permit) -> Completion[Any] | Exception:
        """Execute once. Our own time limit is told from the provider's by whose clock ran out."""
        job = self.job
        if self.runner.events.wants(AttemptStarted):
            self.runner.events.emit(AttemptStarted(job.batch_id, job.item_id, job.attempts + 1))
        started = time.monotonic()
        scope = asyncio.timeout(self.limit)
        job.gate.calls(True)
        try:
            async with scope:
                answer = await job.strategy.execute(
                    job.prompt, job.attempts + 1, self.limit, job.state
                )
            return as_completion(answer)
        except Exception as error:
            if not scope.expired():
                return error
            job.gate.gave_up()
            timeout = self._timeout_error(time.monotonic() - started, self.limit)
            timeout.__cause__ = error
            return timeout
        except BaseException as error:
            if _not_ours(error):
                cut_off = RuntimeError("the strategy cancelled its own call")
                cut_off.__cause__ = error
                return cut_off
            # The provider may have begun to work: the tokens stay counted as estimated.
            job.gate.gave_up()
            self.runner.limiter.settle(permit, CallOutcome.FAILED)
            raise
        finally:
            self.executed += time.monotonic() - started

    def _succeeded(self, permit: Permit, completion: Completion[Any]) -> None:
        job, runner = self.job, self.runner
        usage = completion.usage
        runner.limiter.settle(permit, CallOutcome.SUCCEEDED, usage=usage)
        runner.successes[job.quota] = runner.successes.get(job.quota, 0) + 1
        if usage:
            runner.estimator.observe(_estimate_key(job), job.prompt, usage)
        job.attempts += 1
        self._spend(usage, completion.metadata.get("model"))

    async def _failed(self, permit: Permit, error: Exception) -> _Outcome | None:
        job = self.job
        attempt = job.attempts + 1
        failure = self._failure(error)
        self.runner.limiter.settle(
            permit,
            _OUTCOMES.get(failure.kind, CallOutcome.FAILED),
            usage=failure.usage or None,
            retry_after=failure.retry_after,
        )
        self._count(failure)
        await self._on_error(error, attempt)
        delay = self._delay(failure)
        self._tell(failure, attempt, delay)
        if delay is None:
            return failure
        return await self._before_next(failure, delay)

    def _failure(self, error: Exception) -> Failure:
        """The one translation of a strategy's exception; its tokens are counted here."""
        failure = classify_for(self.job.strategy, error)
        self.last = failure
        self.job.error = error
        self._spend(failure.usage, priced_as(error))
        return failure

    def _count(self, failure: Failure) -> None:
        if FAILURE_POLICIES[failure.kind].uses_attempt:
            self.job.attempts += 1
        elif failure.kind is FailureKind.RATE_LIMITED:
            self.job.refusals += 1
            self.had_turn = True
            if self.baseline is None:
                self.baseline = self.runner.successes.get(self.job.quota, 0)

    async def _on_error(self, error: Exception, attempt: int) -> None:
        try:
            await self.job.strategy.on_error(error, attempt, self.job.state)
        except Exception as raised:
            item_id = self.job.item_id
            logger.warning("on_error_failed item_id=%s error=%s", item_id, describe(raised))

    def _delay(self, failure: Failure) -> float | None:
        job = self.job
        if failure.kind is FailureKind.RATE_LIMITED:
            others = self.runner.successes.get(job.quota, 0) > (self.baseline or 0)
            if refused_too_often(job.refusals, job.config.max_rate_limit_retries, others):
                return None
        return delay_before_next(failure, job.attempts, job.config.retry)

    def _tell(self, failure: Failure, attempt: int, wait: float | None) -> None:
        job = self.job
        if self.runner.events.wants(AttemptFailed):
            name = _type_of(failure.message)
            self.runner.events.emit(
                AttemptFailed(job.batch_id, job.item_id, attempt, failure.kind, name, wait)
            )

    async def _before_next(self, failure: Failure, delay: float) -> _Outcome | None:
        unsaved = await self._save()
        if unsaved is not None:
            return unsaved
        if failure.kind is FailureKind.QUOTA_EXHAUSTED:
            asked = failure.retry_after
            until = None if asked is None else time.time() + asked
            return await self._day_is_over(failure, until)
        if delay:
            await asyncio.sleep(delay)
            self.waited += delay
        return None

    async def _save(self) -> Failure | None:
        job = self.job
        try:
            await job.gate.save(job.attempts, job.refusals, job.state, job.usage)
        except (TypeError, ValueError) as error:
            return Failure(
                FailureKind.LOGIC_ERROR,
                f"{type(error).__name__}: the retry state can't be written as JSON",
            )
        return None

    async def _day_is_over(self, failure: Failure, until: float | None) -> Failure | Stopped:
        parks = self.job.parks
        if parks if isinstance(parks, bool) else await parks():
            return Stopped(BatchState.PARKED, until)
        return Failure(FailureKind.QUOTA_EXHAUSTED, failure.message)

    def _spend(self, usage: TokenUsage, model: str | None = None) -> None:
        # Each call is priced by itself: some prices depend on the size of the one request.
        if not usage:
            return
        job = self.job
        job.usage = job.usage + usage if job.usage else usage
        cost = self._price(usage, model)
        if cost is not None:
            self.cost = cost + (self.cost or 0.0)

    def _price(self, usage: TokenUsage, model: str | None = None) -> float | None:
        return self.runner.prices.cost(model or self.job.strategy.model_name, usage)

    def result(self, outcome: Completion[Any] | Failure) -> WorkItemResult[Any, Any]:
        """The outcome as the one result of the item."""
        if isinstance(outcome, Completion) and self.runner.json_output:
            outcome = _as_json(outcome)
        job = self.job
        executed = time.monotonic() - self.started
        common: dict[str, Any] = {
            "item_id": job.item_id,
            "index": job.index,
            "context": job.context,
            "token_usage": job.usage,
            "attempts": job.attempts,
            "cost": self.cost,
            "timing": Timing.model_construct(
                queued=job.queued_seconds,
                waited=self.waited,
                executed=self.executed,
                total=job.queued_seconds + executed,
            ),
        }
        if isinstance(outcome, Failure):
            return WorkItemResult(
                success=False, error=outcome.message, error_kind=outcome.kind, **common
            )
        return WorkItemResult(
            success=True, output=outcome.output, metadata=dict(outcome.metadata), **common
        )


def _estimate_key(job: ItemJob) -> str:
    return f"{job.quota}/{type(job.strategy).__name__}"


def _type_of(message: str) -> str:
    return message.partition(":")[0]


def _told(word: FailureKind | BatchState | None) -> Failure | Stopped | None:
    if word is None:
        return None
    if isinstance(word, BatchState):
        return Stopped(word)
    return Failure(word, f"Stopped: the batch ended ({word.value}) before this item was called")


def _finished(batch_id: str, result: WorkItemResult[Any, Any]) -> ItemFinished:
    usage = result.token_usage
    return ItemFinished(
        batch_id,
        result.item_id,
        result.success,
        result.error_kind,
        result.attempts,
        result.timing.total,
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_input_tokens,
        result.cost,
        _type_of(result.error) if result.error else None,
    )


# -- outputs as JSON


def _as_json(completion: Completion[Any]) -> Completion[Any] | Failure:
    try:
        output = json_form(completion.output)
    except (PydanticSerializationError, TypeError, ValueError, RecursionError) as error:
        name = type(completion.output).__name__
        return Failure(
            FailureKind.LOGIC_ERROR,
            f"TypeError: output of type {name} can't be written as JSON ({type(error).__name__})",
        )
    metadata = completion.metadata
    if metadata:
        metadata = from_json(to_json(dict(metadata), serialize_unknown=True, inf_nan_mode="null"))
    return Completion(output, completion.usage, metadata)


def json_form(value: Any) -> Any:
    """`value` as plain JSON types: pydantic models and dataclasses become objects, NaN null, and
    half a surrogate pair (which no file can hold) a question mark.

    Raises:
        ValueError: if it has no JSON form (PydanticSerializationError is one).
    """
    if value is None or isinstance(value, bool | int):
        return value
    if type(value) is str and value.isascii():
        return value
    if type(value) is float and math.isfinite(value):
        return value
    try:
        return from_json(to_json(value, inf_nan_mode="null"))
    except PydanticSerializationError as error:
        if "UnicodeEncodeError" not in str(error):
            raise
        text = json.dumps(to_jsonable_python(value), ensure_ascii=False)
        return from_json(text.encode("utf-8", "replace"))
