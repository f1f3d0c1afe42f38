"""What a caller asks for, gets, and settles."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from batchllm_celery.models import TokenUsage
from batchllm_celery.models.rate_limits import RateLimits


@dataclass(frozen=True, slots=True)
class Estimate:
    """Tokens that a call will probably use; reserved when it starts."""

    input_tokens: int = 0
    output_tokens: int = 0
    guessed: bool = False
    """Nothing was known of such calls: what it reserves too much is returned in part only."""


class CallOutcome(StrEnum):
    """How a permitted call ended, as far as the quota is concerned."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """Neither refused nor overloaded: says nothing about the quota."""
    REFUSED = "refused"
    """Rate limited (429): the whole fleet cools down."""
    DAY_EXHAUSTED = "day_exhausted"
    OVERLOADED = "overloaded"
    """The provider has no room (503): counts towards the breaker."""
    UNUSED = "unused"
    """The call was never made: its start is given to others."""


@dataclass(slots=True)
class Permit:
    """One call may start now. Settle it exactly once.

    Args:
        quota: the quota it was given by.
        epoch: the quota's epoch at that time; a cooldown or changed limits begin a new one.
        start: local monotonic time (seconds) from which the call was allowed.
        id: counts the permits of this process and quota.
        estimate: the tokens that were reserved.
        probe: the breaker is open, and this is its one call.
        limit_version: of the learnt limit of calls in flight; -1: there was none.
        settled: `Limiter.settle` has counted it.
    """

    quota: str
    epoch: int
    start: float
    id: int
    estimate: Estimate
    probe: bool = False
    limit_version: int = -1
    settled: bool = False


@dataclass(frozen=True, slots=True)
class SettledCall:
    """How one permitted call ended: everything that the limiter may learn from it.

    Args:
        permit: has the epoch and the reserved tokens.
        outcome: whether the provider refused it, and how.
        usage: the tokens it used; None: not known.
        retry_after: seconds that the provider asks to wait; None: it did not say.
        latency: seconds from the call's start to its end; 0: not measured.
        limits: what the provider's headers said; None: nothing.
    """

    permit: Permit
    outcome: CallOutcome
    usage: TokenUsage | None = None
    retry_after: float | None = None
    latency: float = 0.0
    limits: RateLimits | None = None
