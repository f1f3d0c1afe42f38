"""What a caller asks for, gets, and gives back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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
    DAY_EXHAUSTED = "day_exhausted"
    OVERLOADED = "overloaded"
    UNUSED = "unused"
    """The call was never made: its place is given back."""


@dataclass(slots=True)
class Permit:
    """One call may start now. Settle it exactly once.

    `generation` is the cooldown count it was given under, `start` the local monotonic time from
    which the call was allowed; `estimate` is what was reserved.
    """

    quota: str
    generation: int
    start: float
    id: int
    estimate: Estimate
    probe: bool = False
    settled: bool = False
