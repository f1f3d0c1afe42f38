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
        f'<think>maybe {{"name": "Bob", "age": 1}}? No</think>{GOOD}',
        f"<Thinking>{{</Thinking>\n```json\n{GOOD}\n```",
        f"{GOOD} which is, again, {GOOD}",
        f"\ufeff{GOOD}",
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


LOOSE = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "child": {"$ref": "#"}, "n": {"type": "number"}},
}


@pytest.mark.parametrize(
    "text",
    [
        '{"name":"Ann","address":{"city":"Rome"},}',  # a comma too many
        '{"city":"Rome","child":{"city":"Ostia","child":{"city":"x"}',  # cut in the middle
        '[{"city":"Rome"},{"city":"Ostia"},]',
        '"address":{"city":"Rome"},"x":1}',  # its beginning is missing
        '"address": {"city":"Rome"}',
        "{'city': 'Rome', 'child': {\"city\": \"Ostia\"}}",
        '```json\n{"city":"Rome","child":{"city":"Ostia"},}\n```',
        'First {"city":"Rome"}; in the end {"city":"Ostia",}',  # the final one is broken
        'First {"city":"Rome"}; in the end {"city":"Ost',
        'First {"city":"Rome"}; in the end {"city": 5}',
        '<think>{"city":"Rome"}',  # it never came to an answer
        '<think>a</think><reasoning>{"city":"Rome"}',
        '```json\n{"city":"Rome"}\n```\nor\n```json\n{"city":"Ostia"}\n```',  # which?
        '{"city":"Rome"}, {"city":"Ostia"}',
        '{"n": NaN}',
        '{"n": -Infinity}',
        '{"n": 1e999}',
        'Well: {"n": NaN}',
        '{"child": {"n": [1, Infinity]}}',
    ],
)
def test_neither_a_part_nor_a_draft_is_taken_for_the_answer(text: str) -> None:
    """It is asked for again: nobody can tell what was meant."""
    with pytest.raises(ProviderError) as caught:
        OutputSchema(LOOSE).parse(text)
    assert caught.value.kind is FailureKind.VALIDATION


@pytest.mark.parametrize("text", ["```\n5\n```", "It is ```json 5```", "```5```", "5"])
def test_a_fenced_number_is_found(text: str) -> None:
    """Also where no bracket shows the way."""
    assert OutputSchema({"type": "integer"}).parse(text) == 5


@pytest.mark.parametrize(
    "text",
    [
        "```json" + "\n" * 100_000,
        '"' * 200_000,
        '{"' + '\\"' * 200_000 + "\\",
        "<think>" * 100_000,
        '{"a":1,}' * 50_000,
        "}" * 200_000,
    ],
)
def test_an_odd_answer_takes_time_in_proportion_to_its_length(text: str) -> None:
    """Twice the text may not take four times as long: the loop waits meanwhile."""

    def seconds(answer: str) -> float:
        started = time.process_time()
        with pytest.raises(ProviderError):
            OutputSchema(LOOSE).parse(answer)
        return time.process_time() - started

    seconds(text)
    assert seconds(text) < 2


def test_many_problems_are_cut_short() -> None:
    """Five are named, the rest is counted."""
    schema = {"type": "array", "items": {"type": "integer"}}
    with pytest.raises(ProviderError, match="and 95 more"):
        OutputSchema(schema).parse(str(["x"] * 100).replace("'", '"'))


def test_a_million_braces_cost_no_time() -> None:
    """A broken answer must not hold the event loop."""
    started = time.process_time()
    for text in ("{" * 1_000_000, "[" * 100_000, '{"a":' * 100_000):
        with pytest.raises(ProviderError):
            OutputSchema(PERSON).parse(text)
    assert time.process_time() - started < 2


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/Missing"},
        {"type": "object", "additionalProperties": {"$ref": "#/bad"}},
        {"$defs": {"A": {"items": {"$ref": "other.json"}}}},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"not": {"$ref": "#"}},
        {"$defs": {"A": {"anyOf": [{"$ref": "#/$defs/B"}]}, "B": {"$ref": "#/$defs/A"}}},
        {"$dynamicAnchor": "node", "$dynamicRef": "#node"},
        {"$schema": 5},
        {"$schema": ["x"]},
        {"properties": {"a": {"pattern": "("}}},
        {"const": {1, 2}},
        nested(3000),
    ],
)
def test_a_schema_that_no_answer_could_be_checked_against_is_refused_at_once(schema: Any) -> None:
    """A reference that leads nowhere or round in a circle would fail every paid answer."""
    with pytest.raises(UsageError, match="JSON Schema"):
        OutputSchema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"child": {"$ref": "#"}}},
        {"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
        {"$id": "http://me/x", "$defs": {"a": {"$id": "a.json"}}, "$ref": "a.json"},
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "definitions": {"a": {"type": "object"}},
            "allOf": [{"$ref": "#/definitions/a"}, {"$ref": "#/definitions/a"}],
        },
        {"properties": {"$ref": {"type": "string"}}},
        {"not": {"enum": [{"$ref": "#/nowhere"}]}},
    ],
)
def test_references_that_can_be_followed_are_fine(schema: Any) -> None:
    """Recursion that goes down into the value comes to its end with it."""
    assert OutputSchema(schema).parse("{}") == {}


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
    """A schema that jsonschema checks with patterns of its own, and what is no pattern."""
    wrongs: list[dict[str, Any]] = [{"pattern": "("}, {"items": {"patternProperties": {"*": {}}}}]
    for wrong in wrongs:
        with pytest.raises(UsageError, match="pattern"):
            OutputSchema(wrong)
    with pytest.raises(UsageError, match="unevaluatedProperties"):
        OutputSchema({"patternProperties": {HARD: {}}, "unevaluatedProperties": False})


def _tree(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


_BRANCH = {"properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["z"]}
_OBJECTS = "[" + ",".join(f'{{"n": {n}}}' for n in range(20_000)) + "]"


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        ({"$defs": {"n": {"anyOf": [_BRANCH] * 3}}, "$ref": "#/$defs/n"}, _tree(60)),
        ({"$defs": {"n": {"oneOf": [_BRANCH] * 3}}, "$ref": "#/$defs/n"}, _tree(60)),
        ({"items": {"enum": [{"n": -n} for n in range(1, 20_000)]}}, _OBJECTS),
        ({"items": {"allOf": [{"required": ["z"]}] * 500}}, _OBJECTS),
        (
            {"contains": {"required": ["z"]}, "allOf": [{"contains": {"required": ["z"]}}] * 500},
            _OBJECTS,
        ),
    ],
)
def test_a_check_that_would_take_for_ever_is_given_up(schema: dict[str, Any], answer: str) -> None:
    """Whatever rule it is: the loop's other items wait meanwhile."""
    with pytest.raises(ProviderError) as caught:
        OutputSchema(schema).parse(answer)
    assert caught.value.kind is FailureKind.VALIDATION


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (_OBJECTS, True),
        (_OBJECTS[:-1] + ', {"n": 7}]', False),
        ("[1, 1.0]", False),
        ("[1, true, 0, false]", True),
        ('[[1], [true], {"a": 1}, {"a": true}, {}, [], "", null]', True),
        ('[{"a": 1, "b": [2]}, {"b": [2.0], "a": 1}]', False),
        ("[true, true]", False),
        ('["a", "a"]', False),
        ('{"no": "array"}', True),
    ],
)
def test_unique_items_are_told_in_one_pass(answer: str, good: bool) -> None:
    """Also thousands of objects; equal is what JSON calls equal."""
    schema = OutputSchema({"uniqueItems": True})
    if good:
        schema.parse(answer)
    else:
        with pytest.raises(ProviderError, match="unique"):
            schema.parse(answer)
