"""From one provider's body to another's: the right form of each, or a refusal by name."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_celery.dialects import anthropic, gemini, openai, responses
from batchllm_celery.dialects.refusals import Refusals
from batchllm_celery.dialects.writing import Written
from batchllm_celery.models.request import Request
from tests.unit.dialects import native_rows as rows
from tests.unit.dialects.files import b64, data_url, pdf, png
from tests.unit.dialects.sdk_types import CHAT, RESPONSES, check, check_gemini

DIALECTS: dict[str, Any] = {
    "openai": openai,
    "responses": responses,
    "gemini": gemini,
    "anthropic": anthropic,
}
PORTABLE = {
    "openai": rows.PORTABLE_CHATS,
    "responses": rows.PORTABLE_RESPONSES,
    "gemini": rows.PORTABLE_GEMINI,
    "anthropic": rows.PORTABLE_ANTHROPIC,
}
NATIVE = {
    "openai": rows.NATIVE_CHATS,
    "responses": rows.NATIVE_RESPONSES,
    "gemini": rows.NATIVE_GEMINI,
    "anthropic": rows.NATIVE_ANTHROPIC,
}


def written(name: str, request: Request, **options: Any) -> dict[str, Any]:
    result = DIALECTS[name].write_request(request, model="m", **options)
    assert isinstance(result, Written), str(result)
    return result.body


def refused(name: str, request: Request, **options: Any) -> list[str]:
    result = DIALECTS[name].write_request(request, model="m", **options)
    assert isinstance(result, Refusals), result
    return [refusal.path for refusal in result]


def asked(**fields: Any) -> Request:
    return Request.of({"messages": [{"role": "user", "content": "hello"}], **fields})


# -- one request, three providers

CALL = {"id": "c1", "function": {"name": "get_weather", "arguments": '{"place": "Rome"}'}}
TOOLS: list[dict[str, Any]] = [
    {
        "name": "get_weather",
        "description": "The weather of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
    {"name": "now"},
]
FULL = Request.of(
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Compare."},
                    {"type": "image", "data": b64(png())},
                    {"type": "file", "data": b64(pdf()), "name": "a.pdf"},
                ],
            },
            {"role": "assistant", "content": "Where?", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "sun"},
            {"role": "user", "content": "And now?"},
        ],
        "tools": TOOLS,
        "tool_choice": "auto",
        "schema": rows.SCHEMA,
        "parameters": {"top_p": 0.9, "stop": ["END"], "max_output_tokens": 100},
    }
)
SEEDED = FULL.model_copy(update={"parameters": FULL.parameters.model_copy(update={"seed": 7})})


def test_openai_gets_its_own_form() -> None:
    body = written("openai", SEEDED)
    check(CHAT, body)
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Compare."},
                    {"type": "image_url", "image_url": {"url": data_url(png(), "image/png")}},
                    {
                        "type": "file",
                        "file": {
                            "file_data": data_url(pdf(), "application/pdf"),
                            "filename": "a.pdf",
                        },
                    },
                ],
            },
            {
                "role": "assistant",
                "content": "Where?",
                "tool_calls": [{"type": "function", **CALL}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "sun"},
            {"role": "user", "content": "And now?"},
        ],
        "tools": [{"type": "function", "function": tool} for tool in TOOLS],
        "tool_choice": "auto",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": rows.SCHEMA},
        },
        "seed": 7,
        "top_p": 0.9,
        "stop": ["END"],
        "max_completion_tokens": 100,
    }


def test_gemini_gets_its_own_form() -> None:
    body = written("gemini", SEEDED)
    check_gemini(body)
    call = {"id": "c1", "name": "get_weather"}
    assert body == {
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "contents": [
            {
                "role": "user",
                "parts": [
                    {"text": "Compare."},
                    {"inlineData": {"mimeType": "image/png", "data": b64(png())}},
                    {
                        "inlineData": {
                            "mimeType": "application/pdf",
                            "data": b64(pdf()),
                            "displayName": "a.pdf",
                        }
                    },
                ],
            },
            {
                "role": "model",
                "parts": [
                    {"text": "Where?"},
                    {"functionCall": {**call, "args": {"place": "Rome"}}},
                ],
            },
            {
                "role": "user",
                "parts": [{"functionResponse": {**call, "response": {"output": "sun"}}}],
            },
            {"role": "user", "parts": [{"text": "And now?"}]},
        ],
        "tools": [
            {
                "functionDeclarations": [
                    {
                        "name": "get_weather",
                        "description": "The weather of a place",
                        "parametersJsonSchema": TOOLS[0]["parameters"],
                    },
                    {"name": "now"},
                ]
            }
        ],
        "toolConfig": {"functionCallingConfig": {"mode": "AUTO"}},
        "generationConfig": {
            "seed": 7,
            "topP": 0.9,
            "stopSequences": ["END"],
            "maxOutputTokens": 100,
            "responseMimeType": "application/json",
            "responseJsonSchema": rows.SCHEMA,
        },
    }


def test_anthropic_gets_its_own_form() -> None:
    body = written("anthropic", FULL)
    assert body == {
        "model": "m",
        "max_tokens": 100,
        "system": "Be brief.",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Compare."},
                    {
                        "type": "image",
                        "source": {
                            "type": "base64",
                            "media_type": "image/png",
                            "data": b64(png()),
                        },
                    },
                    {
                        "type": "document",
                        "source": {
                            "type": "base64",
                            "media_type": "application/pdf",
                            "data": b64(pdf()),
                        },
                        "title": "a.pdf",
                    },
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Where?"},
                    {
                        "type": "tool_use",
                        "id": "c1",
                        "name": "get_weather",
                        "input": {"place": "Rome"},
                    },
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "sun"}],
            },
            {"role": "user", "content": "And now?"},
        ],
        "tools": [
            {
                "name": "get_weather",
                "description": "The weather of a place",
                "input_schema": TOOLS[0]["parameters"],
            },
            {"name": "now", "input_schema": {"type": "object", "properties": {}}},
        ],
        "tool_choice": {"type": "auto"},
        "output_config": {"format": {"type": "json_schema", "schema": rows.SCHEMA}},
        "stop_sequences": ["END"],
        "top_p": 0.9,
    }


def test_what_a_provider_has_no_word_for_is_refused_or_dropped_by_permission() -> None:
    """Dropping is reported, and never more than was allowed."""
    assert refused("anthropic", SEEDED) == ["parameters.seed"]
    result = anthropic.write_request(SEEDED, model="m", allow_dropping={"seed", "top_k"})
    assert isinstance(result, Written)
    assert result.dropped == ("seed",)
    assert "seed" not in json.dumps(result.body)
    assert result.body == written("anthropic", FULL)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("openai", {"top_k": 1, "thinking_budget": 5}),
        (
            "responses",
            {
                "top_k": 1,
                "seed": 1,
                "stop": ["x"],
                "presence_penalty": 1,
                "frequency_penalty": 1,
                "thinking_budget": 1,
                "n": 2,
            },
        ),
        ("gemini", {"reasoning_effort": "max"}),
        (
            "anthropic",
            {
                "seed": 1,
                "presence_penalty": 1,
                "frequency_penalty": 1,
                "logprobs": 0,
                "n": 2,
                "service_tier": "flex",
                "json_output": True,
                "reasoning_effort": "minimal",
            },
        ),
    ],
)
def test_every_parameter_without_a_word_is_named(name: str, parameters: dict[str, Any]) -> None:
    request = asked(parameters=parameters)
    assert sorted(refused(name, request)) == sorted(f"parameters.{p}" for p in parameters)
    result = DIALECTS[name].write_request(request, model="m", allow_dropping=parameters)
    assert sorted(result.dropped) == sorted(parameters)
    plain = DIALECTS[name].write_request(asked(), model="m")
    assert result.body == plain.body


def test_each_provider_takes_reasoning_in_its_own_words() -> None:
    low = asked(parameters={"reasoning_effort": "low"})
    assert written("openai", low)["reasoning_effort"] == "low"
    assert written("responses", low)["reasoning"] == {"effort": "low"}
    assert written("gemini", low)["generationConfig"]["thinkingConfig"] == {"thinkingLevel": "low"}
    assert written("anthropic", low)["output_config"] == {"effort": "low"}
    budget = asked(parameters={"thinking_budget": 1024})
    thinking = written("gemini", budget)["generationConfig"]["thinkingConfig"]
    assert thinking == {"thinkingBudget": 1024}
    body = written("anthropic", budget)
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 1024}
    assert body["max_tokens"] == anthropic.DEFAULT_MAX_TOKENS + 1024
    tight = asked(parameters={"thinking_budget": 1024, "max_output_tokens": 1024})
    assert refused("anthropic", tight) == ["parameters.thinking_budget"]


def test_other_servers_take_max_tokens() -> None:
    request = asked(parameters={"max_output_tokens": 9})
    assert written("openai", request)["max_completion_tokens"] == 9
    body = written("openai", request, limit_field="max_tokens")
    assert body["max_tokens"] == 9
    assert "max_completion_tokens" not in body


def test_the_shared_prefix_is_marked_for_anthropics_cache() -> None:
    mark = {"type": "ephemeral"}
    body = written("anthropic", FULL, cache=True)
    assert body["system"] == [{"type": "text", "text": "Be brief.", "cache_control": mark}]
    assert "cache_control" not in json.dumps(body["tools"])
    tools = written("anthropic", asked(tools=TOOLS), cache=True)["tools"]
    assert "cache_control" not in tools[0]
    assert tools[-1]["cache_control"] == mark
    assert written("anthropic", asked(), cache=True) == written("anthropic", asked())


# -- extra


@pytest.mark.parametrize("name", DIALECTS)
def test_extra_is_merged_last_and_replaces_nothing(name: str) -> None:
    turns = {"responses": "input", "gemini": "contents"}.get(name, "messages")
    assert written(name, asked(extra={"user": "u"}))["user"] == "u"
    assert refused(name, asked(extra={turns: []})) == [f"extra.{turns}"]
    temperature = asked(parameters={"temperature": 1}, extra={"temperature": 0})
    if name != "gemini":
        assert refused(name, temperature) == ["extra.temperature"]


def test_extra_reaches_into_what_was_written() -> None:
    """A nested object may get further fields, in either spelling, but no other value."""
    extra = {"generation_config": {"media_resolution": "LOW"}}
    body = written("gemini", asked(parameters={"seed": 1}, extra=extra))
    assert body["generationConfig"] == {"seed": 1, "mediaResolution": "LOW"}
    clash = asked(parameters={"top_p": 1}, extra={"generation_config": {"top_p": 0}})
    assert refused("gemini", clash) == ["extra.generation_config.top_p"]
    effort = asked(parameters={"reasoning_effort": "low"}, extra={"reasoning": {"summary": "auto"}})
    assert written("responses", effort)["reasoning"] == {"effort": "low", "summary": "auto"}
    limit = asked(extra={"max_tokens": 1})
    assert refused("anthropic", limit) == ["extra.max_tokens"]


def test_extra_does_not_change_the_request() -> None:
    request = asked(extra={"text": {"verbosity": "low"}}, schema=rows.SCHEMA)
    before = request.to_json()
    written("responses", request)
    assert request.to_json() == before


# -- parts


def test_what_a_part_really_is_decides() -> None:
    """A media type that the content contradicts is refused; a missing one is found."""

    def part(kind: str, data: bytes, media_type: str | None = None) -> Request:
        given = {"type": kind, "data": b64(data)}
        if media_type is not None:
            given["media_type"] = media_type
        return Request.of({"messages": [{"role": "user", "content": [given]}]})

    wrong = part("image", png(), "image/jpeg")
    for name in DIALECTS:
        assert "messages[0].content[0].media_type" in refused(name, wrong)
    assert refused("gemini", part("file", b"\x00\x01")) == ["messages[0].content[0].media_type"]
    assert refused("gemini", part("image", b"<svg/>", "image/png")) == [
        "messages[0].content[0].media_type"
    ]
    csv = written("gemini", part("file", b"a,b\n1,2\n", "text/csv"))
    assert csv["contents"][0]["parts"][0]["inlineData"]["mimeType"] == "text/csv"
    text = written("anthropic", part("file", "Grüße".encode()))
    assert text["messages"][0]["content"][0]["source"]["data"] == "Grüße"
    assert refused("anthropic", part("file", b"\x00", "audio/wav")) == ["messages[0].content[0]"]


def test_urls_go_to_those_who_fetch_them() -> None:
    def link(kind: str, url: str, **fields: Any) -> Request:
        part = {"type": kind, "url": url, **fields}
        return Request.of({"messages": [{"role": "user", "content": [part]}]})

    image = link("image", "https://example.com/a.png")
    for name in ("openai", "responses", "anthropic"):
        assert "https://example.com/a.png" in json.dumps(written(name, image))
    assert "messages[0].content[0].url" in refused("gemini", image)
    own = link("file", "gs://bucket/a.pdf", media_type="application/pdf")
    assert "gs://bucket/a.pdf" in json.dumps(written("gemini", own))
    assert refused("openai", link("file", "https://example.com/a.pdf"))[0].endswith(".url")
    unread = Request.of(
        {"messages": [{"role": "user", "content": [{"type": "file", "path": "a.pdf"}]}]}
    )
    for name in DIALECTS:
        assert "messages[0].content[0].path" in refused(name, unread)


def test_a_system_message_between_turns_is_refused_where_it_has_no_place() -> None:
    request = Request.of(
        {
            "messages": [
                {"role": "system", "content": "a"},
                {"role": "system", "content": "b"},
                {"role": "user", "content": "x"},
                {"role": "system", "content": "c"},
            ]
        }
    )
    assert refused("gemini", request) == ["messages[3]"]
    assert refused("anthropic", request) == ["messages[3]"]
    assert [m["role"] for m in written("openai", request)["messages"]].count("system") == 3


def test_results_of_one_turn_go_together() -> None:
    """Gemini and Anthropic refuse calls whose results come in several turns."""
    calls = [{**CALL, "id": name} for name in ("a", "b")]
    request = Request.of(
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": calls},
                {"role": "tool", "tool_call_id": "b", "content": "2"},
                {"role": "tool", "tool_call_id": "a", "content": "1"},
            ]
        }
    )
    assert len(written("gemini", request)["contents"][-1]["parts"]) == 2
    assert len(written("anthropic", request)["messages"][-1]["content"]) == 2


def test_calls_that_can_not_be_written_are_refused() -> None:
    broken = {"id": "a", "function": {"name": "f", "arguments": "{"}}
    request = Request.of(
        {
            "messages": [
                {"role": "assistant", "tool_calls": [broken]},
                {"role": "tool", "tool_call_id": "zz", "content": "1"},
            ]
        }
    )
    assert refused("anthropic", request) == ["messages[0].tool_calls[0].function.arguments"]
    assert refused("gemini", request) == [
        "messages[0].tool_calls[0].function.arguments",
        "messages[1].tool_call_id",
    ]
    assert (
        written("openai", request)["messages"][0]["tool_calls"][0]["function"]
        == (broken["function"])
    )


# -- bodies of other providers


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, bodies in PORTABLE.items() for i in range(len(bodies))]
)
def test_a_body_survives_its_own_translation(name: str, index: int) -> None:
    """Read, written and read again it asks the same."""
    dialect = DIALECTS[name]
    request = dialect.read_request(PORTABLE[name][index])
    assert isinstance(request, Request), str(request)
    assert dialect.read_request(written(name, request)) == request
    assert Request.of(json.loads(json.dumps(request.to_json()))) == request


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, bodies in NATIVE.items() for i in range(len(bodies))]
)
def test_what_can_not_be_carried_is_refused_by_its_path(name: str, index: int) -> None:
    body, path = NATIVE[name][index]
    result = DIALECTS[name].read_request(body)
    assert isinstance(result, Refusals)
    assert path in [refusal.path for refusal in result]


def _places(value: Any, path: str) -> Any:
    """Each object inside a body with its path."""
    if isinstance(value, dict):
        yield path, value
        for name, inner in value.items():
            yield from _places(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _places(inner, f"{path}[{i}]")


#: Objects that are carried as they are: JSON Schemas and arguments.
OPAQUE = ("parameters", "schema", "Schema", "_schema", ".args", "].input", ".response")


@pytest.mark.parametrize("name", DIALECTS)
def test_an_unknown_field_at_any_depth_is_refused(name: str) -> None:
    tried = 0
    for body in PORTABLE[name]:
        for path, _ in _places(body, "body"):
            if any(word + end in path + "." for word in OPAQUE for end in (".", "[")):
                continue
            changed = json.loads(json.dumps(body))
            place = next(value for where, value in _places(changed, "body") if where == path)
            place["surprise"] = 1
            result = DIALECTS[name].read_request(changed)
            assert isinstance(result, Refusals), path
            assert any(r.path.endswith("surprise") for r in result), (path, str(result))
            tried += 1
    assert tried > 10


WRONG: tuple[Any, ...] = (3.5, True, "x", [3], {"a": 1}, [[]], [None])


@pytest.mark.parametrize("name", DIALECTS)
def test_a_value_of_a_wrong_type_is_refused_and_nothing_raises(name: str) -> None:
    for body in PORTABLE[name]:
        for path, value in _places(body, "body"):
            if any(word + "." in path + "." for word in OPAQUE):
                continue
            for field in value:
                for wrong in WRONG:
                    changed = json.loads(json.dumps(body))
                    place = next(v for where, v in _places(changed, "body") if where == path)
                    place[field] = wrong
                    assert isinstance(DIALECTS[name].read_request(changed), Request | Refusals)


@pytest.mark.parametrize("body", [None, [], "x", 3, {}])
@pytest.mark.parametrize("name", DIALECTS)
def test_what_is_no_body_is_refused(name: str, body: Any) -> None:
    assert isinstance(DIALECTS[name].read_request(body), Refusals)


@pytest.mark.parametrize("depth", [150, 480, 900])
def test_schemas_and_arguments_that_are_nested_too_deep_are_refused(depth: int) -> None:
    deep: dict[str, Any] = {}
    for _ in range(depth):
        deep = {"items": deep}
    bodies: list[tuple[Any, dict[str, Any]]] = [
        (
            openai,
            rows.chat(tools=[{"type": "function", "function": {"name": "f", "parameters": deep}}]),
        ),
        (gemini, rows.generate(generationConfig={"responseSchema": deep})),
        (
            gemini,
            rows.generate(
                {"role": "model", "parts": [{"functionCall": {"name": "f", "args": deep}}]}
            ),
        ),
        (
            anthropic,
            rows.message(output_config={"format": {"type": "json_schema", "schema": deep}}),
        ),
        (anthropic, rows.message(metadata=deep)),
    ]
    for dialect, body in bodies:
        assert isinstance(dialect.read_request(body), Refusals)
    text = '{"a": ' * depth + "1" + "}" * depth
    call = {"id": "a", "function": {"name": "f", "arguments": text}}
    request = Request.of({"messages": [{"role": "assistant", "tool_calls": [call]}]})
    for name in ("gemini", "anthropic"):
        assert refused(name, request) == ["messages[0].tool_calls[0].function.arguments"]


def test_a_chat_goes_to_every_provider() -> None:
    request = openai.read_request(
        rows.chat(
            {"role": "developer", "content": "Be brief."},
            rows.USER,
            {"role": "assistant", "content": None, "tool_calls": [rows.CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "no"},
            tools=[{"type": "function", "function": rows.FUNCTION}],
            tool_choice="required",
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "v", "schema": rows.SCHEMA},
            },
        )
    )
    assert isinstance(request, Request)
    check(RESPONSES, written("responses", request))
    check_gemini(written("gemini", request))
    assert written("anthropic", request)["tool_choice"] == {"type": "any"}
    for name, dialect in DIALECTS.items():
        back = dialect.read_request(written(name, request))
        assert isinstance(back, Request)
        assert back.messages == request.messages
        assert back.tools == request.tools


# -- any request

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
NAMES = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
MEDIA = st.one_of(
    st.builds(
        lambda seed: {"type": "image", "data": b64(png(3, 3, seed)), "media_type": "image/png"},
        st.integers(0, 9),
    ),
    st.builds(
        lambda pages: {"type": "file", "data": b64(pdf(pages)), "media_type": "application/pdf"},
        st.integers(1, 3),
    ),
)
PARTS = st.lists(
    st.one_of(st.builds(lambda text: {"type": "text", "text": text}, TEXT), MEDIA),
    min_size=1,
    max_size=3,
)


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A chat as all providers can hold it: users and assistants in turn, calls answered at once."""
    found: list[dict[str, Any]] = []
    if draw(st.booleans()):
        found.append({"role": "system", "content": draw(TEXT)})
    for i in range(draw(st.integers(1, 3))):
        found.append({"role": "user", "content": draw(st.one_of(TEXT, PARTS))})
        calls = [
            {
                "id": f"call_{i}_{j}",
                "function": {"name": draw(NAMES), "arguments": json.dumps({draw(NAMES): j})},
            }
            for j in range(draw(st.integers(0, 2)))
        ]
        content = draw(st.one_of(TEXT, st.just("") if calls else TEXT))
        found.append({"role": "assistant", "content": content, "tool_calls": calls})
        found += [
            {"role": "tool", "tool_call_id": call["id"], "content": draw(TEXT)} for call in calls
        ]
    return found


TOOL = st.builds(
    lambda name, described, schema: {"name": name, "description": described, "parameters": schema},
    NAMES,
    st.one_of(st.none(), TEXT),
    st.one_of(st.none(), st.just(rows.SCHEMA)),
)
NUMBER = st.one_of(st.none(), st.floats(0, 1))
COUNT = st.one_of(st.none(), st.integers(1, 1000))
#: Parameters that a dialect has words for.
WORDS = {
    "openai": {
        "temperature": NUMBER,
        "top_p": NUMBER,
        "seed": COUNT,
        "presence_penalty": NUMBER,
        "frequency_penalty": NUMBER,
        "logprobs": st.one_of(st.none(), st.integers(0, 5)),
        "n": st.integers(1, 3),
        "max_output_tokens": COUNT,
    },
    "responses": {"temperature": NUMBER, "top_p": NUMBER, "max_output_tokens": COUNT},
    "gemini": {
        "temperature": NUMBER,
        "top_k": COUNT,
        "seed": COUNT,
        "logprobs": st.one_of(st.none(), st.integers(0, 5)),
        "max_output_tokens": COUNT,
        "thinking_budget": COUNT,
        "n": st.integers(1, 3),
    },
    "anthropic": {
        "temperature": NUMBER,
        "top_p": NUMBER,
        "top_k": COUNT,
        "max_output_tokens": st.integers(1, 1000),
    },
}


@st.composite
def requests_for(draw: st.DrawFn, name: str) -> Request:
    parameters = {p: draw(values) for p, values in WORDS[name].items()}
    tools = draw(st.lists(TOOL, max_size=2, unique_by=lambda tool: str(tool["name"])))
    choices: list[Any] = [None]
    if tools:
        choices += ["auto", "none", "required", {"name": tools[0]["name"]}]
    return Request.of(
        {
            "messages": draw(turns()),
            "parameters": {p: value for p, value in parameters.items() if value is not None},
            "tools": tools,
            "tool_choice": draw(st.sampled_from(choices)),
            "schema": draw(st.sampled_from([None, rows.SCHEMA])),
        }
    )


@pytest.mark.parametrize("name", DIALECTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_written_is_read_back_equal(name: str, data: st.DataObject) -> None:
    request = data.draw(requests_for(name))
    body = json.loads(json.dumps(written(name, request)))
    assert DIALECTS[name].read_request(body) == request


@settings(max_examples=40, deadline=None)
@given(request=requests_for("openai"))
def test_bodies_are_what_the_sdk_would_send(request: Request) -> None:
    check(CHAT, written("openai", request))


@settings(max_examples=40, deadline=None)
@given(request=requests_for("gemini"))
def test_gemini_bodies_fit_the_sdks_types(request: Request) -> None:
    check_gemini(written("gemini", request))


@settings(max_examples=40, deadline=None)
@given(request=requests_for("responses"))
def test_responses_bodies_fit_the_sdks_types(request: Request) -> None:
    check(RESPONSES, written("responses", request))


def test_images_arrive_as_the_bytes_that_were_given() -> None:
    url = written("openai", FULL)["messages"][1]["content"][1]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == png()
