"""What the simulated provider answers: recognisable, repeatable, valid by schema."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from batchllm_celery.simulation import SimulationConfig, answer_to, digest_of, json_answer_to
from batchllm_celery.simulation.answers import count_tokens
from batchllm_celery.simulation.replies import Chance, GenerateRequest, ReplyOutcome, decide

PROMPTS = ["", "Summarise: the lazy dog", "日本語のテキスト", "x" * 10_000, '{"quote": "\\""}']


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    name: str = Field(min_length=3, max_length=12)
    weight: float = Field(gt=0, le=2.5)
    parts: list[Part] = []


class Report(BaseModel):
    title: str
    colour: Colour
    verdict: Literal["good", "bad", "unclear"]
    score: int = Field(ge=1, le=5)
    negative: int = Field(lt=-3)
    tags: list[str] = Field(min_length=2, max_length=4)
    part: Part
    maybe: Part | None
    either: int | str
    pair: tuple[int, str]
    table: dict[str, int]
    sure: bool


GEMINI_SCHEMA = {
    "type": "OBJECT",
    "properties": {
        "label": {"type": "STRING", "enum": ["a", "b"]},
        "scores": {"type": "ARRAY", "items": {"type": "NUMBER"}, "minItems": "3", "maxItems": "3"},
        "note": {"type": "STRING", "nullable": True},
    },
    "required": ["label", "scores"],
}

leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "string"}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({}),
    st.builds(
        lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b},
        st.integers(0, 50),
        st.integers(0, 50),
    ),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b},
        st.integers(-1000, 1000),
        st.integers(0, 50),
    ),
    st.builds(
        lambda a: {"type": "integer", "multipleOf": a, "minimum": -40, "maximum": 40},
        st.integers(1, 30),
    ),
    st.builds(lambda a: {"type": "number", "exclusiveMinimum": a}, st.integers(-100, 100)),
    st.builds(lambda a: {"type": "integer", "exclusiveMaximum": a}, st.integers(-100, 100)),
    st.builds(lambda a: {"enum": a}, st.lists(st.integers(), min_size=1, max_size=4)),
    st.builds(lambda a: {"const": a}, st.text(max_size=5)),
    st.sampled_from(
        [
            {"type": "string", "format": form}
            for form in ("date", "time", "date-time", "email", "uri", "uuid", "ipv4")
        ]
    ),
)
names = st.sampled_from(["a", "b", "c", "d"])
schemas: st.SearchStrategy[dict[str, Any]] = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda p, r: {"type": "object", "properties": p, "required": sorted(r)},
                  st.dictionaries(names, inner, max_size=4), st.sets(names, max_size=3)),
        st.builds(lambda i, a, b: {"type": "array", "items": i, "minItems": a, "maxItems": a + b},
                  inner, st.integers(0, 3), st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda p: {"type": "array", "prefixItems": p, "items": False},
                  st.lists(inner, max_size=3)),
        st.builds(lambda e: {"type": "object", "additionalProperties": e}, inner),
    ),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_answer_tells_its_prompt(prompt: str) -> None:
    """An answer holds its prompt's digest and first words."""
    assert digest_of(prompt) in answer_to(prompt)
    assert answer_to(prompt).endswith(" ".join(prompt.split()[:40]))


@given(schemas, st.text(max_size=60))
def test_a_json_answer_is_valid_by_its_schema(schema: dict[str, Any], prompt: str) -> None:
    """Whatever the schema, the answer is an instance of it, and the same one each time."""
    answer = json_answer_to(prompt, schema)
    jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    ).validate(answer)
    assert json_answer_to(prompt, schema) == answer


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_pydantic_model_reads_its_answer(prompt: str) -> None:
    """A nested, recursive model with enums, bounds and unions parses the answer."""
    report = Report.model_validate(json_answer_to(prompt, Report.model_json_schema()))
    assert digest_of(prompt) in report.title


def test_gemini_s_schema_dialect_is_understood() -> None:
    """Upper-case types and numbers written as strings work as JSON Schema's own do."""
    answer = json_answer_to("prompt", GEMINI_SCHEMA)
    assert answer["label"] in ("a", "b")
    assert len(answer["scores"]) == 3
    assert digest_of("prompt") in answer["note"]


def test_different_prompts_choose_different_values() -> None:
    """Enumerations do not always get their first value."""
    schema = {"enum": ["a", "b", "c"]}
    assert {json_answer_to(f"prompt {n}", schema) for n in range(50)} == {"a", "b", "c"}


def shares(config: SimulationConfig, **request: Any) -> dict[ReplyOutcome, float]:
    outcomes = [
        decide(config, GenerateRequest("m", f"prompt {n}", **request), attempt=1).outcome
        for n in range(4000)
    ]
    return {outcome: outcomes.count(outcome) / 4000 for outcome in set(outcomes)}


@pytest.mark.parametrize(
    ("rate", "outcome"),
    [
        ("error_rate", ReplyOutcome.ERROR),
        ("drop_rate", ReplyOutcome.DROPPED),
        ("bad_output_rate", ReplyOutcome.MALFORMED),
        ("block_rate", ReplyOutcome.BLOCKED),
        ("truncated_rate", ReplyOutcome.TRUNCATED),
    ],
)
def test_each_rate_is_the_share_of_calls_that_end_so(rate: str, outcome: ReplyOutcome) -> None:
    """A rate of a tenth makes about a tenth of the calls end in its way, and the rest well."""
    found = shares(SimulationConfig().changed(**{rate: 0.1}), wants_json=True)
    assert found[outcome] == pytest.approx(0.1, abs=0.02)
    assert set(found) == {outcome, ReplyOutcome.OK}


def test_both_error_statuses_occur() -> None:
    """The configured error statuses share the errors."""
    config = SimulationConfig(error_rate=1.0)
    replies = [decide(config, GenerateRequest("m", str(n)), 1) for n in range(200)]
    assert {reply.status for reply in replies} == {500, 503}


def test_decisions_follow_from_seed_prompt_and_attempt() -> None:
    """The same attempt ends the same way; another attempt or seed may end in another way."""
    config = SimulationConfig(error_rate=0.5, latency=1.0, jitter=0.5)

    def fates(config: SimulationConfig, attempt: int) -> list[tuple[ReplyOutcome, float]]:
        replies = (decide(config, GenerateRequest("m", str(n)), attempt) for n in range(50))
        return [(reply.outcome, reply.latency) for reply in replies]

    assert fates(config, 1) == fates(config, 1)
    assert fates(config, 1) != fates(config, 2)
    assert fates(config, 1) != fates(config.changed(seed=7), 1)


def test_a_blocked_prompt_stays_blocked() -> None:
    """The safety filter decides by the prompt, not by the attempt."""
    config = SimulationConfig(block_rate=0.3)
    for number in range(30):
        request = GenerateRequest("m", str(number))
        assert len({decide(config, request, attempt).outcome for attempt in range(1, 5)}) == 1


@pytest.mark.parametrize("tail", [0.0, 1.0])
def test_latency_keeps_its_mean(tail: float) -> None:
    """A long tail changes the spread of latencies, not their mean."""
    config = SimulationConfig(latency=2.0, latency_tail=tail, jitter=0.1)
    latencies = [decide(config, GenerateRequest("m", str(n)), 1).latency for n in range(8000)]
    assert sum(latencies) / len(latencies) == pytest.approx(2.0, rel=0.06)
    assert (max(latencies) > 10) == bool(tail)


def test_an_output_limit_cuts_the_answer() -> None:
    """An answer longer than the request's limit is cut there and says so."""
    reply = decide(SimulationConfig(), GenerateRequest("m", "word " * 100, max_output_tokens=5), 1)
    assert (reply.outcome, reply.output_tokens) == (ReplyOutcome.TRUNCATED, 5)
    assert answer_to("word " * 100).startswith(reply.text)


def test_chances_are_uniform() -> None:
    """The four numbers of a chance fill [0, 1) evenly and do not follow each other."""
    chances = [Chance(0, str(n), 1) for n in range(4000)]
    for index in range(4):
        values = [chance[index] for chance in chances]
        assert sum(values) / 4000 == pytest.approx(0.5, abs=0.02)
        assert 0 <= min(values) < 0.01 < 0.99 < max(values) < 1
    products = sum(chance[0] * chance[1] for chance in chances) / 4000
    assert products == pytest.approx(0.25, abs=0.02)


def test_tokens_grow_with_utf_8_bytes() -> None:
    """Four bytes of UTF-8 are a token."""
    assert [count_tokens(text) for text in ("", "a", "abcd", "abcde", "日本語")] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize(
    "wrong", [{"error_rate": 2}, {"rpm": 0}, {"error_statuses": ()}, {"unknown": 1}]
)
def test_a_wrong_setting_is_refused(wrong: dict[str, Any]) -> None:
    """Settings are checked when they are made and when they are changed."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SimulationConfig().changed(**wrong)
