"""Options written into native bodies, in place of what stood there."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from batchllm_celery.dialects import anthropic, gemini, openai, responses
from batchllm_celery.dialects.overrides import OPTIONS, override
from batchllm_celery.dialects.refusals import Refusals
from batchllm_celery.models.request import NativeRequest, Request
from tests.unit.dialects import native_rows as rows

MODULES: dict[str, Any] = {
    "openai": openai,
    "responses": responses,
    "gemini": gemini,
    "anthropic": anthropic,
}
BODIES = {
    "openai": rows.PORTABLE_CHATS,
    "responses": rows.PORTABLE_RESPONSES,
    "gemini": rows.PORTABLE_GEMINI,
    "anthropic": rows.PORTABLE_ANTHROPIC,
}
ALL = {
    "system": "Say no.",
    "temperature": 0.25,
    "max_output_tokens": 2048,
    "schema": {"type": "object", "title": "new one"},
}


def overridden(dialect: Any, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    before = copy.deepcopy(body)
    changed = override(NativeRequest(dialect=dialect, body=body), options)
    assert isinstance(changed, NativeRequest)
    assert body == before
    return changed.body


@pytest.mark.parametrize(("name", "index"), [(n, i) for n in BODIES for i in range(len(BODIES[n]))])
def test_an_option_replaces_what_stood_there_and_nothing_else(name: str, index: int) -> None:
    body = BODIES[name][index]
    read = MODULES[name].read_request
    was, now = read(body), read(overridden(name, body, **ALL))
    assert isinstance(was, Request)
    assert isinstance(now, Request), str(now)
    assert now.schema == ALL["schema"]
    assert now.parameters.temperature == 0.25
    assert now.parameters.max_output_tokens == 2048
    assert now.messages[0].role == "system"
    assert now.messages[0].content == "Say no."
    turns = [message for message in was.messages if message.role != "system"]
    assert [message for message in now.messages if message.role != "system"] == turns
    assert now.tools == was.tools
    assert now.parameters.stop == was.parameters.stop
    assert now.parameters.seed == was.parameters.seed
    assert overridden(name, overridden(name, body, **ALL), **ALL) == overridden(name, body, **ALL)


def test_nothing_is_written_without_an_option() -> None:
    for row in rows.openai_rows():
        assert overridden("openai", row["body"]) == row["body"]


def test_the_model_is_written_where_the_body_names_one() -> None:
    for name in ("openai", "responses", "anthropic", "embeddings"):
        assert overridden(name, {"model": "a", "x": 1}, model="b") == {"model": "b", "x": 1}


def test_an_option_without_a_field_is_refused_by_name() -> None:
    gemini_row = NativeRequest(dialect="gemini", body=rows.generate())
    vectors = NativeRequest(dialect="embeddings", body=rows.EMBEDDINGS[0])
    refused = override(gemini_row, {"model": "m", "temperature": 1})
    assert isinstance(refused, Refusals)
    assert [refusal.path for refusal in refused] == ["option model"]
    refused = override(vectors, dict.fromkeys(OPTIONS, "x"))
    assert isinstance(refused, Refusals)
    assert len(list(refused)) == len(OPTIONS) - 1


@pytest.mark.parametrize("name", MODULES)
def test_a_body_of_a_wrong_form_raises_nothing(name: str) -> None:
    fields = ("messages", "text", "generationConfig", "output_config", "system")
    for wrong in ("x", 3, [None], ["x"], None):
        overridden(name, dict.fromkeys(fields, wrong), **ALL)


def test_other_spellings_go() -> None:
    """Two fields that mean the same would contradict each other."""
    body = rows.chat(max_tokens=5)
    assert "max_tokens" not in overridden("openai", body, max_output_tokens=9)
    mixed = rows.generate(generation_config={"max_output_tokens": 5, "top_k": 3})
    config = overridden("gemini", mixed, max_output_tokens=9)["generationConfig"]
    assert config == {"top_k": 3, "maxOutputTokens": 9}
