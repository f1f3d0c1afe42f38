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


HARD = "^(a|aa)+$"


@pytest.mark.parametrize(
    "text",
    [
        "```json" + "\n" * 100_000,
        "```" * 50_000,
        "```json\n" + "{" * 50_000 + "```",
        "[" * 99 + "1," * 300_000,
        '{"a": "' * 100 + "x" * 500_000,
        "{" * 200_000,
    ],
)
def test_an_answer_that_is_hard_to_read_takes_no_time(text: str) -> None:
    """Work grows with the length of the answer only."""
    started = time.process_time()
    with pytest.raises(ProviderError):
        OutputSchema({"type": "object", "required": ["never"]}).parse(text)
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        ({"type": "string", "pattern": HARD}, f'"{"a" * 40}!"'),
        ({"patternProperties": {HARD: {"type": "string"}}}, f'{{"{"a" * 40}!": 1}}'),
        (
            {"patternProperties": {HARD: {}}, "additionalProperties": False},
            f'{{"{"a" * 40}!": 1}}',
        ),
        ({"propertyNames": {"pattern": HARD}}, f'{{"{"a" * 40}!": 1}}'),
        ({"items": {"pattern": HARD}}, "[" + ",".join([f'"{"a" * 40}!"'] * 50) + "]"),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "properties": {"a": {"$ref": "#"}},
                "pattern": HARD,
            },
            f'{{"a": "{"a" * 40}!"}}',
        ),
        ({"type": "string", "pattern": "^(a+)+$"}, f'"{"a" * 32}!"'),
        ({"type": "string", "pattern": "(x+x+)+y"}, f'"{"x" * 5_000}"'),
    ],
)
def test_a_pattern_that_is_never_done_is_given_up(schema: dict[str, Any], answer: str) -> None:
    """Wherever a schema may hold one; or its engine finds that there is no match at once."""
    started = time.process_time()
    with pytest.raises(ProviderError) as refused:
        OutputSchema(schema).parse(answer)
    assert refused.value.kind is FailureKind.VALIDATION
    assert "a" * 30 not in str(refused.value)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"pattern": "^[a-z]+$"}, '"abc"', '"ABC"'),
        ({"pattern": "b"}, '"abc"', '"ac"'),
        ({"pattern": "b"}, "7", None),
        ({"patternProperties": {"^n_": {"type": "integer"}}}, '{"n_a": 1, "x": "y"}',
         '{"n_a": "1"}'),
        ({"properties": {"a": {}}, "additionalProperties": False}, '{"a": 1}', '{"b": 1}'),
        ({"patternProperties": {"^n_": {}}, "additionalProperties": {"type": "string"}},
         '{"n_a": 1, "x": "y"}', '{"x": 1}'),
    ],
)  # fmt: skip
def test_patterns_mean_what_they_meant(schema: dict[str, Any], good: str, bad: str | None) -> None:
    """The engine that can be stopped decides as JSON Schema says."""
    OutputSchema(schema).parse(good)
    if bad is not None:
        with pytest.raises(ProviderError):
            OutputSchema(schema).parse(bad)


def test_what_could_not_be_bounded_is_refused_beforehand() -> None:
    """A schema that jsonschema checks with patterns of its own."""
    with pytest.raises(UsageError, match="unevaluatedProperties"):
        OutputSchema({"patternProperties": {HARD: {}}, "unevaluatedProperties": False})
