"""What acquire.lua is asked and replies: every field by name, packed in one place.

Times end in `_us` and are microseconds: moments on Redis' clock since 1970, or durations.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from batchllm_celery.limiter.permit import Estimate
from batchllm_celery.limiter.records import pack, size, unpack

#: The number of this protocol, first argument of acquire.lua. It grows when a record changes.
PROTOCOL = 2
_MOST_TOKENS = 2**32 - 1


@dataclass(slots=True)
class AcquireRequest:
    """One request of one process to one quota: what ended, and how many starts it wants.

    Sums are over the calls and reservations that ended since the process' last request.
    """

    sequence: int = 0
    """Grows with each request of the process; the same again gets the same reply."""
    reserved: int = 0
    """Reservations that it holds: start times that nobody has used yet."""
    in_flight: int = 0
    """Calls that it has in flight."""
    wanted: int = 0
    """Starts for its waiters, as many as fit into one request."""
    prefetch: int = 0
    """Starts for callers to come."""
    prefetch_input: int = 0
    """Tokens that each of those reserves."""
    prefetch_output: int = 0
    full_speed: bool = False
    """A quota that nobody has set begins without a limit."""

    known_epoch: int = 0
    """The newest epoch that it knows of."""
    successes: int = 0
    """Calls begun in `known_epoch` that succeeded."""
    late_successes: int = 0
    """Calls begun before it that succeeded."""
    refused_epoch: int = -1
    """The newest epoch in which a call began that was rate limited; -1: none was."""
    retry_after_us: int = -1
    """How long the provider asked to wait then; -1: it did not say."""
    overloads: int = 0
    """Calls that the provider had no room for."""
    other_failures: int = 0
    """Calls that failed in another way. (Not used yet.)"""
    day_exhausted_us: int = -1
    """The day's quota is used up: the wait the provider asked for; 0: none; -1: it is not."""
    probe_ended: bool = False
    """The breaker's probe has ended, or was not made."""

    unused: int = 0
    """Reservations that started nothing."""
    reusable: int = 0
    """... of which so many have a start that lies ahead: others can have it."""
    reusable_input: int = 0
    """Tokens of the reusable ones."""
    reusable_output: int = 0
    debt_input: int = 0
    """Tokens that calls used beyond what was reserved; negative: a refund."""
    debt_output: int = 0
    forfeited_input: int = 0
    """Tokens (negative) that first guesses reserved too much, or that starts which came too late
    had reserved: nobody could use them, so they come back in part only."""
    forfeited_output: int = 0


@dataclass(slots=True)
class EndedCalls:
    """Calls that began under one version of the learnt limit of calls in flight, and have ended."""

    version: int = 0
    successes: int = 0
    overloads: int = 0
    seconds: float = 0.0
    """Sum of the successes' latencies."""
    tokens: float = 0.0
    """Sum of what they weigh: see `settlements.weight_of`."""
    squares: float = 0.0
    """Sum of latency squared by weight: how much seconds per token differ."""


@dataclass(slots=True)
class LimitReport:
    """What the newest headers said of the provider's limits; 0 (-1 of what is left): nothing."""

    binds: bool = False
    """Whether they are about the model that this quota is named after."""
    age_us: float = 0.0
    """How long ago the call began that was answered with them."""
    requests_per_second: float = 0.0
    tokens_per_second: float = 0.0
    input_per_second: float = 0.0
    output_per_second: float = 0.0
    requests_per_day: float = 0.0
    remaining_requests: float = -1.0
    """What was left of the minute's limit when they were written."""
    remaining_tokens: float = -1.0
    remaining_input: float = -1.0
    remaining_output: float = -1.0


@dataclass(slots=True)
class AcquireReply:
    """The limiter's reply to one request."""

    epoch: int
    """The present epoch: reservations and permits of an older one are void."""
    now_us: int
    """When the reply was made."""
    cooldown_until_us: int
    """The end of the cooldown; in the past: there is none."""
    ask_again_us: float
    """How long to wait before the next request, if waiters are held up."""
    exhausted_until_us: int
    """The day's quota is used up until then; 0: it is not."""
    consecutive_cooldowns: int
    """Cooldowns in a row without a success."""
    tokens_limited: bool
    """Requests must carry the estimates of their waiters."""
    slots_limited: bool
    """The calls in flight are limited: a call that ends makes room for another."""
    probing: bool
    """The breaker is open: one call at a time."""
    may_prefetch: bool
    """Nothing but rates limits the quota: starts may be reserved for callers to come."""
    oversize: bool
    """A call was granted that needs more tokens than a minute allows."""
    held_up: bool
    """Some waiters got no start."""
    limit_version: int = -1
    """The present version of the learnt limit of calls in flight; -1: there is none."""
    beside_successes: bool = False
    """Calls of the fleet have succeeded lately: an overload is a matter of how many there are."""
    starts_us: tuple[int, ...] = ()
    """Reserved starts, for waiters first, in microseconds after `now_us`."""

    @classmethod
    def parse(cls, raw: bytes) -> AcquireReply:
        head = size(cls)
        starts = struct.unpack_from(f"<{(len(raw) - head) // 4}I", raw, head)
        return unpack(cls, raw, starts_us=starts)

    @property
    def cooldown(self) -> float:
        """Seconds until the cooldown ends; 0 without one."""
        return max(self.cooldown_until_us - self.now_us, 0) * 1e-6


def acquire_arguments(
    process: str,
    request: AcquireRequest,
    estimates: Sequence[Estimate] = (),
    ended: Sequence[EndedCalls] = (),
    report: LimitReport | None = None,
) -> list[bytes | str | int | float]:
    """ARGV of acquire.lua; `estimates` of the waiters, where tokens are limited."""
    tokens: list[int] = []
    for estimate in estimates:
        tokens += (
            min(estimate.input_tokens, _MOST_TOKENS),
            min(estimate.output_tokens, _MOST_TOKENS),
        )
    return [
        PROTOCOL,
        process,
        pack(request),
        struct.pack(f"<{len(tokens)}I", *tokens),
        b"".join(map(pack, ended)),
        b"" if report is None else pack(report),
    ]
