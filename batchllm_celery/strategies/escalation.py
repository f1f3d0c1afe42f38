"""A cheaper model first, and a better one for the items at which it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from batchllm_celery.errors import FailureKind, ProviderError, UsageError
from batchllm_celery.models import Completion, Failure, RetryState, TOutput
from batchllm_celery.strategies.base import (
    LLMCallStrategy,
    ProcessResources,
    as_completion,
    close_quietly,
)
from batchllm_celery.strategies.failures import charged, classify_for, stamp_model

_LEVEL = "escalation_level"

#: Failure kinds for which a better model is tried.
ESCALATED_KINDS = frozenset(
    {FailureKind.VALIDATION, FailureKind.TRUNCATED, FailureKind.CONTENT_BLOCKED}
)


class EscalatingStrategy(LLMCallStrategy[TOutput]):
    """Calls the first strategy; after an unusable answer the next attempt calls the next one.

        EscalatingStrategy(
            [GeminiStrategy("gemini-2.5-flash-lite", schema=Person),
             GeminiStrategy("gemini-2.5-pro", schema=Person)],
            accept=lambda person: person.confidence > 0.8,
        )

    A level is one attempt, so `max_attempts` must be at least the number of levels. All levels
    draw on one quota: this strategy's `quota`, by default the first level's. Which level answered
    is in the result's `metadata["model"]`.

    Args:
        levels: cheapest first.
        on: failure kinds that escalate. Others (timeouts, 429s) stay at their level.
        accept: whether an output is good enough; None: every one is.
        quota: the quota to draw on.
    """

    def __init__(
        self,
        levels: Sequence[LLMCallStrategy[TOutput]],
        *,
        on: frozenset[FailureKind] | set[FailureKind] = ESCALATED_KINDS,
        accept: Callable[[TOutput], bool] | None = None,
        quota: str | None = None,
    ) -> None:
        if not levels:
            raise UsageError("EscalatingStrategy needs at least one strategy")
        self.levels = list(levels)
        self.on = frozenset(on)
        self.accept = accept
        self._prepared = 0
        self.quota = quota or levels[0].quota or levels[0].model_name
        self.model_name = levels[0].model_name
        self.dialect = levels[0].dialect
        self.accepts = tuple(
            form for form in levels[0].accepts if all(form in one.accepts for one in levels)
        )
        limits = [level.max_output_tokens for level in levels]
        known = [limit for limit in limits if limit is not None]
        self.max_output_tokens = max(known) if len(known) == len(limits) else None

    @property
    def full_speed(self) -> bool:
        """Whether all levels are: they draw on one quota."""
        return all(level.full_speed for level in self.levels)

    async def prepare(self) -> None:
        """Prepare all levels, so that an escalation finds its model ready."""
        for level in self.levels[self._prepared :]:
            level.resources = self.resources or ProcessResources()
            await level.prepare()
            self._prepared += 1

    async def close(self) -> None:
        """Close all levels, last first; a failing one does not stop the others."""
        for level in reversed(self.levels):
            await close_quietly(type(level).__name__, level.close)

    async def cleanup(self) -> None:
        """All levels' cleanups."""
        for level in self.levels:
            await level.cleanup()

    async def execute(
        self, prompt: Any, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Completion[Any]:
        """One call, at the level this item has reached.

        Raises:
            ProviderError: of kind `validation` where the next attempt goes one level up.
        """
        level = self._level(state)
        model = self.levels[level].model_name
        try:
            answer = await self.levels[level].execute(prompt, attempt, timeout, state)
            completion = as_completion(answer)
            with charged(completion.usage):
                self._check(completion)
        except Exception as error:
            stamp_model(error, model)
            self._escalate(error, level, state)
            raise
        metadata = {**completion.metadata, **({"model": model} if model else {})}
        return replace(completion, metadata=metadata, priced_as=completion.priced_as or model)

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        """Call the `on_error` of the level that makes the next attempt."""
        await self.levels[self._level(state)].on_error(exception, attempt, state)

    def models(self) -> tuple[str, ...]:
        """Those of all levels."""
        return tuple(name for level in self.levels for name in level.models())

    def classify(self, exception: BaseException) -> Failure | None:
        """By the levels' own rules."""
        found = (level.classify(exception) for level in self.levels)
        return next((failure for failure in found if failure is not None), None)

    def _level(self, state: RetryState | None) -> int:
        reached = state.get(_LEVEL, 0) if state is not None else 0
        return min(int(reached), len(self.levels) - 1)

    def _check(self, completion: Completion[Any]) -> None:
        if self.accept is not None and not self.accept(completion.output):
            raise ProviderError(
                "the answer was not accepted",
                kind=FailureKind.VALIDATION,
                error_type="NotAccepted",
            )

    def _escalate(self, error: Exception, level: int, state: RetryState | None) -> None:
        """Note the next level; a kind that is otherwise final becomes one that is retried."""
        failure = classify_for(self.levels[level], error)
        if failure.kind not in self.on or state is None or level + 1 >= len(self.levels):
            return
        state.set(_LEVEL, level + 1)
        shown, _, message = failure.message.partition(": ")
        escalated = ProviderError(
            message,
            kind=FailureKind.VALIDATION,
            usage=dict(failure.usage.items()),
            error_type=shown,
        )
        stamp_model(escalated, self.levels[level].model_name)
        raise escalated from error
