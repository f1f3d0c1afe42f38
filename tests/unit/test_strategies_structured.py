"""JSON is found in what models say, checked, and what is wrong is fed back."""

from __future__ import annotations

import time
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from batchllm_celery.errors import FailureKind, ProviderError, UsageError
from batchllm_celery.models import RetryState, TokenUsage
from batchllm_celery.strategies import (
    CallableStrategy,
    OutputSchema,
    StructuredStrategy,
    as_completion,
    classify,
)


class Person(BaseModel):
    name: str
    age: int
    mood: Literal["good", "bad"] = "good"


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}

GOOD = '{"name": "Ada", "age": 36}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"  {GOOD}\n",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}```",
        f"Sure! Here it is:\n```json\n{GOOD}\n```\nAnything else?",
        f"Here it is: {GOOD} Anything else?",
        f"A set {{like this}}, then {GOOD}",
        f'First {{"note": 1}}, and then {GOOD}',
        f"Not [1, 2] but {GOOD}",
        f"```json\n{{}}\n```\nor rather\n```json\n{GOOD}\n```",
    ],
)
def test_json_is_found_amid_prose_and_fences(text: str) -> None:
    """What fits the schema is taken, wherever it stands."""
    assert OutputSchema(PERSON).parse(text) == {"name": "Ada", "age": 36}
    assert OutputSchema(Person).parse(text) == Person(name="Ada", age=36)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not valid JSON"),
        ("I can't do that.", "not valid JSON"),
        (GOOD[:12], "not valid JSON"),
        ('{"name": "Ada"}', "age"),
        ('{"name": "Ada", "age": "SECRET-VALUE"}', "age"),
        ('{"name": "Ada", "age": -1, "mood": "SECRET-VALUE"}', "age|mood"),
        ('"SECRET-VALUE"', "the answer"),
    ],
)
@pytest.mark.parametrize("schema", [Person, PERSON])
def test_what_is_wrong_is_named_and_never_quoted(schema: Any, text: str, problem: str) -> None:
    """The error says where and which rule; the answer's own text is not in it."""
    with pytest.raises(ProviderError, match=problem) as caught:
        OutputSchema(schema).parse(text)
    assert caught.value.kind is FailureKind.VALIDATION
    assert "SECRET-VALUE" not in str(caught.value)


def test_many_problems_are_cut_short() -> None:
    """Five are named, the rest is counted."""
    schema = {"type": "array", "items": {"type": "integer"}}
    with pytest.raises(ProviderError, match="and 95 more"):
        OutputSchema(schema).parse(str(["x"] * 100).replace("'", '"'))


def test_a_million_braces_cost_no_time() -> None:
    """A broken answer must not hold the event loop."""
    started = time.monotonic()
    for text in ("{" * 1_000_000, "[" * 100_000, '{"a":' * 100_000):
        with pytest.raises(ProviderError):
            OutputSchema(PERSON).parse(text)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"required": "name"}, 5, str])
def test_a_bad_schema_is_refused_at_once(schema: Any) -> None:
    """Before anything is enqueued, in one line."""
    with pytest.raises(UsageError, match=r"(?i)schema"):
        OutputSchema(schema)


async def test_any_text_strategy_becomes_a_structured_one() -> None:
    """The schema is in the prompt; a wrong answer is fed back into the next one, and its tokens
    are counted."""
    prompts: list[str] = []
    answers = ['{"name": "Ada"}', f"Here you are: {GOOD}"]

    async def ask(prompt: str) -> tuple[str, dict[str, int]]:
        prompts.append(prompt)
        return answers[len(prompts) - 1], {"input_tokens": 10, "output_tokens": 5}

    strategy, state = StructuredStrategy(CallableStrategy(ask), Person), RetryState()
    await strategy.prepare()
    with pytest.raises(ProviderError) as caught:
        await strategy.execute("Who?", 1, 9, state)
    assert classify(caught.value).usage == TokenUsage(input_tokens=10, output_tokens=5)
    await strategy.on_error(caught.value, 1, state)
    completion = await strategy.execute("Who?", 2, 9, state)
    assert completion.output == Person(name="Ada", age=36)
    assert "rejected" not in prompts[0]
    assert "Your previous answer was rejected: ValidationError: age: Field required" in prompts[1]


async def test_other_failures_leave_no_feedback() -> None:
    """A timeout says nothing about the answer."""

    async def ask(prompt: str) -> str:
        return GOOD

    strategy, state = StructuredStrategy(CallableStrategy(ask), PERSON), RetryState()
    await strategy.on_error(TimeoutError("late"), 1, state)
    await strategy.on_error(TimeoutError("late"), 1, None)
    assert not state
    assert as_completion(await strategy.execute("x", 1, 9, None)).output["age"] == 36
