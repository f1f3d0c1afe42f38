"""What has ended in this process, summed up until the next acquire request carries it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from batchllm_celery.limiter.permit import CallOutcome, Estimate, SettledCall
from batchllm_celery.limiter.protocol import EndedCalls, LimitReport
from batchllm_celery.models import TokenUsage

#: The longest wait, in seconds, that is passed on. Who asks for more is asked again after it.
LONGEST_WAIT = 32 * 86_400
#: What a call weighs beside its tokens, and a token of its prompt beside one of its answer. Prompts
#: are read in parallel, answers written token by token.
OVERHEAD_TOKENS, INPUT_WEIGHT = 20.0, 0.005
#: Versions of the learnt limit that calls are told apart by; older ones count as one.
_MOST_VERSIONS = 8
_MINUTE, _DAY = 60.0, 86_400.0


@dataclass(slots=True)
class Unused:
    """A reservation that started nothing: start (local monotonic time), epoch, tokens."""

    start: float
    epoch: int
    reserved: Estimate


@dataclass(slots=True)
class Settlements:
    """Sums of settled calls: to the quota only sums matter, however many calls there were."""

    epoch: int = 0
    """The newest epoch of a success so far, or that the process knew when the sums began."""
    since: float | None = None
    """When the first of them ended (local monotonic time); None: nothing to carry."""
    successes: int = 0
    late_successes: int = 0
    unused: list[Unused] = field(default_factory=list)
    debt_input: int = 0
    debt_output: int = 0
    overreserved_input: int = 0
    """Tokens (negative) that first guesses reserved too much."""
    overreserved_output: int = 0
    refused_epoch: int = -1
    retry_after: float = -1.0
    overloads: int = 0
    other_failures: int = 0
    day_exhausted: float = -1.0
    probe_ended: bool = False
    ended: dict[int, EndedCalls] = field(default_factory=dict)
    """Successes and overloads by the version of the learnt limit that they began under."""
    told: SettledCall | None = None
    """The call that began last of those whose answers told the provider's limits."""

    def add(self, call: SettledCall, now: float) -> None:
        """Count one call; the tokens that it used replace the reserved ones."""
        permit, usage = call.permit, call.usage
        if self.since is None:
            self.since = now
        if call.limits is not None and (
            self.told is None or permit.start >= self.told.permit.start
        ):
            self.told = call
        self.probe_ended |= permit.probe
        match call.outcome:
            case CallOutcome.SUCCEEDED:
                self._count_success(permit.epoch)
                self._count_ended(call)
            case CallOutcome.REFUSED:
                self._count_refusal(permit.epoch, call.retry_after)
            case CallOutcome.OVERLOADED:
                self.overloads += 1
                self._count_ended(call)
            case CallOutcome.FAILED:
                self.other_failures += 1
            case CallOutcome.DAY_EXHAUSTED:
                self.day_exhausted = max(self.day_exhausted, call.retry_after or 0.0, 0.0)
            case CallOutcome.UNUSED:
                self.unused.append(Unused(permit.start, permit.epoch, permit.estimate))
                return
        if usage:
            self.replace(permit.estimate, usage)
        elif call.outcome is CallOutcome.REFUSED:  # a refused call used nothing
            self.debt_input -= permit.estimate.input_tokens
            self.debt_output -= permit.estimate.output_tokens

    def replace(self, reserved: Estimate, by: Estimate | TokenUsage) -> None:
        """Count other tokens than the reserved ones from now on."""
        more_input = by.input_tokens - reserved.input_tokens
        more_output = by.output_tokens - reserved.output_tokens
        if reserved.guessed:
            self.overreserved_input += min(more_input, 0)
            self.overreserved_output += min(more_output, 0)
            more_input, more_output = max(more_input, 0), max(more_output, 0)
        self.debt_input += more_input
        self.debt_output += more_output

    def _count_success(self, epoch: int) -> None:
        if epoch > self.epoch:
            self.late_successes += self.successes
            self.epoch, self.successes = epoch, 0
        if epoch == self.epoch:
            self.successes += 1
        else:
            self.late_successes += 1

    def _count_refusal(self, epoch: int, retry_after: float | None) -> None:
        if epoch > self.refused_epoch:
            self.refused_epoch, self.retry_after = epoch, -1.0
        if epoch == self.refused_epoch and retry_after is not None:
            self.retry_after = max(self.retry_after, retry_after)

    def _count_ended(self, call: SettledCall) -> None:
        ended = self.ended.get(call.permit.limit_version)
        if ended is None:
            ended = self.ended[call.permit.limit_version] = EndedCalls(call.permit.limit_version)
            if len(self.ended) > _MOST_VERSIONS:
                self._merge_oldest()
        if call.outcome is CallOutcome.OVERLOADED:
            ended.overloads += 1
            return
        ended.successes += 1
        weight = weight_of(call)
        ended.seconds += call.latency
        ended.tokens += weight
        ended.squares += call.latency**2 / weight

    def _merge_oldest(self) -> None:
        oldest, next_one = (self.ended.pop(version) for version in sorted(self.ended)[:2])
        for name in ("successes", "overloads", "seconds", "tokens", "squares"):
            setattr(next_one, name, getattr(next_one, name) + getattr(oldest, name))
        self.ended[next_one.version] = next_one

    def ended_calls(self, *, limited: bool) -> list[EndedCalls]:
        """What the limiter learns the provider's room from: nothing before the first overload."""
        if not limited and not self.overloads:
            return []
        return [self.ended[version] for version in sorted(self.ended)]

    def request_fields(self, epoch: int, now: float) -> dict[str, Any]:
        """The fields of an `AcquireRequest` from `known_epoch` on; the process knows `epoch`.

        Only starts that lie ahead can be given to others. A start of the past that was made up for
        later would come on top of the rate, so its tokens are forfeited. What a new epoch has
        voided is returned by that.
        """
        current = self.epoch >= epoch
        known = max(self.epoch, epoch)
        valid = [one for one in self.unused if one.epoch >= known]
        ahead = [one.reserved for one in valid if one.start > now]
        late = [one.reserved for one in valid if one.start <= now]
        return {
            "known_epoch": known,
            "successes": self.successes if current else 0,
            "late_successes": self.late_successes + (0 if current else self.successes),
            "refused_epoch": self.refused_epoch,
            "retry_after_us": _microseconds(self.retry_after),
            "overloads": self.overloads,
            "other_failures": self.other_failures,
            "day_exhausted_us": _microseconds(self.day_exhausted),
            "probe_ended": self.probe_ended,
            "unused": len(self.unused),
            "reusable": len(ahead),
            "reusable_input": sum(reserved.input_tokens for reserved in ahead),
            "reusable_output": sum(reserved.output_tokens for reserved in ahead),
            "debt_input": self.debt_input,
            "debt_output": self.debt_output,
            "forfeited_input": self.overreserved_input - sum(one.input_tokens for one in late),
            "forfeited_output": self.overreserved_output - sum(one.output_tokens for one in late),
        }


def limit_report(call: SettledCall, now: float) -> LimitReport:
    """What a call's headers said, per second.

    A limit whose window the numbers do not show is one of a minute: that is what providers count
    in, but for some that say so by a reset of hours.
    """
    told = call.limits
    assert told is not None
    report = LimitReport(
        binds=told.quota == call.permit.quota, age_us=max(now - call.permit.start, 0.0) * 1e6
    )
    for name, window in (
        ("requests", told.requests),
        ("tokens", told.tokens),
        ("input", told.input_tokens),
        ("output", told.output_tokens),
    ):
        if window is None or not window.limit:
            continue
        # (A minute's window may reset in a little more than one: Anthropic's dates are rounded up.)
        if window.window_seconds() == _DAY and (window.reset_seconds or 0) > 2 * _MINUTE:
            if name == "requests":
                report.requests_per_day = window.limit
            continue
        setattr(report, f"{name}_per_second", window.limit / _MINUTE)
        if window.remaining is not None:
            setattr(report, f"remaining_{name}", window.remaining)
    return report


def weight_of(call: SettledCall) -> float:
    """What a call costs a server, in tokens of an answer."""
    used = call.usage or call.permit.estimate
    return OVERHEAD_TOKENS + used.output_tokens + INPUT_WEIGHT * used.input_tokens


def _microseconds(seconds: float) -> int:
    """At most `LONGEST_WAIT`; -1 for a negative number, and for what is not a number."""
    return int(min(seconds, LONGEST_WAIT) * 1e6) if seconds >= 0 else -1
