"""What a process has to tell the limiter: outcomes, summed up until the next call carries them."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchllm_celery.limiter.permit import CallOutcome, Estimate, Permit
from batchllm_celery.models import TokenUsage

#: Asked to wait for longer than this, we ask the provider again all the same.
LONGEST_WAIT = 32 * 86_400


@dataclass(slots=True)
class Unused:
    """A ticket or permit that started nothing."""

    start: float
    generation: int
    reserved: Estimate


@dataclass(slots=True)
class Pending:
    """Sums of settled permits. Only sums matter to the quota, so they cost nothing to carry."""

    generation: int = 0
    successes: int = 0
    late_successes: int = 0
    unused: list[Unused] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    guessed_input: int = 0
    guessed_output: int = 0
    """What first guesses reserved too much (negative)."""
    refused_generation: int = -1
    retry_after: float = -1.0
    overloads: int = 0
    day_exhausted: float = -1.0
    probe_ended: bool = False
    since: float | None = None

    def add(
        self,
        permit: Permit,
        outcome: CallOutcome,
        now: float,
        usage: TokenUsage | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Count one permit's outcome; the actual tokens replace the reserved ones."""
        if self.since is None:
            self.since = now
        if permit.probe:
            self.probe_ended = True
        if outcome is CallOutcome.SUCCEEDED:
            self._succeeded(permit)
        elif outcome is CallOutcome.REFUSED:
            self._refused(permit, retry_after)
        elif outcome is CallOutcome.OVERLOADED:
            self.overloads += 1
        elif outcome is CallOutcome.DAY_EXHAUSTED:
            self.day_exhausted = max(self.day_exhausted, retry_after or 0.0, 0.0)
        if outcome is CallOutcome.UNUSED:
            self.unused.append(Unused(permit.start, permit.generation, permit.estimate))
        elif outcome is CallOutcome.REFUSED and not usage:
            self.owe(-permit.estimate.input_tokens, -permit.estimate.output_tokens)
        elif usage:
            self.replace(permit.estimate, usage)

    def replace(self, reserved: Estimate, by: Estimate | TokenUsage) -> None:
        """Other tokens than the reserved ones count from now on."""
        more_input = by.input_tokens - reserved.input_tokens
        more_output = by.output_tokens - reserved.output_tokens
        if reserved.guessed:
            self.guessed_input += min(more_input, 0)
            self.guessed_output += min(more_output, 0)
            more_input, more_output = max(more_input, 0), max(more_output, 0)
        self.owe(more_input, more_output)

    def owe(self, input_tokens: int, output_tokens: int) -> None:
        """Tokens used beyond what was reserved (negative: a refund)."""
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens

    def _succeeded(self, permit: Permit) -> None:
        if permit.generation > self.generation:
            self.late_successes += self.successes
            self.generation, self.successes = permit.generation, 0
        if permit.generation == self.generation:
            self.successes += 1
        else:
            self.late_successes += 1

    def _refused(self, permit: Permit, retry_after: float | None) -> None:
        if permit.generation > self.refused_generation:
            self.refused_generation, self.retry_after = permit.generation, -1.0
        if permit.generation == self.refused_generation and retry_after is not None:
            self.retry_after = max(self.retry_after, retry_after)

    def arguments(self, generation: int, now: float) -> list[int]:
        """The numbers `known_gen` to `probe_ended` of acquire.lua, for a process that knows
        `generation`.

        Of what was not used only starts that lie ahead can be given to others: made up for later,
        those of the past would come on top of the rate. What a cooldown has voided was freed by it.
        """
        current = self.generation >= generation
        known = max(self.generation, generation)
        valid = [one for one in self.unused if one.generation >= known]
        ahead = [one.reserved for one in valid if one.start > now]
        late = [one.reserved for one in valid if one.start <= now]
        return [
            known,
            self.successes if current else 0,
            self.late_successes if current else self.late_successes + self.successes,
            len(self.unused),
            len(ahead),
            sum(reserved.input_tokens for reserved in ahead),
            sum(reserved.output_tokens for reserved in ahead),
            self.input_tokens,
            self.output_tokens,
            self.guessed_input - sum(reserved.input_tokens for reserved in late),
            self.guessed_output - sum(reserved.output_tokens for reserved in late),
            self.refused_generation,
            _microseconds(self.retry_after),
            self.overloads,
            _microseconds(self.day_exhausted),
            int(self.probe_ended),
        ]


def _microseconds(seconds: float) -> int:
    # (So written, what is not a number is none.)
    return int(min(seconds, LONGEST_WAIT) * 1e6) if seconds >= 0 else -1
