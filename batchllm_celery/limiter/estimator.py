"""Tokens a call will probably use: bytes / 3 and an output reserve, corrected by what was used."""

from __future__ import annotations

from dataclasses import dataclass

from batchllm_celery.limiter.permit import Estimate
from batchllm_celery.models import TokenUsage

#: Output tokens reserved by a strategy that has not shown any yet and names no maximum.
DEFAULT_OUTPUT = 256
#: How much one observation counts, once the first few are in.
WEIGHT = 0.1
#: A correction stays within this factor of the plain guess: one odd answer must not stop a fleet.
BOUNDS = (0.1, 10.0)


@dataclass(slots=True)
class _Learned:
    count: int = 0
    input_factor: float = 1.0
    output_mean: float = 0.0

    def observe(self, plain_input: int, usage: TokenUsage) -> None:
        self.count += 1
        weight = max(1.0 / self.count, WEIGHT)
        if usage.input_tokens and plain_input:
            seen = min(max(usage.input_tokens / plain_input, BOUNDS[0]), BOUNDS[1])
            self.input_factor += weight * (seen - self.input_factor)
        self.output_mean += weight * (usage.output_tokens - self.output_mean)


class Estimator:
    """One per process; learns per strategy key, in memory only."""

    def __init__(self) -> None:
        self._learned: dict[str, _Learned] = {}

    def estimate(self, key: str, prompt: str, max_output_tokens: int | None = None) -> Estimate:
        """Input and output tokens of one call; the output is at most `max_output_tokens`."""
        plain = plain_tokens(prompt)
        learned = self._learned.get(key)
        if learned is None or not learned.count:
            reserve = DEFAULT_OUTPUT if max_output_tokens is None else max_output_tokens
            return Estimate(plain, reserve)
        output = round(learned.output_mean)
        if max_output_tokens is not None:
            output = min(output, max_output_tokens)
        return Estimate(max(round(plain * learned.input_factor), 1), output)

    def observe(self, key: str, estimate: Estimate, usage: TokenUsage) -> None:
        """Learn from what a call used that was estimated so."""
        if not usage:
            return
        learned = self._learned.setdefault(key, _Learned())
        learned.observe(round(estimate.input_tokens / learned.input_factor), usage)


def plain_tokens(prompt: str) -> int:
    """UTF-8 bytes / 3, at least 1: closer than characters / 4 on Chinese and on JSON."""
    return max((len(prompt) if prompt.isascii() else len(prompt.encode())) // 3, 1)
