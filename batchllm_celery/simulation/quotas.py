"""Whether a call fits a provider's limits, as pure decisions over a given clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from batchllm_celery.simulation.config import SimulationConfig, Window

#: Room for the rounding of repeated refills; far below one request or token.
_EPSILON = 1e-9


class Meter(Protocol):
    """One limit. Amounts are requests or tokens, times are seconds of any steady clock.

    An amount larger than the whole limit is admitted when nothing else is charged. It would
    never be otherwise.
    """

    limit: float

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` fits; 0 if it fits now. Charges nothing."""
        ...

    def charge(self, amount: float, now: float) -> None:
        """Take `amount`, whether it fits or not."""
        ...

    def resize(self, limit: float, now: float) -> None:
        """Change the limit; what has been charged stays charged."""
        ...

    def left(self, now: float) -> tuple[float, float]:
        """What is left of the limit, and the seconds until all of it is."""
        ...


class Bucket:
    """A bucket that starts full and refills continuously.

    Args:
        limit: amount per minute.
        seconds: how many seconds' worth it holds.
        now: the clock's time.
        others: share of what flows in that others take before us.
    """

    def __init__(self, limit: float, seconds: float, now: float, others: float = 0.0) -> None:
        self.limit = limit
        self.seconds = seconds
        self.others = others
        self._level = self._capacity
        self._updated = now

    @property
    def _capacity(self) -> float:
        # A bucket that can't hold one whole request would never admit one.
        return max(1.0, self.limit / 60 * self.seconds)

    def _refill(self, now: float) -> None:
        gained = (now - self._updated) * self.limit / 60 * (1 - self.others)
        self._level = min(self._capacity, self._level + gained)
        self._updated = now

    def wait(self, amount: float, now: float) -> float:
        self._refill(now)
        missing = min(amount, self._capacity) - self._level
        return missing / (self.limit / 60) if missing > _EPSILON else 0.0

    def charge(self, amount: float, now: float) -> None:
        self._refill(now)
        self._level -= amount

    def resize(self, limit: float, now: float) -> None:
        self._refill(now)
        self.limit = limit
        self._level = min(self._level, self._capacity)

    def left(self, now: float) -> tuple[float, float]:
        self._refill(now)
        missing = self._capacity - self._level
        return self.limit - missing, missing / (self.limit / 60)


class FixedWindow:
    """Up to `limit` within a window; then a new window starts from nothing.

    Args:
        limit: amount per window.
        seconds: a window's length.
        now: when the first window starts.
    """

    def __init__(self, limit: float, seconds: float, now: float) -> None:
        self.limit = limit
        self.seconds = seconds
        self._started = now
        self._used = 0.0

    def _roll(self, now: float) -> None:
        windows = int((now - self._started) // self.seconds)
        if windows > 0:
            self._started += windows * self.seconds
            self._used = 0.0

    def wait(self, amount: float, now: float) -> float:
        self._roll(now)
        if self._used == 0 or self._used + amount <= self.limit + _EPSILON:
            return 0.0
        return self._started + self.seconds - now

    def charge(self, amount: float, now: float) -> None:
        self._roll(now)
        self._used += amount

    def resize(self, limit: float, now: float) -> None:
        self._roll(now)
        self.limit = limit

    def left(self, now: float) -> tuple[float, float]:
        self._roll(now)
        return self.limit - self._used, self._started + self.seconds - now


class SlidingWindow:
    """Up to `limit` within the last `seconds`, at every moment.

    Args:
        limit: amount per window.
        seconds: the window's length.
    """

    def __init__(self, limit: float, seconds: float) -> None:
        self.limit = limit
        self.seconds = seconds
        self._charges: deque[tuple[float, float]] = deque()
        self._used = 0.0

    def _expire(self, now: float) -> None:
        while self._charges and self._charges[0][0] + self.seconds <= now:
            self._used -= self._charges.popleft()[1]
        if not self._charges:
            self._used = 0.0

    def wait(self, amount: float, now: float) -> float:
        self._expire(now)
        excess = self._used + amount - self.limit
        wait = 0.0
        for charged_at, charged in self._charges:
            if excess <= _EPSILON:
                break
            excess -= charged
            wait = charged_at + self.seconds - now
        return wait

    def charge(self, amount: float, now: float) -> None:
        self._expire(now)
        self._charges.append((now, amount))
        self._used += amount

    def resize(self, limit: float, now: float) -> None:
        self._expire(now)
        self.limit = limit

    def left(self, now: float) -> tuple[float, float]:
        self._expire(now)
        whole = self._charges[-1][0] + self.seconds - now if self._charges else 0.0
        return self.limit - self._used, whole


@dataclass(frozen=True, slots=True)
class QuotaRefusal:
    """Why a call is not admitted: the limit's name, its size, and the seconds to wait."""

    limit_name: str
    limit: float
    retry_after: float
    """Seconds."""


_MINUTE_LIMITS = ("rpm", "tpm", "input_tpm", "output_tpm")


class Limits:
    """All limits of a provider, decided together: a call is charged to every one or to none.

    Args:
        config: the limits.
        now: seconds of the clock that `admit` is given.
    """

    def __init__(self, config: SimulationConfig, now: float) -> None:
        self._config = config
        self._meters: dict[str, Meter] = {}
        self._others_at = now
        self._build(config, now)

    def admit(self, input_tokens: int, output_tokens: int, now: float) -> QuotaRefusal | None:
        """Charge the call, or say which limit refuses it longest."""
        if not self._meters:
            return None
        self._charge_others(now)
        amounts = _amounts(input_tokens, output_tokens)
        refusal = self._longest_wait(amounts, now)
        if refusal is None:
            for name, meter in self._meters.items():
                meter.charge(amounts[name], now)
        return refusal

    def left(self, now: float) -> dict[str, tuple[float, float, float]]:
        """Of each limit: its size, what is left of it, the seconds until all of it is."""
        return {name: (meter.limit, *meter.left(now)) for name, meter in self._meters.items()}

    def _charge_others(self, now: float) -> None:
        """What other users of the key have taken since the last look, as far as it was there."""
        passed, self._others_at = now - self._others_at, now
        for name, meter in self._meters.items():
            if isinstance(meter, Bucket):
                meter.others = self._config.other_users
            elif name != "rpd" and self._config.other_users:
                amount = self._config.other_users * getattr(self._config, name) / 60 * passed
                meter.charge(max(min(amount, meter.left(now)[0]), 0.0), now)

    def reconfigure(self, config: SimulationConfig, now: float) -> None:
        """Change limits in mid-run. What was charged stays charged while a limit keeps its kind."""
        self._charge_others(now)
        kinds = (
            "window",
            "bucket_seconds",
            "window_seconds",
            "day_seconds",
            "rate_limit_headers",
        )
        if any(getattr(config, name) != getattr(self._config, name) for name in kinds):
            self._meters.clear()
        self._config = config
        self._build(config, now)

    def _longest_wait(self, amounts: Mapping[str, float], now: float) -> QuotaRefusal | None:
        longest: QuotaRefusal | None = None
        for name, meter in self._meters.items():
            wait = meter.wait(amounts[name], now)
            if wait > 0 and (longest is None or wait > longest.retry_after):
                longest = QuotaRefusal(name, meter.limit, wait)
        return longest

    def _build(self, config: SimulationConfig, now: float) -> None:
        for name in (*_MINUTE_LIMITS, "rpd"):
            limit = getattr(config, name)
            if limit is None:
                self._meters.pop(name, None)
            elif name in self._meters:
                self._meters[name].resize(_per_window(name, limit, config), now)
            else:
                self._meters[name] = _meter(name, limit, config, now)


def _amounts(input_tokens: int, output_tokens: int) -> dict[str, float]:
    return {
        "rpm": 1,
        "tpm": input_tokens + output_tokens,
        "input_tpm": input_tokens,
        "output_tpm": output_tokens,
        "rpd": 1,
    }


def _per_window(name: str, limit: float, config: SimulationConfig) -> float:
    if name == "rpd" or config.window is Window.BUCKET:
        return limit
    return limit * config.window_seconds / 60


def _meter(name: str, limit: float, config: SimulationConfig, now: float) -> Meter:
    size = _per_window(name, limit, config)
    if name == "rpd":
        return FixedWindow(size, config.day_seconds, now)
    if config.window is Window.BUCKET:
        usual = 1.0 if config.rate_limit_headers is None else 60.0
        return Bucket(size, config.bucket_seconds or usual, now, config.other_users)
    if config.window is Window.FIXED:
        return FixedWindow(size, config.window_seconds, now)
    return SlidingWindow(size, config.window_seconds)
