"""What the provider answers to a call, decided when the call arrives."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist
from typing import Any

from batchllm_celery.simulation.answers import answer_to, count_tokens, json_text_for
from batchllm_celery.simulation.config import SimulationConfig

_NORMAL = NormalDist()


class ReplyOutcome(StrEnum):
    """How a call ends."""

    OK = "ok"
    TRUNCATED = "truncated"
    BLOCKED = "blocked"
    MALFORMED = "malformed"
    REFUSED = "refused"
    """429: a limit, or an injected refusal."""
    ERROR = "error"
    """One of the configured error statuses."""
    REJECTED = "rejected"
    """The call itself was wrong: key, model, cache or body."""
    DROPPED = "dropped"
    """The connection was closed without an answer."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request for an answer, whatever wire format it came in."""

    model: str
    prompt: str
    system: str = ""
    wants_json: bool = False
    schema: Mapping[str, Any] | None = None
    tool: str | None = None
    """The function that the answer must call; `schema` is then that of its arguments."""
    max_output_tokens: int | None = None
    cached_tokens: int = 0
    user: str | None = None
    """Whom the caller says it asks for (OpenAI's `user`): tests name their process so."""
    body: Mapping[str, Any] | None = None
    """The whole body, as it came."""
    only_input: bool = False
    """Whether the answer has no output tokens, as embeddings."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The decision: what to answer, and after how long."""

    outcome: ReplyOutcome
    status: int
    latency: float
    """Seconds."""
    text: str = ""
    input_tokens: int = 0
    """With the cached ones."""
    output_tokens: int = 0
    thoughts_tokens: int = 0
    cached_tokens: int = 0
    tool: str | None = None


class Chance:
    """Uniform numbers in [0, 1) that depend on a seed, a prompt and an attempt alone."""

    __slots__ = ("_digest",)

    def __init__(self, seed: int, prompt: str, attempt: int) -> None:
        text = f"{seed}\0{attempt}\0{prompt}"
        self._digest = hashlib.blake2b(text.encode(), digest_size=32).digest()

    def __getitem__(self, index: int) -> float:
        """The number `index` of four."""
        part = self._digest[index * 8 : index * 8 + 8]
        return (int.from_bytes(part, "big") >> 11) / (1 << 53)


def decide(config: SimulationConfig, request: GenerateRequest, attempt: int) -> Reply:
    """The reply to an admitted call.

    Args:
        config: the provider.
        request: the call.
        attempt: how many calls with this prompt were admitted, this one included.
    """
    chance = Chance(config.seed, request.prompt, attempt)
    latency = _latency(config, chance[0], chance[1])
    cached = request.cached_tokens
    tokens = cached + count_tokens(request.system + request.prompt)
    broken = _broken(config, chance[2])
    if broken is not None:
        return Reply(*broken, latency, input_tokens=tokens, cached_tokens=cached)
    if Chance(config.seed, request.prompt, 0)[0] < config.block_rate:
        return Reply(ReplyOutcome.BLOCKED, 200, latency, input_tokens=tokens, cached_tokens=cached)
    outcome, text, output_tokens = _answer(config, request, chance[3])
    if request.only_input:
        return Reply(ReplyOutcome.OK, 200, latency, input_tokens=tokens)
    if config.output_tail:
        factor = _lognormal(config.output_tail, Chance(config.seed, request.prompt, -attempt)[3])
        output_tokens = max(1, round(output_tokens * factor))
    return Reply(
        outcome,
        200,
        latency,
        text=text,
        input_tokens=tokens,
        output_tokens=output_tokens,
        thoughts_tokens=config.thoughts_tokens,
        cached_tokens=cached,
        tool=request.tool,
    )


def _latency(config: SimulationConfig, first: float, second: float) -> float:
    latency = config.latency
    if config.latency_tail and latency:
        latency *= _lognormal(config.latency_tail, first)
    return max(0.0, latency + config.jitter * (2 * second - 1))


def _lognormal(sigma: float, chance: float) -> float:
    """A factor with mean 1, from a uniform number."""
    return math.exp(sigma * _NORMAL.inv_cdf(max(chance, 1e-12)) - sigma * sigma / 2)


def _broken(config: SimulationConfig, chance: float) -> tuple[ReplyOutcome, int] | None:
    if chance < config.drop_rate:
        return ReplyOutcome.DROPPED, 0
    chance -= config.drop_rate
    if chance < config.error_rate:
        which = int(chance / config.error_rate * len(config.error_statuses))
        return ReplyOutcome.ERROR, config.error_statuses[which]
    return None


def _answer(
    config: SimulationConfig, request: GenerateRequest, chance: float
) -> tuple[ReplyOutcome, str, int]:
    structured = request.wants_json or request.tool is not None
    text = (
        json_text_for(request.prompt, request.schema) if structured else answer_to(request.prompt)
    )
    tokens = config.output_tokens or count_tokens(text)
    if structured and chance < config.bad_output_rate:
        return ReplyOutcome.MALFORMED, text[: len(text) // 2], tokens
    if chance >= 1 - config.truncated_rate:
        return ReplyOutcome.TRUNCATED, text[: len(text) // 2], max(1, tokens // 2)
    limit = request.max_output_tokens
    if limit is not None and tokens > limit:
        return ReplyOutcome.TRUNCATED, text[: len(text) * limit // tokens], limit
    return ReplyOutcome.OK, text, tokens
