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
    """Means of the latest calls. The correction is the ratio of two means, not a mean of ratios:
    so what is reserved for many calls sums up to what they use, whatever their sizes."""

    count: int = 0
    plain: float = 0.0
    input: float = 0.0
    output: float = 0.0

    @property
    def input_factor(self) -> float:
        return self.input / self.plain if self.plain else 1.0

    def observe(self, plain: int, usage: TokenUsage) -> None:
        self.count += 1
        weight = max(1.0 / self.count, WEIGHT)
        if usage.input_tokens:
            seen = min(max(usage.input_tokens, plain * BOUNDS[0]), plain * BOUNDS[1])
            self.plain += weight * (plain - self.plain)
            self.input += weight * (seen - self.input)
        self.output += weight * (usage.output_tokens - self.output)


class Estimator:
    """One per process; learns per strategy key, in memory only."""

    def __init__(self) -> None:
        self._learned: dict[str, _Learned] = {}

    def estimate(
        self, key: str, prompt: str | int, max_output_tokens: int | None = None
    ) -> Estimate:
        """Input and output tokens of one call; the output is at most `max_output_tokens`.

        `prompt` is the text, or the guess of its tokens where it is no text.
        """
        plain = plain_tokens(prompt)
        learned = self._learned.get(key)
        if learned is None or not learned.count:
            reserve = DEFAULT_OUTPUT if max_output_tokens is None else max_output_tokens
            return Estimate(plain, reserve, guessed=True)
        output = round(learned.output)
        if max_output_tokens is not None:
            output = min(output, max_output_tokens)
        return Estimate(max(round(plain * learned.input_factor), 1), output)

    def observe(self, key: str, prompt: str | int, usage: TokenUsage) -> None:
        """Learn from what a call with this prompt used."""
        if usage:
            self._learned.setdefault(key, _Learned()).observe(plain_tokens(prompt), usage)


def plain_tokens(prompt: str | int) -> int:
    """UTF-8 bytes / 3, at least 1: closer than characters / 4 on Chinese and on JSON. A number is
    a guess already."""
    if isinstance(prompt, int):
        return max(prompt, 1)
    if not prompt.isascii():
        return max(len(prompt.encode("utf-8", "surrogatepass")) // 3, 1)
    return max(len(prompt) // 3, 1)
