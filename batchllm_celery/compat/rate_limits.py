"""What follows a 429, as batch-llm's users write it, turned into data that the scripts read."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterator

from batchllm_celery.models import CooldownPolicy, RateLimitConfig

#: How many cooldowns in a row, and starts after one, a user's strategy is asked for beforehand.
SAMPLED_COOLDOWNS = 20
SAMPLED_STARTS = 1_000


class RateLimitStrategy(ABC):
    """batch-llm's interface. Asked once, when the quota is configured: a pure function."""

    @abstractmethod
    async def on_rate_limit(self, worker_id: int, consecutive_limit_count: int) -> float:
        """Seconds of cooldown after the `consecutive_limit_count`-th 429 in a row (from 1)."""

    @abstractmethod
    def should_apply_slow_start(self, items_since_resume: int) -> tuple[bool, float]:
        """Whether the start with this index after a cooldown is delayed, and how many seconds."""


class ExponentialBackoffStrategy(RateLimitStrategy):
    """Cooldown `min(initial * multiplier ** (consecutive - 1), maximum)`, then a slow start.

    The i-th of `slow_start_items` starts comes at least
    `max(final, initial - (initial - final) * i / slow_start_items)` seconds after the one before.
    """

    def __init__(
        self,
        initial_cooldown: float = 300.0,
        max_cooldown_seconds: float = 600.0,
        backoff_multiplier: float = 1.5,
        slow_start_items: int = 50,
        slow_start_initial_delay: float = 2.0,
        slow_start_final_delay: float = 0.1,
    ) -> None:
        self.config = RateLimitConfig(
            cooldown_seconds=initial_cooldown,
            max_cooldown_seconds=max_cooldown_seconds,
            backoff_multiplier=backoff_multiplier,
            slow_start_items=slow_start_items,
            slow_start_initial_delay=slow_start_initial_delay,
            slow_start_final_delay=slow_start_final_delay,
        )
        self._delays = self.config.slow_start_delays()

    async def on_rate_limit(self, worker_id: int, consecutive_limit_count: int) -> float:
        return self.config.cooldown(consecutive_limit_count)

    def should_apply_slow_start(self, items_since_resume: int) -> tuple[bool, float]:
        if items_since_resume >= len(self._delays):
            return False, 0.0
        return True, self._delays[items_since_resume]


class FixedDelayStrategy(RateLimitStrategy):
    """The same cooldown every time, and the same delay between all starts after the first 429."""

    def __init__(self, cooldown: float = 300.0, delay: float = 1.0) -> None:
        self.cooldown, self.delay = cooldown, delay

    async def on_rate_limit(self, worker_id: int, consecutive_limit_count: int) -> float:
        return self.cooldown

    def should_apply_slow_start(self, items_since_resume: int) -> tuple[bool, float]:
        return True, self.delay


def policy_from(source: RateLimitConfig | RateLimitStrategy | None) -> CooldownPolicy:
    """The policy of a quota: None is the adaptive rate, anything else batch-llm's mechanism.

    Raises:
        ValueError: a strategy's `on_rate_limit` waits for something; it must only compute.
    """
    if source is None:
        return CooldownPolicy()
    if isinstance(source, RateLimitConfig):
        return _from_config(source)
    cooldowns = [_cooldown(source, n) for n in range(1, SAMPLED_COOLDOWNS + 1)]
    ramp = tuple(_delays(source))
    return CooldownPolicy(
        kind="slow_start",
        cooldowns=_without_repeats(cooldowns),
        ramp=_without_repeats(list(ramp)) if len(ramp) == SAMPLED_STARTS else ramp,
        ramp_repeats=len(ramp) == SAMPLED_STARTS,
        max_cooldown=max(cooldowns),
    )


def _from_config(config: RateLimitConfig) -> CooldownPolicy:
    return CooldownPolicy(
        kind="slow_start",
        cooldowns=_without_repeats([config.cooldown(n) for n in range(1, SAMPLED_COOLDOWNS + 1)]),
        ramp=tuple(config.slow_start_delays()),
        max_cooldown=config.max_cooldown_seconds,
    )


def _delays(strategy: RateLimitStrategy) -> Iterator[float]:
    for index in range(SAMPLED_STARTS):
        applies, delay = strategy.should_apply_slow_start(index)
        if not applies:
            return
        yield max(delay, 0.0)


def _cooldown(strategy: RateLimitStrategy, consecutive: int) -> float:
    value: object = strategy.on_rate_limit(0, consecutive)
    if inspect.isawaitable(value):
        value = _result_now(value)
    return max(float(str(value)), 0.0)


def _result_now(awaitable: Awaitable[float]) -> float:
    steps = awaitable.__await__()
    try:
        next(steps)
    except StopIteration as stop:
        return float(stop.value)
    raise ValueError(
        "on_rate_limit() must return its seconds without waiting: they are computed once, "
        "when the quota is configured"
    )


def _without_repeats(values: list[float]) -> tuple[float, ...]:
    """The values up to the point from which the last one repeats."""
    while len(values) > 1 and values[-1] == values[-2]:
        values = values[:-1]
    return tuple(values)
