"""The limiter on its own: for code that makes its own calls, on the fleet's quotas."""

from __future__ import annotations

import asyncio
import contextvars
import time
from types import TracebackType
from typing import Any

from batchllm_celery import event_loop
from batchllm_celery.errors import FailureKind, UsageError
from batchllm_celery.limiter import CallOutcome, Estimate, Limiter, Permit
from batchllm_celery.models import NO_TOKENS, TokenUsage
from batchllm_celery.models.names import check_label
from batchllm_celery.producer.producer import ProducerSteps, default_producer
from batchllm_celery.producer.session import Session
from batchllm_celery.producer.steps import warn_on_loop
from batchllm_celery.strategies.base import usage_in
from batchllm_celery.strategies.failures import classify

_OUTCOMES = {
    FailureKind.RATE_LIMITED: CallOutcome.REFUSED,
    FailureKind.QUOTA_EXHAUSTED: CallOutcome.DAY_EXHAUSTED,
    FailureKind.OVERLOADED: CallOutcome.OVERLOADED,
}


class QuotaPermit:
    """One call may be made now. What `quota(...)` hands out; say in it how the call went.

    Nothing said and no exception: it succeeded, and used the tokens that were reserved.
    """

    def __init__(self, name: str, limiter: Limiter, permit: Permit) -> None:
        self.quota = name
        self._limiter = limiter
        self._permit = permit
        self._began = time.monotonic()
        self._outcome: CallOutcome | None = None
        self._usage: TokenUsage | None = None
        self._retry_after: float | None = None

    def used(
        self, usage: Any = None, *, input_tokens: int | None = None, output_tokens: int = 0
    ) -> None:
        """Say what the call used: it takes the place of what was reserved.

        Args:
            usage: a mapping, or the usage object of any known SDK.
            input_tokens: in place of `usage`.
            output_tokens: with `input_tokens`.

        Raises:
            UsageError: no tokens can be read from `usage`.
        """
        if input_tokens is not None:
            usage = {"input_tokens": input_tokens, "output_tokens": output_tokens}
        reading = usage_in(usage)
        if reading is None:
            raise UsageError(f"no tokens can be read from a usage of type {type(usage).__name__}")
        self._usage = reading.usage

    def refused(self, retry_after: float | None = None) -> None:
        """Say that the provider refused the call (429): the whole fleet cools down.

        Args:
            retry_after: seconds that the provider asked to wait.
        """
        self._outcome, self._retry_after = CallOutcome.REFUSED, retry_after

    def overloaded(self) -> None:
        """Say that the provider had no room for it (503, 529)."""
        self._outcome = CallOutcome.OVERLOADED

    def unused(self) -> None:
        """Say that no call was made: its start is given to others."""
        self._outcome = CallOutcome.UNUSED

    def _settle(self, error: BaseException | None) -> None:
        """Never blocks; on the loop's own thread."""
        outcome, usage, retry_after = self._outcome, self._usage, self._retry_after
        if outcome is None and error is None:
            outcome = CallOutcome.SUCCEEDED
        elif outcome is None and not isinstance(error, Exception):
            outcome = CallOutcome.FAILED  # cut off: the provider may have begun to work
        elif error is not None and isinstance(error, Exception):
            failure = classify(error)
            outcome = outcome or _OUTCOMES.get(failure.kind, CallOutcome.FAILED)
            retry_after = failure.retry_after if retry_after is None else retry_after
            usage = usage or (failure.usage if failure.usage != NO_TOKENS else None)
        assert outcome is not None
        self._limiter.settle(
            self._permit,
            outcome,
            usage=usage,
            retry_after=retry_after,
            latency=time.monotonic() - self._began,
        )


class quota:
    """Wait for a permit of a fleet-wide quota, then make one call of your own inside the block.

        async with quota("openai:gpt-5-mini", tokens=1200) as permit:
            response = await client.responses.create(...)
            permit.used(response.usage)

    The quota is the one that workers draw on: their calls and yours stay within its limits
    together. In synchronous code `with quota(...)`. An exception that leaves the block is
    classified as a strategy's is: a 429 cools the whole fleet down, a Retry-After in it is kept.
    The block is one attempt; to try again, enter another.

    Args:
        name: the quota's, `PROVIDER:MODEL` where a strategy names none of its own.
        tokens: input and output tokens that the call will probably use; they are reserved.
        output_tokens: how many of them are output, where those have a limit of their own.
        priority: 0 is usual, higher ones go first (among this process's waiting calls).
        timeout: seconds to wait for the permit at most; None: until there is one.
        producer: whose Redis it is; default the process's own, of the environment (or of the
            Celery app that `install` was called with).

    Raises:
        UsageError: for a name that can't be one.
        TimeoutError: on entry, after `timeout` seconds.
        QuotaUnavailableError: on entry, when the day's quota is used up.
    """

    def __init__(
        self,
        name: str,
        *,
        tokens: int = 0,
        output_tokens: int = 0,
        priority: int = 0,
        timeout: float | None = None,
        producer: ProducerSteps[Any] | None = None,
    ) -> None:
        self.name = check_label(name, "quota name")
        if not 0 <= output_tokens <= tokens:
            raise UsageError(
                f"tokens={tokens} is the sum of input and output: it can't be less than "
                f"output_tokens={output_tokens}, nor negative"
            )
        self._estimate = Estimate(tokens - output_tokens, output_tokens)
        self._priority = priority
        self._timeout = timeout
        self._producer = producer
        # One object may be entered again, and by several tasks at once.
        self._entered: contextvars.ContextVar[tuple[QuotaPermit, ...]] = contextvars.ContextVar(
            "batchllm_quota", default=()
        )

    async def __aenter__(self) -> QuotaPermit:
        is_retry = False
        while True:
            permit = await event_loop.run_async(self._acquire(is_retry))
            # A busy loop may have come back to us late.
            if permit._limiter.may_start(permit._permit):
                return self._enter(permit)
            self._leave(permit.unused, permit, None)
            is_retry = True

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit(error)

    def __enter__(self) -> QuotaPermit:
        warn_on_loop("quota", "`async with quota(...)`")
        return self._enter(event_loop.run(self._acquire(False)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit(error)

    def _enter(self, permit: QuotaPermit) -> QuotaPermit:
        self._entered.set((*self._entered.get(), permit))
        permit._began = time.monotonic()
        return permit

    def _exit(self, error: BaseException | None) -> None:
        *others, permit = self._entered.get()
        self._entered.set(tuple(others))
        self._leave(lambda: None, permit, error)

    def _leave(self, say: Any, permit: QuotaPermit, error: BaseException | None) -> None:
        say()
        event_loop.loop().call_soon_threadsafe(permit._settle, error)

    async def _acquire(self, is_retry: bool) -> QuotaPermit:
        session: Session = (self._producer or default_producer())._session

        async def acquire(session: Session) -> QuotaPermit:
            limiter = await session.services.open_limiter()
            permit = await limiter.acquire(
                self.name, self._estimate, priority=self._priority, retry=is_retry
            )
            return QuotaPermit(self.name, limiter, permit)

        try:
            async with asyncio.timeout(self._timeout):
                return await session.do(acquire)
        except TimeoutError as error:
            raise TimeoutError(
                f"no permit of quota {self.name!r} within {self._timeout:g} s"
            ) from error
