"""How a batch's items are run; batch-llm's names, defaults and rules."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from batchllm_celery.models.base import MOST, MOST_SECONDS, Model

Seconds = Annotated[float, Field(allow_inf_nan=False, le=MOST_SECONDS)]

#: Overloads (503) of one item, beside successes of others, that cost it no attempt.
MAX_OVERLOADS = 20


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


class RetryConfig(Model):
    """Exponential backoff between the attempts at one item.

    The wait before attempt a + 1 is `min(initial_wait * exponential_base ** (a - 1), max_wait)`
    seconds, times a random factor in [0.5, 1) with `jitter` (as in batch-llm).
    """

    max_attempts: int = Field(default=3, le=MOST)
    initial_wait: Seconds = 1.0
    max_wait: Seconds = 60.0
    exponential_base: float = 2.0
    jitter: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require(self.max_attempts >= 1, f"max_attempts must be >= 1 (got {self.max_attempts})")
        _require(self.initial_wait > 0, f"initial_wait must be > 0 (got {self.initial_wait})")
        _require(
            self.max_wait >= self.initial_wait,
            f"max_wait ({self.max_wait}) must be >= initial_wait ({self.initial_wait})",
        )
        _require(
            self.exponential_base >= 1,
            f"exponential_base must be >= 1 (got {self.exponential_base})",
        )
        return self


class RateLimitConfig(Model):
    """batch-llm's answer to a 429: a fixed cooldown that grows, then a slow start of the fleet.

    Choosing it (instead of None, the adaptive rate) brings the cooldown `min(cooldown_seconds *
    backoff_multiplier ** (consecutive - 1), max_cooldown_seconds)`, after which the i-th start of
    the whole fleet comes at least `max(final, initial - (initial - final) * i / slow_start_items)`
    seconds after the one before it.
    """

    cooldown_seconds: Seconds = 300.0
    slow_start_items: int = 50
    slow_start_initial_delay: Seconds = 2.0
    slow_start_final_delay: Seconds = 0.1
    backoff_multiplier: float = 1.5
    max_cooldown_seconds: Seconds = 600.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require(
            self.cooldown_seconds >= 0,
            f"cooldown_seconds must be >= 0 (got {self.cooldown_seconds})",
        )
        _require(
            self.slow_start_items >= 0,
            f"slow_start_items must be >= 0 (got {self.slow_start_items})",
        )
        _require(
            0 <= self.slow_start_final_delay <= self.slow_start_initial_delay,
            f"slow_start_initial_delay ({self.slow_start_initial_delay}) must be >= "
            f"slow_start_final_delay ({self.slow_start_final_delay}) >= 0",
        )
        _require(
            self.backoff_multiplier >= 1,
            f"backoff_multiplier must be >= 1 (got {self.backoff_multiplier})",
        )
        if self.max_cooldown_seconds < self.cooldown_seconds:
            object.__setattr__(self, "max_cooldown_seconds", self.cooldown_seconds)
        return self

    def cooldown(self, consecutive: int) -> float:
        """Seconds of the `consecutive`-th cooldown (from 1) without a success between."""
        grown = self.cooldown_seconds * self.backoff_multiplier ** (consecutive - 1)
        return min(grown, self.max_cooldown_seconds)

    def slow_start_delays(self) -> list[float]:
        """Seconds between the starts after a cooldown, first to last; empty for no slow start."""
        first, last, count = (
            self.slow_start_initial_delay,
            self.slow_start_final_delay,
            self.slow_start_items,
        )
        return [max(last, first - (first - last) * i / count) for i in range(count)]


class ProcessorConfig(Model):
    """How items are run. `ProcessorConfig()` is a good default.

    Args:
        max_workers: items in flight at once in the in-process API; a worker has its `slots`.
        timeout_per_item: seconds for one **attempt** (batch-llm's name), without waits for quota.
        item_timeout: seconds for one item, all attempts and waits included; None for no limit.
        retry: attempts and backoff.
        rate_limit: None for the adaptive rate after a 429; a `RateLimitConfig` for batch-llm's
            cooldown and slow start.
        max_rate_limit_retries: refusals (429) of one item, while others succeed, before it fails.
        max_requests_per_minute: proactive limit shared by all workers of the in-process API.
        progress_interval: items between two calls of the progress callback.
        progress_callback_timeout: seconds that one such call may take.
        enable_detailed_logging: log each attempt at level DEBUG (never a prompt or an answer).
        max_queue_size: rows waiting in the in-process API before `add_work` waits; 0 for no limit.
        dry_run: call `strategy.dry_run` in place of the provider.

    Raises:
        ValueError: (pydantic's ValidationError) naming the field and its value.
    """

    max_workers: int = 5
    timeout_per_item: Seconds = 120.0
    item_timeout: Seconds | None = None
    retry: RetryConfig = RetryConfig()
    rate_limit: RateLimitConfig | None = None
    max_rate_limit_retries: int = Field(default=20, le=MOST)
    max_requests_per_minute: float | None = None
    progress_interval: int = 10
    progress_callback_timeout: Seconds = 5.0
    enable_detailed_logging: bool = False
    max_queue_size: int = 0
    dry_run: bool = False

    @property
    def most_calls(self) -> int:
        """Provider calls of one item at most, whatever the answers are: its attempts, refusals and
        overloads. The ledger allows one more for each day (a day's quota may refuse one), and
        `Settings.max_deliveries` more for calls that a death or a drain cut off."""
        return self.retry.max_attempts + self.max_rate_limit_retries + MAX_OVERLOADS

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require(self.max_workers >= 1, f"max_workers must be >= 1 (got {self.max_workers})")
        _require(
            self.timeout_per_item > 0, f"timeout_per_item must be > 0 (got {self.timeout_per_item})"
        )
        _require(
            self.item_timeout is None or self.item_timeout > 0,
            f"item_timeout must be > 0 (got {self.item_timeout})",
        )
        _require(
            self.max_requests_per_minute is None or self.max_requests_per_minute > 0,
            f"max_requests_per_minute must be > 0 (got {self.max_requests_per_minute})",
        )
        _require(
            self.progress_interval >= 1,
            f"progress_interval must be >= 1 (got {self.progress_interval})",
        )
        _require(
            self.max_queue_size >= 0, f"max_queue_size must be >= 0 (got {self.max_queue_size})"
        )
        _require(
            self.max_rate_limit_retries >= 0,
            f"max_rate_limit_retries must be >= 0 (got {self.max_rate_limit_retries})",
        )
        return self

    def validate(self) -> None:  # type: ignore[override]  # batch-llm's name
        """Check all fields again.

        Raises:
            ValueError: as the constructor does. (For batch-llm's users: construction validates.)
        """
        type(self).model_validate(self.model_dump())
