"""Tokens as SDKs tell them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from batchllm_celery.errors import FailureKind
from batchllm_celery.models import Completion, TokenUsage
from batchllm_celery.strategies import CallableStrategy, as_completion, classify
from batchllm_celery.strategies.failures import extract_token_usage
from batchllm_celery.strategies.usage import MOST_TOKENS, count, plausible, understand

#: Usage -> input, output, cached.
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "ours": ({"input_tokens": 9, "output_tokens": 2, "cached_input_tokens": 4}, (9, 2, 4)),
    "OpenAI": (
        {
            "prompt_tokens": 9,
            "completion_tokens": 5,
            "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": None},
            "completion_tokens_details": {"reasoning_tokens": 3},
        },
        (9, 5, 4),
    ),
    "OpenAI Responses": (
        {
            "input_tokens": 9,
            "output_tokens": 5,
            "total_tokens": 14,
            "input_tokens_details": {"cached_tokens": 4},
            "output_tokens_details": {"reasoning_tokens": 3},
        },
        (9, 5, 4),
    ),
    "reasoning beside the output": (
        {
            "prompt_tokens": 10120,
            "completion_tokens": 1499,
            "total_tokens": 14428,
            "completion_tokens_details": {"reasoning_tokens": 2809},
        },
        (10120, 4308, 0),
    ),
    "Anthropic": (
        {
            "input_tokens": 5,
            "output_tokens": 2,
            "cache_read_input_tokens": 100,
            "cache_creation_input_tokens": 20,
        },
        (125, 2, 100),
    ),
    "Anthropic, all from the cache": (
        {"input_tokens": 0, "output_tokens": 2, "cache_read_input_tokens": 100},
        (100, 2, 100),
    ),
    "Anthropic, writes by lifetime": (
        {
            "input_tokens": 5,
            "output_tokens": 2,
            "cache_read_input_tokens": None,
            "cache_creation_input_tokens": None,
            "cache_creation": {"ephemeral_5m_input_tokens": 7, "ephemeral_1h_input_tokens": 1},
        },
        (13, 2, 0),
    ),
    "LiteLLM": (
        {"prompt_tokens": 125, "completion_tokens": 2, "cache_read_input_tokens": 100},
        (125, 2, 100),
    ),
    "Bedrock": (
        {"inputTokens": 5, "outputTokens": 2, "totalTokens": 107, "cacheReadInputTokens": 100},
        (105, 2, 100),
    ),
    "Gemini": (
        {
            "prompt_token_count": 9,
            "candidates_token_count": 2,
            "thoughts_token_count": 3,
            "cached_content_token_count": 4,
            "tool_use_prompt_token_count": None,
            "total_token_count": 14,
            "prompt_tokens_details": [{"modality": "TEXT", "token_count": 9}],
        },
        (9, 5, 4),
    ),
    "Gemini's REST": (
        {"promptTokenCount": 9, "candidatesTokenCount": 2, "thoughtsTokenCount": 3},
        (9, 5, 0),
    ),
    "PydanticAI": (
        {"requests": 1, "input_tokens": 9, "output_tokens": 2, "cache_read_tokens": 4},
        (9, 2, 4),
    ),
    "PydanticAI before 1.0": ({"request_tokens": 9, "response_tokens": 2}, (9, 2, 0)),
    "Mistral": ({"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}, (9, 2, 0)),
    "Cohere": (
        {
            "billed_units": {"input_tokens": 9.0, "output_tokens": 2.0},
            "tokens": {"input_tokens": 70.0, "output_tokens": 2.0},
        },
        (9, 2, 0),
    ),
    "Cohere without a bill": ({"tokens": {"input_tokens": 70.0, "output_tokens": 2}}, (70, 2, 0)),
    "LangChain": (
        {"input_tokens": 9, "output_tokens": 2, "input_token_details": {"cache_read": 4}},
        (9, 2, 4),
    ),
    "DeepSeek": (
        {"prompt_tokens": 9, "completion_tokens": 2, "prompt_cache_hit_tokens": 4},
        (9, 2, 4),
    ),
    "Bedrock's metrics": ({"inputTokenCount": 9, "outputTokenCount": 2}, (9, 2, 0)),
    "Replicate": ({"metrics": {"input_token_count": 9, "output_token_count": 2}}, (9, 2, 0)),
    "LangChain's metadata": (
        {"token_usage": {"prompt_tokens": 9, "completion_tokens": 2}},
        (9, 2, 0),
    ),
    "Ollama": ({"prompt_eval_count": 9, "eval_count": 2}, (9, 2, 0)),
    "a whole answer": ({"usage": {"prompt_tokens": 9, "completion_tokens": 2}}, (9, 2, 0)),
    "nothing but Nones": ({"prompt_tokens": None, "completion_tokens": None}, (0, 0, 0)),
}


def as_object(value: Any) -> Any:
    if isinstance(value, dict):
        return SimpleNamespace(**{name: as_object(inner) for name, inner in value.items()})
    return [as_object(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("shape", SHAPES)
def test_every_sdks_usage_is_understood_as_a_mapping_and_as_an_object(shape: str) -> None:
    """In a Completion and in the pair, nested details included."""
    given, wanted = SHAPES[shape]
    for usage in (given, as_object(given)):
        for answer in (Completion("x", cast(TokenUsage, usage)), ("x", usage)):
            told = as_completion(answer).usage
            found = (told.input_tokens, told.output_tokens, told.cached_input_tokens)
            assert found == wanted
            assert told.total_tokens >= sum(wanted[:2])


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_functions_pair_is_told_from_an_output_of_two(shape: str) -> None:
    """Any SDK's usage makes it a pair; something else is part of the output."""

    async def ask(prompt: str) -> Any:
        return "x", SHAPES[shape][0]

    async def two(prompt: str) -> Any:
        return "x", {"words": 2}

    assert (await CallableStrategy(ask).execute("?", 1, 1.0)).output == "x"
    assert (await CallableStrategy(two).execute("?", 1, 1.0)).output == ("x", {"words": 2})


def test_figures_that_contradict_each_other_are_a_marked_guess() -> None:
    """What the total leaves for the output counts; the result says that it is a guess."""
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 30}
    completion = as_completion(("x", usage))
    assert completion.usage.output_tokens == 20
    assert completion.metadata == {"usage_guessed": True}
    assert as_completion(("x", {**usage, "total_tokens": 12})).metadata == {}


@pytest.mark.parametrize(
    ("figure", "kept"),
    [
        (-5, 0),
        (math.nan, 0),
        (math.inf, MOST_TOKENS),
        (-math.inf, 0),
        (10**400, MOST_TOKENS),
        (-(10**400), 0),
        (1e59, MOST_TOKENS),
        (Decimal("1E+999999"), MOST_TOKENS),
        (Decimal("sNaN"), 0),
        ("12", 12),
        ("many", 0),
        (True, 0),
        (7.9, 7),
        (object(), 0),
    ],
)
def test_a_figure_that_can_not_be_is_cut(figure: Any, kept: int) -> None:
    """To the nearest one that can; the answer is kept."""
    assert count(figure) == kept
    usage = as_completion(("x", {"input_tokens": figure, "output_tokens": 3})).usage
    assert (usage.input_tokens, usage.output_tokens) == (kept, 3)


def test_a_usage_of_our_own_with_impossible_figures_is_cut_too() -> None:
    """Also the total, which a budget counts."""
    wild = TokenUsage(input_tokens=10**59, output_tokens=3)
    usage = as_completion(Completion("x", wild)).usage
    assert usage.total_tokens == MOST_TOKENS + 3
    assert not plausible(usage)
    usage = as_completion(Completion("x", TokenUsage(input_tokens=5, total_tokens=10**59))).usage
    assert usage.total_tokens == 5


@pytest.mark.parametrize("figure", [Fraction(9, 2), True, "7"])
def test_a_usage_of_our_own_with_other_numbers_becomes_plain(figure: Any) -> None:
    """Built without validation it holds anything; Redis counts whole numbers."""
    odd = TokenUsage.model_construct(input_tokens=figure, output_tokens=1, total_tokens=2)
    usage = as_completion(Completion("x", odd)).usage
    assert [type(usage[name]) for name in usage.keys()] == [int] * 4  # noqa: SIM118


class Failing(Mapping[str, Any]):
    """Fails, or exits, where it is read."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __getitem__(self, name: str) -> Any:
        raise self.error("no")

    def __iter__(self) -> Iterator[str]:
        raise self.error("no")

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("error", [RuntimeError, OSError, TimeoutError])
def test_an_answer_that_fails_when_it_is_read_is_a_bug_and_no_failed_call(
    error: type[Exception],
) -> None:
    """As a failed call it would be paid for again."""
    for answer in (("x", Failing(error)), Completion("x", {"input_tokens": 5}, Failing(error))):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="can't be read") as caught:
            as_completion(answer)
        assert classify(caught.value).kind is FailureKind.LOGIC_ERROR


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_the_tokens_of_an_answer_with_metadata_that_fails_count(error: type[BaseException]) -> None:
    """They were paid for, whatever is raised."""
    with pytest.raises((TypeError, SystemExit)) as caught:
        as_completion(Completion("x", {"input_tokens": 5}, Failing(error)))  # type: ignore[arg-type]
    assert extract_token_usage(caught.value).total_tokens == 5


class Named(NamedTuple):
    input_tokens: int = 9
    output_tokens: int = 2


@pytest.mark.parametrize(
    ("given", "total"),
    [(Named(), 11), (SimpleNamespace(id="1", usage=None), 0), ({"usage_metadata": None}, 0)],
)
def test_a_named_tuple_and_an_answer_without_usage_are_understood(given: Any, total: int) -> None:
    """A server that sends no usage costs no paid answer; a tuple may have names."""
    assert as_completion(("x", given)).usage.total_tokens == total


def test_what_tells_no_tokens_is_no_usage() -> None:
    """It is refused by name, and not counted as nothing."""
    for other in (17, "many", [1], {"words": 3}, object(), b"x"):
        assert understand(other) is None
        with pytest.raises(TypeError, match="no tokens can be read"):
            as_completion(("x", other))
