"""Batch files as people have them: every documented field of each format in some row."""

from __future__ import annotations

import struct
from typing import Any

from tests.unit.dialects.files import b64, data_url, mp3, pdf, png, wav

IMAGE, PDF, AUDIO = png(), pdf(2), wav(0.05)
SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["label"],
    "additionalProperties": False,
}
FUNCTION = {
    "name": "get_weather",
    "description": "The weather of a place",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string"}},
        "required": ["place"],
    },
}
STRICT = {"name": "book", "parameters": SCHEMA, "strict": True}
USER = {"role": "user", "content": "Is it raining?"}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"place": "Rome"}'},
}


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4.1-mini", "messages": list(messages or (USER,)), **fields}


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}


#: Bodies of chat/completions that can be carried to another provider.
PORTABLE_CHATS: list[dict[str, Any]] = [
    chat(),
    chat({"role": "system", "content": "Be brief."}, USER, temperature=0.5, top_p=1, seed=7),
    chat(
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        stop=["\n", "END"],
        max_completion_tokens=50,
    ),
    chat(USER, {"role": "assistant", "content": "Where?"}, USER, stop="END", max_tokens=9),
    chat(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "no"},
        USER,
        tools=[_tool(FUNCTION), _tool(STRICT)],
        tool_choice="auto",
    ),
    chat(tools=[_tool(FUNCTION)], tool_choice=_tool({"name": "get_weather"})),
    chat(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": data_url(IMAGE, "image/png")}},
                {
                    "type": "image_url",
                    "image_url": {"url": "https://example.com/a.png", "detail": "low"},
                },
            ],
        }
    ),
    chat(
        {
            "role": "user",
            "content": [
                {
                    "type": "file",
                    "file": {"filename": "a.pdf", "file_data": data_url(PDF, "application/pdf")},
                },
                {"type": "input_audio", "input_audio": {"data": b64(AUDIO), "format": "wav"}},
                {"type": "input_audio", "input_audio": {"data": b64(mp3(0.1)), "format": "mp3"}},
            ],
        }
    ),
    chat(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True},
        },
        reasoning_effort="low",
    ),
    chat(response_format={"type": "json_object"}, presence_penalty=0.5, frequency_penalty=-0.5),
    chat(n=3, logprobs=True, top_logprobs=2, service_tier="flex", stream=False),
    chat(response_format={"type": "text"}, logprobs=True, stop=None),
]

#: Bodies with fields that no other provider has, and the path of each.
NATIVE_CHATS: list[tuple[dict[str, Any], str]] = [
    (chat(logit_bias={"50256": -100}), "body.logit_bias"),
    (chat(user="u-1"), "body.user"),
    (chat(metadata={"job": "7"}), "body.metadata"),
    (chat(store=True), "body.store"),
    (chat(parallel_tool_calls=False), "body.parallel_tool_calls"),
    (chat(prediction={"type": "content", "content": "x = 1"}), "body.prediction"),
    (
        chat(
            modalities=["text", "audio"],
            audio={"voice": "alloy", "format": "wav"},
        ),
        "body.audio",
    ),
    (chat(prompt_cache_key="k", prompt_cache_retention="24h"), "body.prompt_cache_key"),
    (chat(prompt_cache_options={"mode": "implicit"}), "body.prompt_cache_options"),
    (chat(safety_identifier="s", verbosity="low"), "body.verbosity"),
    (chat(web_search_options={"search_context_size": "low"}), "body.web_search_options"),
    (chat(moderation={"model": "omni-moderation-latest"}), "body.moderation"),
    (chat(functions=[FUNCTION], function_call="auto"), "body.functions"),
    (
        chat(
            tools=[{"type": "custom", "custom": {"name": "sql", "format": {"type": "text"}}}],
            tool_choice={"type": "custom", "custom": {"name": "sql"}},
        ),
        "body.tools[0].custom",
    ),
    (chat({"role": "user", "content": "x", "name": "Ann"}), "body.messages[0].name"),
    (
        chat(USER, {"role": "assistant", "content": "x", "audio": {"id": "a"}}, USER),
        "body.messages[1].audio",
    ),
    (chat(USER, {"role": "assistant", "refusal": "no"}, USER), "body.messages[1].refusal"),
    (
        chat({"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}),
        "body.messages[0].content[0].file.file_id",
    ),
]


def respond(asked: Any = "Is it raining?", **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4.1-mini", "input": asked, **fields}


PORTABLE_RESPONSES: list[dict[str, Any]] = [
    respond(instructions="Be brief.", temperature=0.5, top_p=1, max_output_tokens=50),
    respond(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "What is it?"},
                    {
                        "type": "input_image",
                        "image_url": data_url(IMAGE, "image/png"),
                        "detail": "auto",
                    },
                    {
                        "type": "input_file",
                        "filename": "a.pdf",
                        "file_data": data_url(PDF, "application/pdf"),
                    },
                    {"type": "input_file", "file_url": "https://example.com/a.pdf"},
                ],
            },
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Rain.", "annotations": []}],
            },
            {
                "type": "function_call",
                "call_id": "call_1",
                "name": "get_weather",
                "arguments": "{}",
            },
            {"type": "function_call_output", "call_id": "call_1", "output": "no"},
        ],
        tools=[{"type": "function", "strict": True, **FUNCTION}],
        tool_choice={"type": "function", "name": "get_weather"},
    ),
    respond(
        text={"format": {"type": "json_schema", "name": "verdict", "schema": SCHEMA}},
        reasoning={"effort": "low"},
        service_tier="flex",
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        stream=False,
        background=False,
    ),
]

NATIVE_RESPONSES: list[tuple[dict[str, Any], str]] = [
    (respond(text={"format": {"type": "text"}, "verbosity": "low"}), "body.text.verbosity"),
    (respond(reasoning={"effort": "low", "summary": "auto"}), "body.reasoning.summary"),
    (
        respond(store=False, user="u", metadata={"a": "b"}, truncation="auto", max_tool_calls=3),
        "body.truncation",
    ),
    (respond(conversation={"id": "conv_1"}, parallel_tool_calls=True), "body.conversation"),
    (respond(prompt={"id": "pmpt_1", "variables": {"a": "b"}}), "body.prompt"),
    (
        respond(safety_identifier="s", prompt_cache_key="k", prompt_cache_retention="24h"),
        "body.safety_identifier",
    ),
    (
        respond(
            [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}],
            include=["reasoning.encrypted_content"],
        ),
        "body.input[0].type",
    ),
    (respond(tools=[{"type": "web_search"}]), "body.tools[0].type"),
    (
        respond(context_management=[{"type": "compaction"}], access_programs={"cyber": "standard"}),
        "body.context_management",
    ),
    (respond(image={"context_compression": "auto"}), "body.image"),
    (
        respond(
            moderation={"model": "omni-moderation-latest"},
            prompt_cache_options={"mode": "explicit"},
        ),
        "body.moderation",
    ),
]

EMBEDDINGS: list[dict[str, Any]] = [
    {"model": "text-embedding-3-small", "input": "hello"},
    {
        "model": "text-embedding-3-small",
        "input": ["a", "b"],
        "dimensions": 3,
        "encoding_format": "base64",
        "user": "u-1",
    },
    {"model": "text-embedding-3-small", "input": [1, 2, 3], "encoding_format": "float"},
]


def openai_rows() -> list[dict[str, Any]]:
    bodies = [
        *(("/v1/chat/completions", body) for body in PORTABLE_CHATS),
        *(("/v1/chat/completions", body) for body, _ in NATIVE_CHATS),
        *(("/v1/responses", body) for body in PORTABLE_RESPONSES),
        *(("/v1/responses", body) for body, _ in NATIVE_RESPONSES),
        *(("/v1/embeddings", body) for body in EMBEDDINGS),
    ]
    return [
        {"custom_id": f"row-{i}", "method": "POST", "url": url, "body": body}
        for i, (url, body) in enumerate(bodies)
    ]


# -- Gemini


def generate(*contents: Any, **fields: Any) -> dict[str, Any]:
    turn = {"role": "user", "parts": [{"text": "Is it raining?"}]}
    return {"contents": list(contents or (turn,)), **fields}


def _user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "parts": list(parts)}


PORTABLE_GEMINI: list[dict[str, Any]] = [
    generate(),
    generate({"parts": [{"text": "no role"}]}),
    generate(
        _user({"text": "a"}),
        {"role": "model", "parts": [{"text": "b"}]},
        _user({"text": "c"}, {"text": "d"}),
        systemInstruction={"parts": [{"text": "Be brief."}]},
    ),
    generate(system_instruction={"role": "system", "parts": [{"text": "a"}, {"text": "b"}]}),
    generate(
        generationConfig={
            "temperature": 0.5,
            "topP": 0.9,
            "topK": 40,
            "seed": 7,
            "stopSequences": ["END"],
            "maxOutputTokens": 50,
            "presencePenalty": 0.1,
            "frequencyPenalty": 0.2,
            "candidateCount": 2,
            "responseLogprobs": True,
            "logprobs": 3,
        }
    ),
    generate(
        generation_config={
            "top_p": 0.9,
            "maxOutputTokens": 50,
            "stop_sequences": ["END"],
            "thinking_config": {"thinking_budget": 0, "includeThoughts": False},
        }
    ),
    generate(
        generationConfig={
            "responseMimeType": "application/json",
            "responseJsonSchema": SCHEMA,
            "thinkingConfig": {"thinkingLevel": "LOW"},
        }
    ),
    generate(
        generationConfig={
            "response_mime_type": "application/json",
            "response_schema": {
                "type": "OBJECT",
                "properties": {"type": {"type": "STRING", "nullable": True}},
            },
        }
    ),
    generate(generationConfig={"responseMimeType": "application/json"}, serviceTier="flex"),
    generate(
        _user(
            {"text": "What is it?"},
            {"inlineData": {"mimeType": "image/png", "data": b64(IMAGE)}},
            {"inline_data": {"mime_type": "application/pdf", "data": b64(PDF)}},
            {"fileData": {"mimeType": "video/mp4", "fileUri": "gs://bucket/a.mp4"}},
        )
    ),
    generate(
        _user({"text": "Rome and Oslo?"}),
        {
            "role": "model",
            "parts": [
                {"text": "Let me see."},
                {"functionCall": {"name": "get_weather", "args": {"place": "Rome"}}},
                {"functionCall": {"name": "get_weather", "args": {"place": "Oslo"}}},
            ],
        },
        _user(
            {"functionResponse": {"name": "get_weather", "response": {"output": "sun"}}},
            {"functionResponse": {"name": "get_weather", "response": {"rain": True}}},
        ),
        tools=[{"functionDeclarations": [FUNCTION]}],
        toolConfig={
            "functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["get_weather"]}
        },
    ),
    generate(
        tools=[
            {"function_declarations": [{"name": "now"}]},
            {"functionDeclarations": [{"name": "f", "parametersJsonSchema": SCHEMA}]},
        ],
        tool_config={"function_calling_config": {"mode": "NONE"}},
    ),
]

NATIVE_GEMINI: list[tuple[dict[str, Any], str]] = [
    (
        generate(
            safetySettings=[
                {"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_ONLY_HIGH"}
            ]
        ),
        "body.safetySettings",
    ),
    (generate(cachedContent="cachedContents/abc"), "body.cachedContent"),
    (generate(tools=[{"googleSearch": {}}]), "body.tools[0].googleSearch"),
    (generate(tools=[{"url_context": {}}, {"codeExecution": {}}]), "body.tools[1].codeExecution"),
    (generate(labels={"team": "a"}), "body.labels"),
    (
        generate(
            generationConfig={
                "mediaResolution": "MEDIA_RESOLUTION_LOW",
                "responseModalities": ["TEXT"],
            }
        ),
        "body.generationConfig.mediaResolution",
    ),
    (
        generate(generationConfig={"thinkingConfig": {"includeThoughts": True}}),
        "body.generationConfig.thinkingConfig.includeThoughts",
    ),
    (
        generate(_user({"text": "x", "thoughtSignature": "c2ln"})),
        "body.contents[0].parts[0].thoughtSignature",
    ),
    (
        generate(generationConfig={"speechConfig": {"languageCode": "en-US"}}),
        "body.generationConfig.speechConfig",
    ),
]


def gemini_rows() -> list[dict[str, Any]]:
    bodies = [*PORTABLE_GEMINI, *(body for body, _ in NATIVE_GEMINI)]
    return [{"key": f"row-{i}", "request": body} for i, body in enumerate(bodies)]


# -- Anthropic


def message(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "model": "claude-sonnet-4-5",
        "max_tokens": 100,
        "messages": list(messages or (USER,)),
        **fields,
    }


_USE = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"place": "Rome"}}
_CLAUDE_TOOL = {
    "name": "get_weather",
    "description": "The weather of a place",
    "input_schema": FUNCTION["parameters"],
}


def _source(data: bytes, media_type: str) -> dict[str, Any]:
    return {"type": "base64", "media_type": media_type, "data": b64(data)}


#: Fields that the SDK of today leaves out, and the API takes for most of its models.
CLAUDE_SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 40}

PORTABLE_ANTHROPIC: list[dict[str, Any]] = [
    message(),
    message(system="Be brief.", **CLAUDE_SAMPLING, stop_sequences=["END"]),
    message(
        system=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        service_tier="standard_only",
        stream=False,
    ),
    message(
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "Where?"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ),
    message(
        {
            "role": "user",
            "content": [
                {"type": "image", "source": _source(IMAGE, "image/png")},
                {
                    "type": "image",
                    "source": {"type": "url", "url": "https://example.com/a.png"},
                },
                {
                    "type": "document",
                    "source": _source(PDF, "application/pdf"),
                    "title": "a.pdf",
                },
                {
                    "type": "document",
                    "source": {"type": "text", "media_type": "text/plain", "data": "hello"},
                },
                {
                    "type": "document",
                    "source": {"type": "url", "url": "https://example.com/a.pdf"},
                },
            ],
        }
    ),
    message(
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "I'll look."}, _USE]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no"},
                {"type": "text", "text": "And now?"},
            ],
        },
        tools=[_CLAUDE_TOOL, {"name": "now", "input_schema": {"type": "object", "properties": {}}}],
        tool_choice={"type": "any"},
    ),
    message(tools=[_CLAUDE_TOOL], tool_choice={"type": "tool", "name": "get_weather"}),
    message(
        USER,
        {"role": "assistant", "content": [_USE]},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "is_error": False,
                    "content": [
                        {"type": "text", "text": "see"},
                        {"type": "image", "source": _source(IMAGE, "image/png")},
                    ],
                }
            ],
        },
        tools=[{**_CLAUDE_TOOL, "type": "custom", "strict": True}],
        tool_choice={"type": "none"},
    ),
    message(thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048),
    message(thinking={"type": "disabled"}, output_config={"effort": "low"}),
    message(output_config={"format": {"type": "json_schema", "schema": SCHEMA}}),
]

_EPHEMERAL = {"type": "ephemeral", "ttl": "5m"}

NATIVE_ANTHROPIC: list[tuple[dict[str, Any], str]] = [
    (message(metadata={"user_id": "u"}), "body.metadata"),
    (message(cache_control=_EPHEMERAL), "body.cache_control"),
    (
        message(system=[{"type": "text", "text": "a", "cache_control": _EPHEMERAL}]),
        "body.system[0].cache_control",
    ),
    (message(container="c", inference_geo="eu"), "body.inference_geo"),
    (message(thinking={"type": "adaptive"}), "body.thinking.type"),
    (message(speed="fast"), "body.speed"),
    (
        message(tools=[{"type": "web_search_20250305", "name": "web_search"}]),
        "body.tools[0].type",
    ),
    (
        message(
            USER,
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "hm", "signature": "x"}],
            },
            USER,
        ),
        "body.messages[1].content[0].type",
    ),
    (
        message(
            {
                "role": "user",
                "content": [
                    {
                        "type": "document",
                        "source": _source(PDF, "application/pdf"),
                        "citations": {"enabled": True},
                        "context": "a scan",
                    }
                ],
            }
        ),
        "body.messages[0].content[0].citations",
    ),
    (
        message(tool_choice={"type": "auto", "disable_parallel_tool_use": True}),
        "body.tool_choice.disable_parallel_tool_use",
    ),
]


def anthropic_rows() -> list[dict[str, Any]]:
    bodies = [*PORTABLE_ANTHROPIC, *(body for body, _ in NATIVE_ANTHROPIC)]
    return [{"custom_id": f"row-{i}", "params": body} for i, body in enumerate(bodies)]


def float_base64(*numbers: float) -> str:
    return b64(struct.pack(f"<{len(numbers)}f", *numbers))
