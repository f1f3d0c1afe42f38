"""Requests of no provider: built, written as JSON, read back, and refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from batchllm_celery.errors import InputError
from batchllm_celery.models.request import (
    AssistantMessage,
    FilePart,
    ImagePart,
    NativeRequest,
    Parameters,
    Request,
    TextPart,
    UserMessage,
    text_of,
)
from tests.unit.dialects.files import b64, data_url, png

USER = {"role": "user", "content": "hello"}


def test_a_request_is_json_both_ways() -> None:
    """What a payload holds reads back equal, nulls inside schemas and tools included."""
    request = Request.of(
        {
            "messages": [
                {"role": "system", "content": "s"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "image", "data": b64(png()), "media_type": "image/png"},
                        {"type": "file", "path": "a.pdf", "name": "b.pdf"},
                    ],
                },
            ],
            "tools": [{"name": "f", "parameters": {"default": None}}],
            "tool_choice": {"name": "f"},
            "schema": {"type": "object", "default": None},
            "parameters": {"seed": 0, "logprobs": 0, "temperature": 0},
            "extra": {"a": {"b": None, "c": 1.5}},
        }
    )
    line = json.dumps(request.to_json())
    assert Request.of(json.loads(line)) == request
    assert request.schema == {"type": "object", "default": None}
    assert request.parameters.given() == {"seed": 0, "logprobs": 0, "temperature": 0}


def test_python_users_give_bytes_and_models() -> None:
    class Person(BaseModel):
        name: str

    image = ImagePart(data=png())
    asked = UserMessage(content=(TextPart(text="who?"), image))
    request = Request.of({"messages": [asked], "schema": Person})
    assert request.schema == Person.model_json_schema()
    assert Request.of(request.to_json()) == request
    assert [(path, part.data) for path, part in request.media()] == [
        ("messages[0].content[1]", png())
    ]


def test_a_data_url_is_data() -> None:
    part = ImagePart.model_validate({"type": "image", "url": data_url(b"hi", "image/gif")})
    assert (part.url, part.data, part.media_type) == (None, b"hi", "image/gif")


def test_forms_that_people_send_back_are_taken() -> None:
    """OpenAI's nested tools, null content beside calls, one stop as a text, logprobs as a flag."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    request = Request.of(
        {
            "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "parameters": {"stop": "END", "logprobs": True},
        }
    )
    assert request.messages[1] == AssistantMessage(tool_calls=(call,))  # type: ignore[arg-type]
    assert request.tools[0].name == "f"
    assert request.parameters == Parameters(stop=("END",), logprobs=0)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "messages: is missing"),
        ([], "the request: must be an object"),
        ({"messages": []}, "messages: there must be at least one"),
        ({"messages": [{"content": "x"}]}, "messages[0]: has no role or type"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages[0]: must be one of"),
        ({"messages": [{**USER, "name": "x"}]}, "messages[0].name: is unknown"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text: is missing",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0]: give exactly one of url, data and path (found none)",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "file", "url": "u", "path": "p"}]}
                ]
            },
            "(found url and path)",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "data": "?"}]}]},
            "messages[0].content[0].data: must be bytes, or text in base64",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "data:x"}]}]},
            "messages[0].content[0]: a data: URL must begin with",
        ),
        ({"messages": [{"role": "assistant"}]}, "needs content or tool_calls"),
        ({"messages": [USER], "parameters": {"seed": 1.5}}, "parameters.seed: must be"),
        ({"messages": [USER], "parameters": {"seed": True}}, "parameters.seed: must be"),
        ({"messages": [USER], "parameters": {"n": 0}}, "parameters.n: must be"),
        ({"messages": [USER], "parameters": {"sede": 1}}, "parameters.sede: is unknown"),
        (
            {"messages": [USER], "parameters": {"temperature": float("nan")}},
            "parameters.temperature: must be a finite number",
        ),
        ({"messages": [USER], "extra": {"stream": True}}, "extra: must not name stream"),
        ({"messages": [USER], "extra": {"model": "x"}}, "extra: must not name model"),
        ({"messages": [USER], "tool_choice": {"name": "f"}}, "not among the tools"),
        ({"messages": [USER], "version": 2}, "version: version 2 is newer"),
        (
            {"messages": [USER], "tools": [{"type": "retrieval", "function": {}}]},
            "tools[0]: only tools of type 'function'",
        ),
    ],
)
def test_errors_name_the_field(value: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        Request.of(value)
    assert words in str(caught.value)


def test_errors_never_quote_the_prompt() -> None:
    """A value that is refused may be a user's text."""
    secret = "patient 4711"
    with pytest.raises(InputError) as caught:
        Request.of(
            {"messages": [{"role": "user", "content": {"text": secret}}], secret[:7]: secret}
        )
    assert secret not in str(caught.value)
    with pytest.raises(ValidationError) as raised:
        UserMessage(content={"text": secret})  # type: ignore[arg-type]
    assert secret not in str(raised.value)


def test_a_newer_native_request_is_refused() -> None:
    with pytest.raises(InputError, match="version 2 is newer"):
        NativeRequest.of({"dialect": "openai", "body": {}, "version": 2})
    with pytest.raises(InputError, match="dialect"):
        NativeRequest.of({"dialect": "mistral", "body": {}})


def test_media_are_replaced_by_what_was_read() -> None:
    """A path becomes data before the item is stored; everything else stays."""
    request = Request.of(
        {
            "messages": [
                USER,
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "x"}, {"type": "file", "path": "a.pdf"}],
                },
            ]
        }
    )
    seen = []

    def read(path: str, part: ImagePart | FilePart) -> ImagePart | FilePart:
        seen.append((path, part.path))
        return part.model_copy(update={"path": None, "data": b"%PDF-1"})

    changed = request.map_media(read)
    assert seen == [("messages[1].content[1]", "a.pdf")]
    assert [part.data for _, part in changed.media()] == [b"%PDF-1"]
    assert changed.messages[0] == request.messages[0]


def test_feedback_is_a_further_user_message() -> None:
    request = Request.of({"messages": [USER]}).with_user_text("again")
    assert request.messages[1] == UserMessage(content="again")


def test_the_text_of_any_prompt() -> None:
    """Estimates and rehearsals see all texts, and no base64."""
    request = Request.of(
        {
            "messages": [
                {"role": "system", "content": "sys"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "one"},
                        {"type": "image", "url": data_url(png(), "image/png")},
                        {"type": "text", "text": "two"},
                    ],
                },
            ]
        }
    )
    native = NativeRequest(
        dialect="gemini",
        body={"contents": [{"parts": [{"text": "a"}, {"inlineData": {"data": "AAAA"}}]}]},
    )
    assert text_of("plain") == "plain"
    assert text_of(request) == "sys\n\none\n\ntwo"
    assert text_of(native) == "a"
    chat = NativeRequest(
        dialect="openai",
        body={"messages": [{"content": "x"}], "input": ["y", data_url(b"z", "a/b")]},
    )
    assert text_of(chat) == "x\n\ny"
