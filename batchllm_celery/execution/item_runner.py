"""Drives one item: prepare -> [permit -> gate -> execute -> settle] until it ends -> cleanup.

Exceptions of a strategy become one `Failure` here and go no further. Exceptions of our own parts
(Redis away, say) pass: they are no outcome of the item.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic_core import to_json
from redis.exceptions import RedisError

from batchllm_celery.dialects.answers import text_of_body
from batchllm_celery.errors import (
    BatchLLMError,
    FailureKind,
    FrameworkTimeoutError,
    ProviderError,
    QuotaUnavailableError,
    describe,
    text_of,
)
from batchllm_celery.events import AttemptFailed, AttemptStarted, Events, ItemFinished, ItemStarted
from batchllm_celery.execution.job import ItemJob, Stopped, Unrunnable
from batchllm_celery.execution.output import json_form, plain_metadata
from batchllm_celery.execution.pricing import Prices
from batchllm_celery.execution.prompts import input_tokens, most_output_tokens
from batchllm_celery.execution.retry import delay_before_next, refused_too_often
from batchllm_celery.execution.user_code import ends, from_user, stand_in
from batchllm_celery.limiter import CallOutcome, Estimator, Limiter, Permit
from batchllm_celery.limiter.estimator import plain_tokens
from batchllm_celery.models import (
    FAILURE_POLICIES,
    MAX_OVERLOADS,
    BatchState,
    Completion,
    Failure,
    Timing,
    TokenUsage,
    WorkItemResult,
)
from batchllm_celery.models.current_item import CurrentItem, set_current_item
from batchllm_celery.strategies.base import as_completion, unsupported
from batchllm_celery.strategies.failures import (
    classify,
    classify_for,
    log_bug,
    priced_as,
    status_of,
)
from batchllm_celery.strategies.usage import plausible

logger = logging.getLogger("batchllm_celery")

#: So many 403s in a row of one batch, without a success between, are about who calls and not about
#: the rows: the batch stops.
FORBIDDEN_IN_A_ROW = 20

#: Answers that were no use, yet paid for.
_PAID_KINDS = frozenset(
    {FailureKind.VALIDATION, FailureKind.TRUNCATED, FailureKind.CONTENT_BLOCKED}
)

#: Statuses of a server that has no room for a call; None: a strategy says so without one. Others of
#: the kind `overloaded` (500, 502) may be about the request itself.
_NO_ROOM = frozenset({None, 503, 529})

_A_TOKEN = TokenUsage(input_tokens=1, output_tokens=1)

#: Seconds for which the gate's decision holds. A permit may go stale (250 ms) while the gate is
#: asked. The item then takes another one, as a retry, and calls at once if that comes soon. So no
#: call ever starts without a fresh permit, and a slow Redis delays it, but not for ever.
GATE_HOLDS = 2.0
#: An overload is one beside successes if one of the quota's calls succeeded so shortly before.
BESIDE_SUCCESSES_SECONDS = 10.0
#: Of an item's last error, what is kept for the outcome that may have to name it.
LAST_ERROR_CHARACTERS = 300

_OUTCOMES = {
    FailureKind.RATE_LIMITED: CallOutcome.REFUSED,
    FailureKind.QUOTA_EXHAUSTED: CallOutcome.DAY_EXHAUSTED,
    FailureKind.OVERLOADED: CallOutcome.OVERLOADED,
}


_Outcome = Completion[Any] | Failure | Stopped | Unrunnable


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
        self.forbidden: dict[str, int] = {}
        """403s per batch since its last success."""
        self.succeeded_at: dict[str, float] = {}
        """When the last one was, by the monotonic clock."""

    async def run(self, job: ItemJob) -> WorkItemResult[Any, Any] | Stopped | Unrunnable:
        """Drive `job` to its outcome. `cleanup` runs whatever happens.

        Raises:
            asyncio.CancelledError: when cancelled; the permit is settled and `cleanup` run.
        """
        if self.events.wants(ItemStarted):
            self.events.emit(ItemStarted(job.batch_id, job.item_id))
        run = _Run(self, job)
        try:
            outcome = await run.within_item_timeout()
        except BaseException as error:
            if isinstance(error, RedisError | OSError | BatchLLMError):
                raise
            if ends(error, asyncio.current_task()):
                raise
            # A fault of ours, or an object of the strategy's that exits when it is looked at: it
            # would come again each time, and each time be paid.
            outcome = run.broken(error)
        finally:
            await _clean_up(job)
        if isinstance(outcome, Stopped | Unrunnable):
            return outcome
        result = run.result(outcome)
        if self.events.wants(ItemFinished):
            self.events.emit(_finished(job.batch_id, result))
        return result

    def report(self, job: ItemJob, kind: str, error: BaseException) -> None:
        """Log what is a bug of the strategy, or of ours."""
        log_bug(f"item.{kind}", error, batch_id=job.batch_id, item_id=job.item_id)


async def _clean_up(job: ItemJob) -> None:
    try:  # the answer waits for it: a hook that hangs must not hold that for ever
        async with asyncio.timeout(job.config.timeout_per_item):
            await from_user(job.strategy.cleanup)
    except Exception as error:
        logger.warning(f"Cleanup failed for {job.item_id}: {text_of(error)}")


class _Run:
    """One item's way through the runner: its clocks, and the steps of an attempt."""

    __slots__ = (
        "admitted_at",
        "baseline",
        "blamed",
        "called_at",
        "cost",
        "estimate_key",
        "estimate_of",
        "executed",
        "is_retry",
        "job",
        "last",
        "limit",
        "ready",
        "runner",
        "started",
        "usage_estimated",
    )

    def __init__(self, runner: ItemRunner, job: ItemJob) -> None:
        self.runner = runner
        self.job = job
        self.started = time.monotonic()
        self.ready = self.started
        """When the strategy was prepared: until then the item was queued."""
        self.executed = self.called_at = 0.0
        self.usage_estimated = False
        self.limit = job.config.timeout_per_item
        self.estimate_key = f"{job.quota}/{type(job.strategy).__name__}"
        self.estimate_of: str | int = job.prompt if isinstance(job.prompt, str) else 0
        """The text; of another prompt about its input tokens."""
        self.last: Failure | None = None
        self.baseline: int | None = None
        self.blamed: list[float] = []
        """Overloads that cost an attempt: when they came, by the monotonic clock."""
        self.is_retry = job.refusals > 0
        self.admitted_at = -math.inf
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
        if why := unsupported(self.job.strategy, self.job.prompt):
            return Failure(FailureKind.INVALID_INPUT, f"InvalidInput: {why}")
        if self.job.config.dry_run:
            return await self._rehearse()
        try:
            await from_user(self.job.prepare)
        except Exception as error:
            failure = self._failure(error)
            if await self.job.gate.hands_back(failure, error, called=False):
                return Unrunnable(failure.message)
            return failure
        finally:
            self.ready = time.monotonic()
        model, prices = self.job.strategy.model_name, self.runner.prices
        if model and not prices.loaded and model not in prices.known:
            await prices.load(model)
        if self.job.needs_prices and (unknown := self._without_price()):
            return Failure(
                FailureKind.INVALID_REQUEST,
                f"UsageError: no price is known for {unknown}, so max_cost would never bind: give "
                "its price (--price IN,OUT), or bound the batch by token_budget",
            )
        while True:
            outcome = await self._attempt()
            if outcome is not None:
                return outcome

    async def _rehearse(self) -> _Outcome:
        """`dry_run` in place of the provider: no prepare (it may call one), no limiter."""
        refusal = self._refusal(await self.job.gate.begin())
        if refusal is not None:
            return refusal
        self.job.attempts += 1
        self._say_who(self.job.attempts)
        try:
            answer = await from_user(self.job.strategy.dry_run, self.job.prompt)
            completion = as_completion(answer)
        except Exception as error:
            return self._failure(error)
        finally:
            set_current_item(None)
        self._spend(completion.usage)
        return completion

    async def _attempt(self) -> _Outcome | None:
        """One call; None if another one follows."""
        job, runner = self.job, self.runner
        try:
            if self.estimate_of == 0:
                self.estimate_of = await input_tokens(job.prompt, job.strategy)
            estimate = partial(
                runner.estimator.estimate,
                self.estimate_key,
                self.estimate_of,
                most_output_tokens(job.prompt, job.strategy),
            )
            permit = await runner.limiter.acquire(
                job.quota,
                estimate,
                priority=job.priority,
                retry=self.is_retry,
                tried=job.refusals + job.overloads + job.attempts,
            )
        except QuotaUnavailableError as error:
            return await self._day_is_over(classify(error), error.until)
        if time.monotonic() - self.admitted_at > GATE_HOLDS:
            refusal = await self._ask_gate(permit)
            if refusal is not None:
                return refusal
        if not self.runner.limiter.may_start(permit):
            return await self._defer(permit)
        self.admitted_at = -math.inf
        answer = await self._call(permit)
        if isinstance(answer, Completion):
            self._succeeded(permit, answer)
            return answer
        return await self._failed(permit, answer)

    async def _ask_gate(self, permit: Permit) -> Failure | Stopped | None:
        try:
            refusal = self._refusal(await self.job.gate.begin())
        except BaseException:
            self.runner.limiter.settle(permit, CallOutcome.UNUSED)
            raise
        if refusal is not None:
            self.runner.limiter.settle(permit, CallOutcome.UNUSED)
        self.admitted_at = time.monotonic()
        return refusal

    async def _defer(self, permit: Permit) -> _Outcome | None:
        """Release a permit that went stale while the gate was asked, and wait for another.

        After one that a cooldown made void the next comes no sooner than its end: till then the
        item is in no call, for the ledger either, or a death in this wait would count against it.
        """
        self.is_retry = True
        self.job.gate.calls(False)
        self.runner.limiter.settle(permit, CallOutcome.UNUSED)
        if not self.runner.limiter.is_void(permit):
            return None
        self.admitted_at = -math.inf
        return await self._save()

    async def _call(self, permit: Permit) -> Completion[Any] | Exception:
        """Execute once. Our own time limit is told from the provider's by whose clock ran out."""
        job = self.job
        if self.runner.events.wants(AttemptStarted):
            self.runner.events.emit(AttemptStarted(job.batch_id, job.item_id, job.attempts + 1))
        started = time.monotonic()
        scope = asyncio.timeout(self.limit)
        task = asyncio.current_task()
        self._say_who(job.attempts + 1)
        job.gate.calls(True)
        self.called_at = started
        try:
            async with scope:
                call = job.strategy.execute(job.prompt, job.attempts + 1, self.limit, job.state)
                if not hasattr(call, "__await__"):
                    raise TypeError(
                        f"execute() must be `async def` and await its call: it returned "
                        f"{type(call).__name__}"
                    )
                answer = await call
            return as_completion(answer)
        except Exception as error:
            if not scope.expired():
                return error
            job.gate.gave_up()
            timeout = self._timeout_error(time.monotonic() - started, self.limit)
            timeout.__cause__ = error
            return timeout
        except BaseException as error:
            if not ends(error, task):
                return stand_in(error)
            # The provider may have begun to work: the tokens stay counted as estimated.
            job.gate.gave_up()
            self.runner.limiter.settle(permit, CallOutcome.FAILED)
            raise
        finally:
            self.executed += time.monotonic() - started
            set_current_item(None)

    def _say_who(self, attempt: int) -> None:
        job = self.job
        set_current_item(CurrentItem(job.batch_id, job.item_id, job.index, attempt, job.context))

    def _succeeded(self, permit: Permit, completion: Completion[Any]) -> None:
        job, runner = self.job, self.runner
        usage = completion.usage
        # A figure that can't be is no reason to hold the quota up: the estimate stands.
        known = self._charged(usage) if plausible(usage) else None
        runner.limiter.settle(
            permit,
            CallOutcome.SUCCEEDED,
            usage=known,
            latency=time.monotonic() - self.called_at,
            limits=getattr(completion, "limits", None),
        )
        runner.successes[job.quota] = runner.successes.get(job.quota, 0) + 1
        runner.forbidden.pop(job.batch_id, None)
        runner.succeeded_at[job.quota] = time.monotonic()
        if known:
            runner.estimator.observe(self.estimate_key, self.estimate_of, known)
        job.attempts += 1
        if not usage and job.estimate_usage:
            usage = self._estimated_usage(completion.output)
            job.usage = job.usage + usage
        else:
            written = completion.metadata.get("cache_write_tokens")
            model = completion.priced_as or completion.metadata.get("model")
            self._spend(usage, model, written if type(written) is int else 0)

    async def _failed(self, permit: Permit, error: Exception) -> _Outcome | None:
        job = self.job
        attempt = job.attempts + 1
        failure = self._failure(error)
        self.runner.limiter.settle(
            permit,
            _OUTCOMES.get(failure.kind, CallOutcome.FAILED),
            usage=failure.usage if failure.usage and plausible(failure.usage) else None,
            retry_after=failure.retry_after,
            limits=getattr(error, "limits", None),
        )
        # (`last` is another failure where 403s on everything are taken for the caller's.)
        if failure is self.last and await job.gate.hands_back(failure, error, called=True):
            return Unrunnable(failure.message, called=True)
        self._count(failure, error)
        await self._on_error(error, attempt)
        delay = self._delay(failure)
        self._notify(failure, attempt, delay)
        if delay is None:
            return failure
        return await self._before_next(failure, delay)

    def _failure(self, error: Exception) -> Failure:
        """The one translation of a strategy's exception; its tokens are counted here."""
        failure = classify_for(self.job.strategy, error)
        unexplained = failure.kind is FailureKind.UNKNOWN and not isinstance(error, ProviderError)
        if failure.kind is FailureKind.LOGIC_ERROR or unexplained:
            self.runner.report(self.job, failure.kind.value, error)
        self.last = failure
        self.job.last_error = failure.message[:LAST_ERROR_CHARACTERS]
        self.job.error = error
        self._spend(failure.usage, priced_as(error))
        if not failure.usage and self.job.estimate_usage and failure.kind in _PAID_KINDS:
            self.job.usage = self.job.usage + self._estimated_usage("")
        return self._forbidden(failure, error)

    def _forbidden(self, failure: Failure, error: Exception) -> Failure:
        """A 403 fails its row; when all get one, it is the caller that is refused."""
        if failure.kind is not FailureKind.CONTENT_BLOCKED or status_of(error) != 403:
            return failure
        counts, batch_id = self.runner.forbidden, self.job.batch_id
        counts[batch_id] = counts.pop(batch_id, 0) + 1
        if len(counts) > 1000:
            counts.pop(next(iter(counts)))
        if counts[batch_id] < FORBIDDEN_IN_A_ROW:
            return failure
        return replace(failure, kind=FailureKind.AUTHENTICATION)

    def _estimated_usage(self, output: Any) -> TokenUsage:
        """For a server that tells no tokens: a token budget must bind there too."""
        self.usage_estimated = True
        try:
            text = output if isinstance(output, str) else to_json(output).decode()
        except ValueError:  # it has no JSON form, which is a failure of its own
            text = ""
        return TokenUsage(
            input_tokens=plain_tokens(self.estimate_of),
            output_tokens=plain_tokens(text) if text else 0,
        )

    def _count(self, failure: Failure, error: Exception) -> None:
        refused = failure.kind is FailureKind.OVERLOADED and status_of(error) in _NO_ROOM
        if self.blamed:
            self._excuse()
        if refused and self._others_get_through():
            self.job.overloads += 1
        elif refused:
            self.blamed.append(time.monotonic())
            self.job.attempts += 1
        elif FAILURE_POLICIES[failure.kind].uses_attempt:
            self.job.attempts += 1
        elif failure.kind is FailureKind.RATE_LIMITED:
            self.job.refusals += 1
            self.is_retry = True
            if self.baseline is None:
                self.baseline = self.runner.successes.get(self.job.quota, 0)

    def _others_get_through(self) -> bool:
        """Whether an overload is a matter of how many calls the provider takes at once: others
        succeed. Then it costs no attempt, `MAX_OVERLOADS` times."""
        if self.job.overloads >= MAX_OVERLOADS:
            return False
        since = time.monotonic() - self.runner.succeeded_at.get(self.job.quota, -math.inf)
        return since < BESIDE_SUCCESSES_SECONDS or self.runner.limiter.beside_successes(
            self.job.quota
        )

    def _excuse(self) -> None:
        """Give attempts back that overloads have cost before anybody could succeed: all slots may
        have asked at once, and the calls that were taken were still under way."""
        succeeded_at = self.runner.succeeded_at.get(self.job.quota, -math.inf)
        if self.runner.limiter.beside_successes(self.job.quota):
            succeeded_at = time.monotonic()
        for at in list(self.blamed):
            if at <= succeeded_at and self.job.overloads < MAX_OVERLOADS:
                self.blamed.remove(at)
                self.job.attempts -= 1
                self.job.overloads += 1

    async def _on_error(self, error: Exception, attempt: int) -> None:
        try:
            async with asyncio.timeout(self.limit):
                await from_user(self.job.strategy.on_error, error, attempt, self.job.state)
        except Exception as raised:
            self.runner.report(self.job, "on_error_failed", raised)

    def _delay(self, failure: Failure) -> float | None:
        job = self.job
        if failure.kind is FailureKind.RATE_LIMITED:
            others = self.runner.successes.get(job.quota, 0) > (self.baseline or 0)
            if refused_too_often(job.refusals, job.config.max_rate_limit_retries, others):
                return None
        return delay_before_next(failure, job.attempts, job.config.retry, overloads=job.overloads)

    def _notify(self, failure: Failure, attempt: int, wait: float | None) -> None:
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
        return None

    async def _save(self) -> Failure | None:
        job = self.job
        try:
            await job.gate.save(
                job.attempts,
                job.refusals,
                job.state,
                job.usage,
                overloads=job.overloads,
                last_error=job.last_error,
            )
        except (TypeError, ValueError, RecursionError) as error:
            return Failure(
                FailureKind.LOGIC_ERROR,
                f"{type(error).__name__}: the retry state can't be kept: no JSON, or too large",
            )
        return None

    async def _day_is_over(self, failure: Failure, until: float | None) -> Failure | Stopped:
        parks = self.job.parks
        if parks if isinstance(parks, bool) else await parks():
            return Stopped(BatchState.PARKED, until)
        return Failure(FailureKind.QUOTA_EXHAUSTED, failure.message)

    def _charged(self, usage: TokenUsage) -> TokenUsage:
        """What counts against the quota: not for every provider does input from a cache."""
        if self.job.strategy.cached_input_counts or not usage.cached_input_tokens:
            return usage
        fresh = max(0, usage.input_tokens - usage.cached_input_tokens)
        return TokenUsage(input_tokens=fresh, output_tokens=usage.output_tokens)

    def _spend(self, usage: TokenUsage, model: str | None = None, written: int = 0) -> None:
        # Each call is priced by itself: some prices depend on the size of the one request.
        if not usage:
            return
        job = self.job
        job.usage = job.usage + usage if job.usage else usage
        cost = self._price(usage, model, written)
        if cost is not None:
            self.cost = cost + (self.cost or 0.0)

    def _price(self, usage: TokenUsage, model: Any = None, written: int = 0) -> float | None:
        if not isinstance(model, str) or not model:
            model = self.job.strategy.model_name
        name = model if isinstance(model, str) else None
        given = self.job.prices.get(name or "") or self.job.prices.get("")
        if given:
            return float(given.cost(usage))
        return self.runner.prices.cost(name, usage, written)

    def _without_price(self) -> str | None:
        models = self.job.strategy.models()
        return next((name for name in models if self._price(_A_TOKEN, name) is None), None)

    def _refusal(self, decision: FailureKind | BatchState | None) -> Failure | Stopped | None:
        if decision is None:
            return None
        if isinstance(decision, BatchState):
            return Stopped(decision)
        if decision is not FailureKind.EXHAUSTED:
            why = f"Stopped: the batch ended ({decision.value}) before this item was called"
            return Failure(decision, why)
        last = self.job.last_error or "none is known: its calls were cut off"
        return Failure(
            decision, f"CallsExhausted: no further call of this item; last error: {last}"
        )

    def broken(self, error: BaseException) -> Failure:
        """The outcome of an item that a fault of ours ended."""
        self.runner.report(self.job, "internal_error", error)
        self.job.error = error if isinstance(error, Exception) else stand_in(error)
        return Failure(FailureKind.LOGIC_ERROR, f"InternalError: {describe(error)}")

    def result(self, outcome: Completion[Any] | Failure) -> WorkItemResult[Any, Any]:
        """The outcome as the one result of the item: what can be recorded of it."""
        try:
            if isinstance(outcome, Completion) and self.runner.json_output:
                outcome = self._as_json(outcome)
            return self._result(outcome)
        except BaseException as error:  # an object of the user's may even exit
            self.runner.report(self.job, "unrecordable", error)
            what = f"{type(error).__name__}: the answer can't be recorded"
            return self._result(Failure(FailureKind.LOGIC_ERROR, what))

    def _as_json(self, completion: Completion[Any]) -> Completion[Any] | Failure:
        try:
            output = json_form(completion.output)
        except BaseException as error:  # also what a model's own serialiser raises
            self.runner.report(self.job, "unwritable_output", error)
            name = type(completion.output).__name__
            return Failure(
                FailureKind.LOGIC_ERROR,
                f"TypeError: output of type {name} can't be written as JSON "
                f"({type(error).__name__})",
            )
        metadata = completion.metadata
        if metadata:
            try:
                metadata = plain_metadata(metadata)
            except BaseException as error:  # the answer is worth more
                self.runner.report(self.job, "unwritable_metadata", error)
                metadata = {"metadata_dropped": type(error).__name__}
        return replace(completion, output=output, metadata=metadata)

    def _result(self, outcome: Completion[Any] | Failure) -> WorkItemResult[Any, Any]:
        job = self.job
        metadata: dict[str, Any] = {"usage_estimated": True} if self.usage_estimated else {}
        common: dict[str, Any] = {
            "item_id": job.item_id,
            "index": job.index,
            "context": job.context,
            "token_usage": job.usage,
            "attempts": job.attempts,
            "cost": self.cost,
            "timing": self._timing(),
        }
        if isinstance(outcome, Failure):
            return WorkItemResult(
                success=False,
                error=outcome.message,
                error_kind=outcome.kind,
                metadata={**self._notes(outcome), **metadata, **self._kept(outcome)},
                **common,
            )
        metadata = {**outcome.metadata, **metadata, **self._kept(outcome)}
        return WorkItemResult(success=True, output=outcome.output, metadata=metadata, **common)

    def _notes(self, failure: Failure) -> Any:
        """What a failure says besides, as far as it has a JSON form."""
        if not failure.metadata or not self.runner.json_output:
            return failure.metadata
        try:
            return plain_metadata(failure.metadata)
        except Exception as error:
            self.runner.report(self.job, "unwritable_metadata", error)
            return {"metadata_dropped": type(error).__name__}

    def _kept(self, outcome: Completion[Any] | Failure) -> dict[str, Any]:
        """The provider's reply, for a batch that keeps it."""
        reply = outcome.reply
        if not self.job.keep_raw or reply is None:
            return {}
        kept = {
            "raw": text_of_body(reply.body),
            "status": reply.status,
            "request_id": reply.request_id,
            "dialect": reply.dialect,
            "priced_as": self.job.strategy.model_name,
        }
        return {name: value for name, value in kept.items() if value is not None}

    def _timing(self) -> Timing:
        """What is neither before the start nor a call was a wait: every moment has its place."""
        executed = round(self.executed, 3)
        queued = round(self.job.queued_seconds + self.ready - self.started, 3)
        waited = max(0.0, round(time.monotonic() - self.ready - self.executed, 3))
        total = round(queued + waited + executed, 3)
        return Timing.model_construct(queued=queued, waited=waited, executed=executed, total=total)


def _type_of(message: str) -> str:
    return message.partition(":")[0]


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
