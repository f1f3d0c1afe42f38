"""The SDKs' own types as strict schemas: an unknown field or a wrong value is an error."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from pydantic import ConfigDict, TypeAdapter


def strict(path: str) -> TypeAdapter[Any]:
    """A TypedDict of an SDK, by `module:Name`; what it does not name is refused, at any depth."""
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name)
    return TypeAdapter(list[found], config=ConfigDict(extra="forbid"))  # type: ignore[valid-type]


def check(adapter: TypeAdapter[Any], body: Any) -> None:
    """Validate a body; iterables are validated while they are read."""
    _read(adapter.validate_python([body]))


def _read(value: Any) -> None:
    if isinstance(value, dict):
        for inner in value.values():
            _read(inner)
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for inner in value:
            _read(inner)


CHAT = strict("openai.types.chat.completion_create_params:CompletionCreateParamsNonStreaming")
RESPONSES = strict("openai.types.responses.response_create_params:ResponseCreateParamsNonStreaming")
EMBEDDINGS = strict("openai.types.embedding_create_params:EmbeddingCreateParams")


def check_gemini(body: dict[str, Any]) -> None:
    """A body of generateContent, part by part: the SDK has no type of the whole."""
    types: Any = importlib.import_module("google.genai.types")
    for content in body["contents"]:
        types.Content.model_validate(content)
    single = {
        "systemInstruction": types.Content,
        "toolConfig": types.ToolConfig,
        "generationConfig": types.GenerationConfig,
    }
    lists = {"tools": types.Tool, "safetySettings": types.SafetySetting}
    for name, model in single.items():
        if name in body:
            model.model_validate(body[name])
    for name, model in lists.items():
        for entry in body.get(name, ()):
            model.model_validate(entry)
    known = {"contents", "cachedContent", "labels", "serviceTier", *single, *lists}
    assert body.keys() <= known
