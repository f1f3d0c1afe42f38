"""Options that are written into a native body: what `--override NAME` asks for beside such rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from batchllm_celery.dialects.gemini import camel
from batchllm_celery.dialects.openai import schema_label
from batchllm_celery.dialects.refusals import Refusal, Refusals
from batchllm_celery.models.request import DialectName, NativeRequest

#: The options that have a field in some body.
OPTIONS = ("model", "system", "temperature", "max_output_tokens", "schema")


def override(request: NativeRequest, options: Mapping[str, Any]) -> NativeRequest | Refusals:
    """The request with each option in the body's own field, in place of what stood there.

    The given request is not changed. An option that the dialect has no field for is refused.
    """
    body = copy.copy(request.body)
    writers = _WRITERS[request.dialect]
    refused = [Refusal(f"option {name}", "unsupported") for name in options if name not in writers]
    if refused:
        return Refusals(tuple(refused))
    for name, value in options.items():
        writers[name](body, value)
    return request.model_copy(update={"body": body})


def _object(value: Any) -> dict[str, Any]:
    """The object; an empty one for anything else, which the provider would have refused."""
    return value if isinstance(value, dict) else {}


_Writer = Callable[[dict[str, Any], Any], None]


def _to(field: str, *others: str) -> _Writer:
    """Write a field of the body; `others` are its further names, which must not contradict it."""

    def write(body: dict[str, Any], value: Any) -> None:
        for name in others:
            body.pop(name, None)
        body[field] = value

    return write


def _to_inner(outer: str, field: str) -> _Writer:
    def write(body: dict[str, Any], value: Any) -> None:
        body[outer] = {**_object(body.get(outer)), field: value}

    return write


def _chat_system(body: dict[str, Any], text: str) -> None:
    """In place of the first system message, and of those that follow it at once."""
    turns = body.get("messages")
    turns = turns if isinstance(turns, list) else []
    start = 0
    while start < len(turns) and _object(turns[start]).get("role") in ("system", "developer"):
        start += 1
    body["messages"] = [{"role": "system", "content": text}, *turns[start:]]


def _chat_schema(body: dict[str, Any], schema: Mapping[str, Any]) -> None:
    described = {"name": schema_label(schema), "schema": schema}
    body["response_format"] = {"type": "json_schema", "json_schema": described}


def _responses_schema(body: dict[str, Any], schema: Mapping[str, Any]) -> None:
    form = {"type": "json_schema", "name": schema_label(schema), "schema": schema}
    _to_inner("text", "format")(body, form)


def _gemini_system(body: dict[str, Any], text: str) -> None:
    _to("systemInstruction", "system_instruction")(body, {"parts": [{"text": text}]})


def _gemini_config(*fields: str) -> _Writer:
    """Write fields of generationConfig, whatever the spelling of those that are there: the first
    gets the value, `responseMimeType` says JSON, and others go."""

    def write(body: dict[str, Any], value: Any) -> None:
        given = _object(body.pop("generation_config", None) or body.get("generationConfig"))
        kept = {name: inner for name, inner in given.items() if camel(name) not in fields}
        kept[fields[0]] = value
        if "responseMimeType" in fields:
            kept["responseMimeType"] = "application/json"
        body["generationConfig"] = kept

    return write


def _claude_schema(body: dict[str, Any], schema: Mapping[str, Any]) -> None:
    _to_inner("output_config", "format")(body, {"type": "json_schema", "schema": schema})


_WRITERS: dict[DialectName, dict[str, _Writer]] = {
    "openai": {
        "model": _to("model"),
        "system": _chat_system,
        "temperature": _to("temperature"),
        "max_output_tokens": _to("max_completion_tokens", "max_tokens"),
        "schema": _chat_schema,
    },
    "responses": {
        "model": _to("model"),
        "system": _to("instructions"),
        "temperature": _to("temperature"),
        "max_output_tokens": _to("max_output_tokens"),
        "schema": _responses_schema,
    },
    "embeddings": {"model": _to("model")},
    "gemini": {
        "system": _gemini_system,
        "temperature": _gemini_config("temperature"),
        "max_output_tokens": _gemini_config("maxOutputTokens"),
        "schema": _gemini_config("responseJsonSchema", "responseSchema", "responseMimeType"),
    },
    "anthropic": {
        "model": _to("model"),
        "system": _to("system"),
        "temperature": _to("temperature"),
        "max_output_tokens": _to("max_tokens"),
        "schema": _claude_schema,
    },
}
