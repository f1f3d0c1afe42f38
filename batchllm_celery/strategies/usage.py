"""Token counts of every known SDK, as a mapping or an object, as a `TokenUsage`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple

from batchllm_celery.models import NO_TOKENS, TokenUsage

logger = logging.getLogger("batchllm_celery")

#: Upper bound for the tokens of one call, above any model's. A larger figure is cut to this,
#: because one wrong figure would spend a batch's budget and block its quota for days.
MOST_TOKENS = 10_000_000

_INPUT = (
    "input_tokens",  # OpenAI Responses, Anthropic, Cohere, PydanticAI, LangChain
    "prompt_tokens",  # OpenAI, Mistral, LiteLLM
    "inputTokens",  # Bedrock, Vercel AI SDK
    "prompt_token_count",  # Gemini, Llama on Bedrock
    "promptTokenCount",
    "promptTokens",
    "request_tokens",  # PydanticAI before 1.0
    "prompt_eval_count",  # Ollama
    "input_token_count",  # watsonx
    "inputTextTokenCount",  # Titan
    "inputTokenCount",  # Bedrock's invocation metrics
    "total_input_tokens",  # Gemini's interactions
)
_OUTPUT = (
    "output_tokens",
    "completion_tokens",
    "outputTokens",
    "candidates_token_count",
    "candidatesTokenCount",
    "completionTokens",
    "response_tokens",
    "eval_count",
    "generated_token_count",
    "generation_token_count",
    "response_token_count",
    "output_token_count",  # Replicate
    "outputTokenCount",
    "total_output_tokens",
)
_TOTAL = ("total_tokens", "totalTokens", "total_token_count", "totalTokenCount")
#: Part of the input.
_CACHED = (
    "cached_input_tokens",
    "cache_read_tokens",
    "cached_content_token_count",
    "cachedContentTokenCount",
    "cachedInputTokens",
    "prompt_cache_hit_tokens",  # DeepSeek
)
#: Part of `prompt_tokens`, but on top of `input_tokens` (Anthropic, Bedrock).
_CACHE_READ = ("cache_read_input_tokens", "cacheReadInputTokens", "cacheReadInputTokenCount")
_CACHE_WRITTEN = (
    "cache_creation_input_tokens",
    "cacheWriteInputTokens",
    "cacheWriteInputTokenCount",
)
#: On top of Gemini's input and output.
_TOOL_USE = ("tool_use_prompt_token_count", "toolUsePromptTokenCount")
_THOUGHTS = ("thoughts_token_count", "thoughtsTokenCount", "total_thought_tokens")

_INPUT_DETAILS = ("prompt_tokens_details", "input_tokens_details", "input_token_details")
_OUTPUT_DETAILS = ("completion_tokens_details", "output_tokens_details")
_NAMES = (*_INPUT, *_OUTPUT, *_TOTAL, *_CACHED, *_CACHE_READ, *_CACHE_WRITTEN)
#: Where a usage may be wrapped: an SDK's whole answer, Cohere's two ways of counting, metrics.
_WRAPPERS = (
    "billed_units", "usage", "usage_metadata", "usageMetadata", "token_usage", "tokens", "meta",
    "metrics", "amazon-bedrock-invocationMetrics",
)  # fmt: skip
_DEEPEST = 3

_ABOVE_PROMPT = ("input_tokens", "inputTokens")
_OPENAI_PROMPT = "prompt_tokens"


class Reading(NamedTuple):
    """A usage, and whether its output is a guess because the figures contradict each other."""

    usage: TokenUsage
    guessed: bool = False


def read_usage(source: Any) -> TokenUsage:
    """The tokens in `source`; zeros if it has none."""
    reading = understand(source)
    return NO_TOKENS if reading is None else reading.usage


def understand(source: Any, depth: int = 0) -> Reading | None:
    """The tokens in a usage object, mapping or method; None if it has none.

    Figures that can't be (negative, no number, over `MOST_TOKENS`) are cut to the nearest that can.
    """
    if isinstance(source, TokenUsage):
        return Reading(source if plausible(source) else _plain(source))
    if source is None or isinstance(source, str | bytes | int | float | list | set):
        return None
    if any(_has(source, name) for name in _NAMES):
        return _read(source)
    if callable(source) and depth < _DEEPEST:
        return understand(source(), depth + 1)
    told_none = False
    for name in _WRAPPERS if depth < _DEEPEST else ():
        wrapped = _get(source, name)
        found = understand(wrapped, depth + 1)
        if found is not None:
            return found
        told_none |= wrapped is None and _has(source, name)
    return Reading(NO_TOKENS) if told_none else None  # an answer whose server tells no usage


def plausible(usage: TokenUsage) -> bool:
    """Whether every figure is one that a call can have, and a plain number."""
    inputs, outputs, cached, total = (
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_input_tokens,
        usage.total_tokens,
    )
    return (
        type(inputs) is type(outputs) is type(cached) is type(total) is int
        and 0 <= inputs < MOST_TOKENS
        and 0 <= outputs < MOST_TOKENS
        and 0 <= cached < MOST_TOKENS
        and 0 <= total < 2 * MOST_TOKENS
    )


def count(value: Any) -> int:
    """A foreign number as a count of tokens; 0 for what is none."""
    if type(value) is int and 0 <= value < MOST_TOKENS:
        return value
    if isinstance(value, bool) or not isinstance(value, Real | Decimal | str):
        return 0
    try:
        number = float(value)
    except OverflowError:
        number = math.copysign(math.inf, 1 if isinstance(value, int) and value > 0 else -1)
    except (ValueError, ArithmeticError):
        return 0
    if 0 <= number < MOST_TOKENS:
        return int(number)
    return _clamped(number)


def reasoned_output(prompt: int, completion: int, total: int, reasoning: int) -> tuple[int, bool]:
    """Output tokens of an OpenAI-shaped usage, and whether they are a guess.

    Most servers count reasoning in `completion_tokens`, some beside them. The total shows which.
    """
    if total <= 0 or total >= MOST_TOKENS or prompt + completion == total:
        return completion, False
    if reasoning and prompt + completion + reasoning == total:
        return completion + reasoning, False
    return max(completion, total - prompt), True


_warned: set[int] = set()


def _clamped(number: float) -> int:
    kept = 0 if math.isnan(number) or number < 0 else MOST_TOKENS
    if kept not in _warned:
        _warned.add(kept)
        logger.warning("usage.impossible value=%g kept=%d (said once)", number, kept)
    return kept


def _has(source: Any, name: str) -> bool:
    if isinstance(source, Mapping):
        return name in source
    try:
        return hasattr(source, name)
    except Exception:  # a property that fails
        return False


def _get(source: Any, name: str) -> Any:
    try:
        return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
    except Exception:
        return None


def _first(source: Any, names: Iterable[str]) -> int:
    for name in names:
        found = count(_get(source, name))
        if found:
            return found
    return 0


def _detail(source: Any, groups: Iterable[str], *names: str) -> int:
    """A figure inside a nested object. (Gemini has lists under the same names.)"""
    for group in groups:
        details = _get(source, group)
        if details is not None and not isinstance(details, list):
            found = _first(details, names)
            if found:
                return found
    return 0


def _read(source: Any) -> Reading:
    given = next((name for name in _INPUT if count(_get(source, name))), "")
    inputs, outputs = _first(source, _INPUT), _first(source, _OUTPUT)
    total, guessed = _first(source, _TOTAL), False
    cached = _first(source, _CACHED) or _detail(
        source, _INPUT_DETAILS, "cached_tokens", "cache_read"
    )
    read = _first(source, _CACHE_READ)
    if _has(source, "cached_input_tokens"):
        read = 0  # our own shape
    elif read or _first(source, _CACHE_WRITTEN) or _has(source, "cache_creation"):
        if given in _ABOVE_PROMPT or not given:
            inputs += read + (_first(source, _CACHE_WRITTEN) or _written(source))
        cached = cached or read
    if given == _OPENAI_PROMPT:
        reasoning = _detail(source, _OUTPUT_DETAILS, "reasoning_tokens")
        outputs, guessed = reasoned_output(inputs, outputs, total, reasoning)
    inputs += _first(source, _TOOL_USE)
    outputs += _first(source, _THOUGHTS)
    if total >= MOST_TOKENS:
        total = 0
    usage = TokenUsage.model_construct(
        input_tokens=inputs,
        output_tokens=outputs,
        total_tokens=max(total, inputs + outputs),
        cached_input_tokens=cached,
    )
    return Reading(usage, guessed)


def _written(source: Any) -> int:
    """Anthropic's cache writes by lifetime, where the sum is missing."""
    created = _get(source, "cache_creation")
    names = ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")
    return sum(count(_get(created, name)) for name in names) if created is not None else 0


def _plain(usage: TokenUsage) -> TokenUsage:
    inputs, outputs = count(usage.input_tokens), count(usage.output_tokens)
    total = min(count(usage.total_tokens), 2 * MOST_TOKENS)
    return TokenUsage.model_construct(
        input_tokens=inputs,
        output_tokens=outputs,
        total_tokens=max(inputs + outputs, 0 if total >= MOST_TOKENS else total),
        cached_input_tokens=count(usage.cached_input_tokens),
    )
