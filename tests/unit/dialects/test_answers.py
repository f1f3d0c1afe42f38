"""What providers answer, good or bad, as completions and failures."""

from __future__ import annotations

import importlib
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_celery.dialects import anthropic, gemini, openai, responses
from batchllm_celery.dialects.answers import Answer, FailedAnswer, condense
from batchllm_celery.dialects.headers import seconds_of
from batchllm_celery.errors import FailureKind
from batchllm_celery.models import Completion, TokenUsage
from tests.unit.dialects.native_rows import float_base64

K = FailureKind


def chat(content: Any = "hello", finish: Any = "stop", **fields: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **fields.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4.1-mini-2025",
        "choices": [{**choice, **fields.pop("choice", {})}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14},
        **fields,
    }


def generated(text: Any = "hello", finish: Any = "STOP", **fields: Any) -> dict[str, Any]:
    parts = fields.pop("parts", [{"text": text}])
    candidate = {"content": {"role": "model", "parts": parts}, "finishReason": finish}
    return {
        "candidates": [{**candidate, **fields.pop("candidate", {})}],
        "usageMetadata": {
            "promptTokenCount": 10,
            "candidatesTokenCount": 4,
            "thoughtsTokenCount": 6,
            "cachedContentTokenCount": 3,
            "totalTokenCount": 20,
        },
        "modelVersion": "gemini-2.5-flash",
        "responseId": "r1",
        **fields,
    }


def claude(text: Any = "hello", finish: Any = "end_turn", **fields: Any) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5",
        "content": [{"type": "text", "text": text}],
        "stop_reason": finish,
        "stop_sequence": None,
        "usage": {"input_tokens": 10, "output_tokens": 4},
        **fields,
    }


def responded(text: Any = "hello", status: str = "completed", **fields: Any) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"type": "message", "id": "m", "role": "assistant", "status": status, "content": [part]}
    return {
        "id": "resp_1",
        "object": "response",
        "status": status,
        "error": None,
        "incomplete_details": None,
        "model": "gpt-5",
        "output": [{"type": "reasoning", "id": "r", "summary": []}, item],
        "usage": {
            "input_tokens": 10,
            "input_tokens_details": {"cached_tokens": 3},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 2},
            "total_tokens": 14,
        },
        **fields,
    }


MODULES: dict[str, Any] = {
    "openai": openai,
    "responses": responses,
    "gemini": gemini,
    "anthropic": anthropic,
}
GOOD = {"openai": chat, "responses": responded, "gemini": generated, "anthropic": claude}


def read(name: str, body: Any, status: int = 200, headers: Any = None) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return MODULES[name].read_answer(status, headers or {}, raw)


def good(name: str, body: Any, headers: Any = None) -> Answer:
    answer = read(name, body, headers=headers)
    assert isinstance(answer, Answer), answer
    return answer


def bad(name: str, body: Any, status: int = 200, headers: Any = None) -> FailedAnswer:
    answer = read(name, body, status, headers)
    assert isinstance(answer, FailedAnswer), answer
    return answer


# -- good answers


@pytest.mark.parametrize("name", MODULES)
def test_a_plain_answer(name: str) -> None:
    answer = good(name, GOOD[name](), {"X-Request-Id": "req_1", "request-id": "req_1"})
    assert answer.output == "hello"
    assert answer.request_id == "req_1"
    assert answer.usage.input_tokens == 10
    assert set(answer.metadata) >= {"finish_reason", "model", "response_id"}


def test_each_provider_counts_in_its_own_way() -> None:
    """Thoughts are output; cached input is part of the input, also where it is counted apart."""
    assert good("gemini", generated()).usage == TokenUsage(
        input_tokens=10, output_tokens=10, total_tokens=20, cached_input_tokens=3
    )
    assert good("responses", responded()).usage == TokenUsage(
        input_tokens=10, output_tokens=4, total_tokens=14, cached_input_tokens=3
    )
    usage = {
        "input_tokens": 10,
        "cache_read_input_tokens": 100,
        "cache_creation_input_tokens": 50,
        "cache_creation": {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 30},
        "output_tokens": 4,
    }
    answer = good("anthropic", claude(usage=usage))
    assert answer.usage == TokenUsage(
        input_tokens=160, output_tokens=4, total_tokens=164, cached_input_tokens=100
    )
    assert answer.metadata["cache_write_tokens"] == 50
    assert answer.metadata["cache_write_tokens_1h"] == 30


@pytest.mark.parametrize(
    ("usage", "output", "guessed"),
    [
        ((10120, 1499, 14428, 2809), 4308, False),  # reasoning beside the completion
        ((10, 4, 14, 3), 4, False),  # reasoning within it
        ((10, 4, 20, 3), 10, True),  # neither adds up
        ((10, 4, 0, 3), 4, False),  # no total
        ((10, 4, 14, 0), 4, False),
        ((10, 4, 2, 0), 4, True),
    ],
)
def test_output_tokens_are_what_is_billed(
    usage: tuple[int, int, int, int], output: int, guessed: bool
) -> None:
    prompt, completion, total, reasoning = usage
    answer = good(
        "openai",
        chat(
            usage={
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": total,
                "completion_tokens_details": {"reasoning_tokens": reasoning},
                "prompt_tokens_details": {"cached_tokens": 5},
            }
        ),
    )
    assert answer.usage.output_tokens == output
    assert answer.usage.cached_input_tokens == 5
    assert answer.metadata.get("usage_guessed", False) is guessed
    assert answer.metadata.get("reasoning_tokens", 0) == reasoning


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -5, "completion_tokens": 4},
        {"prompt_tokens": 10**59, "completion_tokens": 4},
        {"prompt_tokens": 10**12, "completion_tokens": 1e300},
    ],
)
def test_nonsense_tokens_do_not_cost_the_answer(usage: dict[str, Any]) -> None:
    """They are clamped, and the result says so."""
    answer = good("openai", chat(usage=usage))
    assert answer.output == "hello"
    assert 0 <= answer.usage.total_tokens <= 40_000_000
    assert answer.metadata["usage_clamped"] is True
    strange = good("openai", chat(usage={"prompt_tokens": "7", "completion_tokens": None}))
    assert strange.usage == TokenUsage()


def test_a_number_of_thousands_of_digits_does_not_cost_the_answer() -> None:
    body = json.dumps(chat(usage={"prompt_tokens": 0})).replace(
        '"prompt_tokens": 0', '"prompt_tokens": ' + "9" * 5000
    )
    assert good("openai", body.encode()).output == "hello"


def test_content_in_parts_is_its_text() -> None:
    content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}, "y"]
    assert good("openai", chat(content)).output == "xy"
    thought = [{"text": "hm", "thought": True}, {"text": "x"}]
    assert good("gemini", generated(parts=thought)).output == "x"
    blocks = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}]
    assert good("anthropic", claude(content=blocks)).output == "x"


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_tool_calls_are_output() -> None:
    """All providers' calls have one form, and the finish reason tells them from a schema's."""
    answers = [
        good("openai", chat(None, "tool_calls", message={"tool_calls": [CALL]})),
        good("openai", chat(None, "stop", message={"tool_calls": [CALL]})),
        good(
            "gemini",
            generated(parts=[{"functionCall": {"id": "c1", "name": "f", "args": {"a": 1}}}]),
        ),
        good(
            "anthropic",
            claude(
                content=[{"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}],
                finish="tool_use",
            ),
        ),
        good(
            "responses",
            responded(
                output=[
                    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
                ]
            ),
        ),
    ]
    for answer in answers:
        assert answer.output == {"tool_calls": [CALL], "text": ""}
        assert answer.metadata["finish_reason"] == "tool_calls"


def test_a_choice_without_a_finish_reason_is_an_answer() -> None:
    """Servers of one's own leave it out. An empty text or a refusal is none by that."""
    choice: dict[str, Any] = {"message": {"content": "x"}}
    assert good("openai", {"choices": [choice]}).output == "x"
    choice["message"] = {"content": " "}
    assert bad("openai", {"choices": [choice]}).kind is K.UNKNOWN
    choice["message"] = {"content": None, "refusal": "no"}
    assert bad("openai", {"choices": [choice]}).kind is K.CONTENT_BLOCKED


def test_several_answers_are_a_list_in_their_order() -> None:
    body = chat()
    body["choices"] = [
        {"index": 1, "message": {"content": "b"}, "finish_reason": "stop"},
        {"index": 0, "message": {"content": "a"}, "finish_reason": "stop"},
    ]
    answer = good("openai", body)
    assert answer.output == ["a", "b"]
    assert (answer.metadata["n"], answer.metadata["finish_reason"]) == (2, "stop")
    body["choices"][0]["finish_reason"] = "length"
    failure = bad("openai", body)
    assert failure.kind is K.TRUNCATED
    assert failure.metadata["partial_output"] == ["a", "b"]
    two = generated()
    two["candidates"] = [*two["candidates"], {**two["candidates"][0], "index": 1}]
    assert good("gemini", two).output == ["hello", "hello"]


def test_logprobs_are_kept_where_they_come() -> None:
    logprobs = {"content": [{"token": "a", "logprob": -0.1, "bytes": None, "top_logprobs": []}]}
    assert good("openai", chat(choice={"logprobs": logprobs})).metadata["logprobs"] == logprobs
    assert "logprobs" not in good("openai", chat(choice={"logprobs": None})).metadata
    result = {"chosenCandidates": [{"token": "a", "logProbability": -0.1}]}
    answer = good("gemini", generated(candidate={"logprobsResult": result}))
    assert answer.metadata["logprobs"] == result


def test_safety_ratings_are_kept() -> None:
    ratings = [{"category": "HARM_CATEGORY_HARASSMENT", "probability": "LOW"}]
    answer = good("gemini", generated(candidate={"safetyRatings": ratings}))
    assert answer.metadata["safety_ratings"] == {"HARM_CATEGORY_HARASSMENT": "LOW"}


def test_gemini_answers_in_snake_case_are_read() -> None:
    body = {
        "candidates": [{"content": {"parts": [{"text": "x"}]}, "finish_reason": "STOP"}],
        "usage_metadata": {"prompt_token_count": 3, "candidates_token_count": 2},
    }
    answer = good("gemini", body)
    assert (answer.output, answer.usage.total_tokens) == ("x", 5)


def test_embeddings_are_numbers_in_order() -> None:
    body = {
        "object": "list",
        "model": "e",
        "data": [
            {"index": 1, "embedding": float_base64(0.5, -1.0)},
            {"index": 0, "embedding": [0.25, 1]},
        ],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }
    answer = openai.read_embeddings(200, {}, json.dumps(body).encode())
    assert isinstance(answer, Answer)
    assert answer.output == [[0.25, 1], [0.5, -1.0]]
    assert answer.usage == TokenUsage(input_tokens=3, total_tokens=3)
    for wrong in ("?", "AAA=", [], ["a"], [True], None, float_base64(float("nan"))):
        raw = json.dumps({"data": [{"embedding": wrong}]}).encode()
        assert isinstance(openai.read_embeddings(200, {}, raw), FailedAnswer)


# -- bad ends


@pytest.mark.parametrize(
    ("name", "body", "kind"),
    [
        ("openai", chat("cut", "length"), K.TRUNCATED),
        ("openai", chat("x", "content_filter"), K.CONTENT_BLOCKED),
        ("openai", chat("x", "error"), K.UNKNOWN),
        ("openai", chat("x", "abort"), K.UNKNOWN),
        ("openai", chat("x", None), K.UNKNOWN),
        ("openai", chat("x", {"a": 1}), K.UNKNOWN),
        ("openai", chat("x", ""), K.UNKNOWN),
        ("openai", chat("cut", "MAX_TOKENS"), K.TRUNCATED),
        ("openai", chat("x", "Safety"), K.CONTENT_BLOCKED),
        ("openai", {"choices": [{"message": {"content": "x"}, "finish_reason": None}]}, K.UNKNOWN),
        ("openai", chat([{"type": "refusal", "refusal": "no"}]), K.CONTENT_BLOCKED),
        ("gemini", {"candidates": [{"content": {"parts": [{"text": "x"}]}}]}, K.UNKNOWN),
        ("openai", chat(None, message={"refusal": "no"}), K.CONTENT_BLOCKED),
        ("openai", chat(""), K.UNKNOWN),
        ("openai", chat(None), K.UNKNOWN),
        ("openai", chat(7), K.UNKNOWN),
        ("openai", {**chat(), "choices": []}, K.UNKNOWN),
        ("openai", {**chat(), "choices": [None]}, K.UNKNOWN),
        ("openai", {**chat(), "choices": None}, K.UNKNOWN),
        ("openai", {**chat(), "choices": [{"message": None}]}, K.UNKNOWN),
        ("openai", {**chat(), "choices": [{"message": "x"}]}, K.UNKNOWN),
        ("openai", {**chat(), "choices": {"0": {}}}, K.UNKNOWN),
        ("openai", chat(None, message={"tool_calls": [3]}), K.UNKNOWN),
        ("gemini", generated("cut", "MAX_TOKENS"), K.TRUNCATED),
        ("gemini", generated("x", "SAFETY"), K.CONTENT_BLOCKED),
        ("gemini", generated("x", "MODEL_ARMOR"), K.CONTENT_BLOCKED),
        ("gemini", generated("x", "OTHER"), K.UNKNOWN),
        ("gemini", generated("x", "MALFORMED_FUNCTION_CALL"), K.UNKNOWN),
        ("gemini", generated("x", "CONTINUATION"), K.UNKNOWN),
        ("gemini", generated("x", "A_NEW_ONE"), K.UNKNOWN),
        ("gemini", generated("x", 7), K.UNKNOWN),
        ("gemini", generated(""), K.UNKNOWN),
        ("gemini", generated(parts=[{"inlineData": {"data": "AA=="}}]), K.UNKNOWN),
        ("gemini", {**generated(), "candidates": []}, K.UNKNOWN),
        ("gemini", {**generated(), "candidates": [None]}, K.UNKNOWN),
        ("gemini", {"promptFeedback": {"blockReason": "SAFETY"}}, K.CONTENT_BLOCKED),
        ("anthropic", claude("cut", "max_tokens"), K.TRUNCATED),
        ("anthropic", claude("cut", "model_context_window_exceeded"), K.TRUNCATED),
        ("anthropic", claude("x", "refusal"), K.CONTENT_BLOCKED),
        ("anthropic", claude("x", "pause_turn"), K.UNKNOWN),
        ("anthropic", claude("x", None), K.UNKNOWN),
        ("anthropic", claude(""), K.UNKNOWN),
        ("anthropic", claude(content=None), K.UNKNOWN),
        (
            "responses",
            responded("cut", "incomplete", incomplete_details={"reason": "max_output_tokens"}),
            K.TRUNCATED,
        ),
        (
            "responses",
            responded("x", "incomplete", incomplete_details={"reason": "content_filter"}),
            K.CONTENT_BLOCKED,
        ),
        ("responses", responded("x", "queued"), K.UNKNOWN),
        ("responses", responded("x", "cancelled"), K.UNKNOWN),
        ("responses", responded(output=[]), K.UNKNOWN),
        ("responses", responded(output=None), K.UNKNOWN),
        (
            "responses",
            responded(
                output=[{"type": "message", "content": [{"type": "refusal", "refusal": "no"}]}]
            ),
            K.CONTENT_BLOCKED,
        ),
        (
            "responses",
            responded(status="failed", error={"code": "rate_limit_exceeded", "message": "slow"}),
            K.RATE_LIMITED,
        ),
    ],
)
def test_only_good_ends_are_answers(name: str, body: Any, kind: FailureKind) -> None:
    assert bad(name, body).kind is kind


@pytest.mark.parametrize("name", MODULES)
def test_what_was_paid_for_is_counted_though_the_answer_is_bad(name: str) -> None:
    cut = {
        "openai": chat("half", "length"),
        "gemini": generated("half", "MAX_TOKENS"),
        "anthropic": claude("half", "max_tokens"),
        "responses": responded(
            "half", "incomplete", incomplete_details={"reason": "max_output_tokens"}
        ),
    }[name]
    failure = bad(name, cut)
    assert failure.usage.input_tokens == 10
    assert failure.metadata["partial_output"] == "half"
    assert failure.metadata["finish_reason"] in {
        "length",
        "MAX_TOKENS",
        "max_tokens",
        "max_output_tokens",
    }
    error = bad(name, {**cut, "error": {"code": 500, "message": "lost"}})
    assert error.usage == failure.usage


# -- bodies that are no answer


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "empty"),
        (b"  \n ", "empty"),
        (b'{"choices": [{"mess', "cut off"),
        (b"<!DOCTYPE html><html><title>Log in</title></html>", "HTML"),
        (b'data: {"choices": []}\n\ndata: [DONE]\n\n', "stream of events"),
        (b": keep-alive\n\nevent: x\n", "stream of events"),
        (b'{"choices": [{"message": {"content": "\xff\xfe"}}]}', "not UTF-8"),
        (b"Internal Server Error", "not JSON"),
        (b'"hello"', "bare JSON text"),
        (b"[" * 100_000, "nested too deep"),
        (b"null", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"{}", "the answer has no"),
    ],
)
def test_a_body_that_is_no_answer_is_the_providers_fault(name: str, body: bytes, word: str) -> None:
    """It is asked again with the same prompt, after a while: never as a validation error."""
    failure = bad(name, body)
    assert failure.kind is K.UNKNOWN
    assert word in failure.message


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("depth", [100, 480, 900, 5000])
def test_no_depth_raises(name: str, depth: int) -> None:
    """A body nested almost too deep is read or fails, in whatever place it is so."""
    for field in ("message", "error", "args"):
        deep = f'{{"{field}":' * depth + '"\\ud800"' + "}" * depth
        bodies = [
            deep,
            f'{{"error": {deep}}}',
            f'{{"choices": [{{"finish_reason": "stop", "message": {{"content": {deep}}}}}]}}',
            '{"choices": [{"finish_reason": "tool_calls", "message": {"tool_calls": [{"id": "c", '
            f'"function": {{"name": "f", "arguments": {deep}}}}}]}}}}]}}',
            '{"candidates": [{"finishReason": "STOP", "content": {"parts": '
            f'[{{"functionCall": {{"name": "f", "args": {deep}}}}}]}}}}]}}',
            f'{{"stop_reason": "tool_use", "content": [{{"type": "tool_use", "input": {deep}}}]}}',
        ]
        for body in bodies:
            for status in (200, 429):
                answer = read(name, body.encode(), status)
                assert isinstance(answer, Answer | FailedAnswer)
                assert answer.status == status


def test_calls_in_odd_forms() -> None:
    """Arguments as an object, the form of long ago, tools of free text."""
    odd = {"id": "c1", "index": 0, "function": {"name": "f", "arguments": {"a": 1}}}
    answer = good("openai", chat(None, "tool_calls", message={"tool_calls": [odd]}))
    assert answer.output["tool_calls"] == [CALL]
    old = {"name": "f", "arguments": '{"a": 1}'}
    answer = good("openai", chat(None, "function_call", message={"function_call": old}))
    assert answer.output["tool_calls"] == [{**CALL, "id": ""}]
    custom = {"id": "c2", "type": "custom", "custom": {"name": "sql", "input": "select 1"}}
    answer = good("openai", chat(None, "tool_calls", message={"tool_calls": [custom]}))
    assert answer.output["tool_calls"] == [custom]


def test_a_byte_order_mark_is_no_fault() -> None:
    assert good("openai", b"\xef\xbb\xbf" + json.dumps(chat()).encode()).output == "hello"


def test_half_a_surrogate_pair_is_replaced() -> None:
    """It could not be stored, and the rest of the answer was paid for."""
    answer = good(
        "openai",
        b'{"choices": [{"message": {"content": "a\\ud83d b \\ud83d\\ude00"},'
        b'"finish_reason": "stop"}]}',
    )
    assert answer.output == "a\ufffd b \U0001f600"
    assert "x\ufffd" in bad("openai", b'{"error": {"message": "x\\uDC00"}}', 400).message


# -- errors


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ({"error": {"code": 429, "message": "slow down"}}, K.RATE_LIMITED, "slow down"),
        ({"error": {"code": "429", "message": "slow down"}}, K.RATE_LIMITED, "slow down"),
        ({"error": {"code": 402, "message": "no credits"}}, K.BILLING, "no credits"),
        ({"error": {"code": 503, "message": "busy"}}, K.OVERLOADED, "busy"),
        ({"error": {"status": "RESOURCE_EXHAUSTED", "message": "x"}}, K.RATE_LIMITED, "x"),
        ({"error": {"type": "overloaded_error", "message": "x"}}, K.OVERLOADED, "x"),
        (
            {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}},
            K.RATE_LIMITED,
            "x",
        ),
        ({"error": "Rate limit reached"}, K.RATE_LIMITED, "Rate limit reached"),
        ({"error": "something"}, K.UNKNOWN, "something"),
        ({"object": "error", "message": "too long", "code": 400}, K.INVALID_REQUEST, "too long"),
        ([{"error": {"code": 401, "message": "wrong key"}}], K.AUTHENTICATION, "wrong key"),
        ({"detail": "model is loading, service unavailable"}, K.OVERLOADED, "loading"),
        ({"code": 429, "message": "slow", "data": None}, K.RATE_LIMITED, "slow"),
        ({"success": False, "message": "no", "choices": []}, K.UNKNOWN, "no"),
        ({"errors": [{"message": "one"}, "two"]}, K.UNKNOWN, "one; two"),
        ({"error": {"code": 5001, "message": "odd"}}, K.UNKNOWN, "odd"),
        ({"error": {"code": {"a": 1}, "type": ["x"], "details": 3}}, K.UNKNOWN, "no reason"),
        ({"choices": [{"error": {"code": 502, "message": "upstream"}}]}, K.OVERLOADED, "upstream"),
    ],
)
def test_an_error_in_a_body_of_200_is_that_error(
    name: str, body: Any, kind: FailureKind, words: str
) -> None:
    failure = bad(name, body)
    assert failure.kind is kind
    assert words in failure.message


@pytest.mark.parametrize("name", MODULES)
def test_an_empty_error_beside_an_answer_is_none(name: str) -> None:
    nothings: tuple[Any, ...] = (None, {}, "", [])
    for nothing in nothings:
        good(name, {**GOOD[name](), "error": nothing, "message": "ok", "detail": "fine"})


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (404, {"error": "model not found, try pulling"}, K.INVALID_REQUEST, "try pulling"),
        (404, {"detail": "Not Found"}, K.INVALID_REQUEST, "Not Found"),
        (
            422,
            {"detail": [{"loc": ["body", "n"], "msg": "too large", "type": "x"}]},
            K.INVALID_REQUEST,
            "body.n: too large",
        ),
        (400, {"errors": ["a", {"message": "b"}]}, K.INVALID_REQUEST, "a; b"),
        (500, b"upstream connect error", K.OVERLOADED, "upstream connect error"),
        (502, b"<html><head><title>502 Bad Gateway</title></head>", K.OVERLOADED, "Bad Gateway"),
        (502, b"", K.OVERLOADED, "502"),
        (502, b'{"cut', K.OVERLOADED, "502"),
        (503, b"\xff\xfe", K.OVERLOADED, "503"),
        (529, {"type": "error", "error": {"type": "overloaded_error"}}, K.OVERLOADED, "529"),
        (504, {}, K.PROVIDER_TIMEOUT, "504"),
        (307, b"", K.INVALID_REQUEST, "307"),
        (403, {"error": {"message": "Your input was flagged"}}, K.CONTENT_BLOCKED, "flagged"),
        (403, b"<title>Attention Required!</title> api key", K.CONTENT_BLOCKED, "Attention"),
        (403, {"error": {"message": "this API key may not"}}, K.AUTHENTICATION, "may not"),
        (403, {"error": {"status": "PERMISSION_DENIED", "message": "x"}}, K.CONTENT_BLOCKED, "x"),
        (401, {"error": {"message": "Incorrect API key"}}, K.AUTHENTICATION, "Incorrect"),
        (402, {"error": {"message": "Insufficient Balance"}}, K.BILLING, "Balance"),
        (
            429,
            {"error": {"code": "insufficient_quota", "message": "check your plan"}},
            K.BILLING,
            "check your plan",
        ),
        (
            400,
            {
                "type": "error",
                "error": {
                    "type": "invalid_request_error",
                    "message": "Your credit balance is too low to access the API",
                },
            },
            K.BILLING,
            "credit balance",
        ),
        (
            429,
            {"error": {"message": "Limit 200 per day reached", "code": "rate_limit_exceeded"}},
            K.QUOTA_EXHAUSTED,
            "per day",
        ),
        (429, {"error": {"message": "Request too large for gpt"}}, K.INVALID_REQUEST, "too large"),
        (
            400,
            {"error": {"code": "content_filter", "message": "policy"}},
            K.CONTENT_BLOCKED,
            "policy",
        ),
        (
            400,
            [
                {
                    "error": {
                        "code": 400,
                        "message": "API key not valid",
                        "status": "INVALID_ARGUMENT",
                    }
                }
            ],
            K.AUTHENTICATION,
            "not valid",
        ),
        (
            404,
            {"timestamp": 1, "error": "Not Found", "message": "no such path"},
            K.INVALID_REQUEST,
            "no such",
        ),
        (
            502,
            {"error": {"message": "Provider returned error", "metadata": {"raw": "out of memory"}}},
            K.OVERLOADED,
            "out of memory",
        ),
    ],
)
def test_errors_of_all_forms(
    name: str, status: int, body: Any, kind: FailureKind, words: str
) -> None:
    failure = bad(name, body, status)
    assert failure.kind is kind
    assert words in failure.message
    assert failure.status == status


def google_error(code: int, message: str, *details: dict[str, Any]) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "status": "X", "details": list(details)}}


def violation(**fields: Any) -> dict[str, Any]:
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [fields]}


RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "17.5s"}
PLAN = "You exceeded your current quota, please check your plan and billing details."


def test_geminis_quotas_are_told_apart() -> None:
    minute = google_error(429, PLAN, violation(quotaId="RequestsPerMinute"), RETRY)
    day = google_error(429, PLAN, violation(quotaId="RequestsPerDay-FreeTier", quotaValue="50"))
    none = google_error(429, PLAN, violation(quotaId="Requests-FreeTier", quotaValue="0"))
    for wrapped in (minute, [minute]):
        failure = bad("openai", wrapped, 429)
        assert (failure.kind, failure.retry_after) == (K.RATE_LIMITED, 17.5)
    failure = bad("gemini", day, 429, {"Date": "Sat, 28 Nov 2026 20:00:00 GMT"})
    assert failure.kind is K.QUOTA_EXHAUSTED
    assert failure.retry_after == 12 * 3600  # noon in California
    assert bad("gemini", none, 429).kind is K.BILLING


@pytest.mark.parametrize(
    ("headers", "message", "seconds"),
    [
        ({"Retry-After": "7"}, "x", 7.0),
        ({"retry-after-ms": "1500", "retry-after": "2"}, "x", 1.5),
        (
            {
                "Retry-After": "Sat, 28 Nov 2026 12:00:30 GMT",
                "Date": "Sat, 28 Nov 2026 12:00:00 GMT",
            },
            "x",
            30.0,
        ),
        ({"Retry-After": "Sat, 28 Nov 2020 12:00:30 GMT"}, "x", 0.0),
        ({}, "Please try again in 1m2.5s.", 62.5),
        ({}, "Please try again in 120ms. Visit", 0.12),
        ({}, "x", None),
        ({"Retry-After": "soon"}, "x", None),
        ({"Retry-After": "1e300"}, "x", 90_000.0),
        ({"Retry-After": "inf"}, "x", None),
        ({"Retry-After": "-5"}, "x", None),
    ],
)
def test_how_long_to_wait(headers: dict[str, str], message: str, seconds: float | None) -> None:
    failure = bad("openai", {"error": {"message": message}}, 429, headers)
    assert failure.retry_after == pytest.approx(seconds)


def test_a_router_passes_the_wait_on() -> None:
    for place in ({"retry_after": 7}, {"metadata": {"headers": {"Retry-After": "7"}}}):
        failure = bad("openai", {"error": {"code": 429, "message": "slow", **place}})
        assert (failure.kind, failure.retry_after) == (K.RATE_LIMITED, 7.0)


def test_keys_and_control_characters_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "hex0123456789")
    message = "Incorrect API key provided: hex0123456789 \x1b[31m sk-abcdefgh1234"
    failure = bad("openai", {"error": {"message": message, "code": "\x1b]0;"}}, 401)
    for hidden in ("hex0123456789", "sk-abcdefgh", "\x1b"):
        assert hidden not in failure.message


def test_a_long_reason_keeps_both_ends() -> None:
    """Providers put the reason last."""
    message = "In " + "x" * 500 + " because the image is too large"
    failure = bad("openai", {"error": {"message": message}}, 400)
    assert failure.message.endswith("because the image is too large")
    assert len(condense(message)) == 200


# -- limits


def test_openais_limits() -> None:
    answer = good(
        "openai",
        chat(),
        {
            "x-ratelimit-limit-requests": "500",
            "x-ratelimit-remaining-requests": "499",
            "x-ratelimit-reset-requests": "120ms",
            "x-ratelimit-limit-tokens": "30000",
            "x-ratelimit-remaining-tokens": "29000",
            "x-ratelimit-reset-tokens": "2s",
        },
    )
    assert answer.limits is not None
    assert answer.limits.requests is not None
    assert answer.limits.tokens is not None
    assert answer.limits.requests.reset_seconds == pytest.approx(0.12)
    assert answer.limits.requests.window_seconds() == 60
    assert answer.limits.tokens.window_seconds() == 60


def test_groqs_requests_are_a_days() -> None:
    answer = good(
        "openai",
        chat(),
        {
            "X-RateLimit-Limit-Requests": "14400",
            "X-RateLimit-Remaining-Requests": "14370",
            "X-RateLimit-Reset-Requests": "2m59.56s",
        },
    )
    assert answer.limits is not None
    assert answer.limits.requests is not None
    assert answer.limits.requests.window_seconds() == 86_400


def test_anthropics_limits_are_read_against_its_own_clock() -> None:
    failure = bad(
        "anthropic",
        {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}},
        429,
        {
            "date": "Sat, 28 Nov 2026 12:00:00 GMT",
            "anthropic-ratelimit-input-tokens-limit": "80000",
            "anthropic-ratelimit-input-tokens-remaining": "0",
            "anthropic-ratelimit-input-tokens-reset": "2026-11-28T12:01:00Z",
            "anthropic-ratelimit-requests-limit": "50",
        },
    )
    assert failure.limits is not None
    assert failure.limits.input_tokens is not None
    assert failure.limits.input_tokens.reset_seconds == 60
    assert failure.limits.input_tokens.window_seconds() == 60
    assert failure.limits.output_tokens is None


def test_broken_limits_are_no_limits() -> None:
    headers = {
        "x-ratelimit-limit-requests": "many",
        "x-ratelimit-remaining-tokens": "-1",
        "x-ratelimit-reset-tokens": "9" * 400,
        "anthropic-ratelimit-tokens-limit": "nan",
    }
    assert good("openai", chat(), headers).limits is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1m2.5s", 62.5),
        ("6s", 6.0),
        ("2h", 7200.0),
        ("1d1ms", 86400.001),
        ("17", 17.0),
        ("", None),
        ("x6s", None),
        ("6s!", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


# -- anything

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["stop", "length", "STOP", "text", "function_call", "error", "429"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["error", "choices", "message", "content", "code", "details", "parts", "usage"]
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    steps = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for step, inner in steps:
        yield from _paths(inner, (*path, step))


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_answer_raises(name: str, data: st.DataObject) -> None:
    """Whatever stands in whatever place of an answer, it is read or fails as data, and what is
    kept can be written as JSON."""
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    bodies = {
        "openai": chat(message={"tool_calls": [CALL]}),
        "gemini": generated(parts=[{"functionCall": {"name": "f"}}, {"text": "x"}]),
        "anthropic": claude(content=[{"type": "tool_use", "id": "c", "name": "f", "input": {}}]),
        "responses": responded(output=[call, responded()["output"][1]]),
    }
    body = bodies[name]
    path = data.draw(st.sampled_from(sorted(_paths(body), key=str)))
    status = data.draw(st.sampled_from([200, 200, 400, 403, 429, 500]))
    answer = read(name, _replaced(body, path, data.draw(JSON)), status)
    assert isinstance(answer, Answer | FailedAnswer)
    json.dumps(dict(answer.metadata))


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=40), status=st.sampled_from([200, 204, 302, 418, 500, 599]))
def test_no_bytes_raise(body: bytes, status: int) -> None:
    for name in MODULES:
        assert isinstance(read(name, body, status), FailedAnswer)


def test_hostile_texts_take_no_time() -> None:
    """Reading is linear: no page freezes a worker."""
    started = time.process_time()
    for body in (b"<" * 2_000_000, b"<title>" * 300_000, b"try again in " + b"9" * 2_000_000):
        bad("openai", body, 500)
    bad("openai", {"error": {"message": "try again in 1s" * 100_000}}, 429)
    assert time.process_time() - started < 5


# -- written answers


def completion(output: Any = "hello", **metadata: Any) -> Completion[Any]:
    usage = TokenUsage(input_tokens=10, output_tokens=6, cached_input_tokens=3)
    return Completion(output, usage, metadata)


@pytest.mark.parametrize("name", MODULES)
def test_a_written_answer_is_read_back(name: str) -> None:
    """Text, JSON and tool calls of any provider come back from any dialect."""
    write = MODULES[name].write_answer
    cases = [
        (completion(), "hello"),
        (completion({"label": "yes"}), '{"label": "yes"}'),
        (completion(["a", "b"]), '["a", "b"]'),  # a schema's list is no two answers
        (
            completion({"tool_calls": [CALL], "text": "x"}, finish_reason="tool_calls"),
            {"tool_calls": [CALL], "text": "x"},
        ),
    ]
    for given_, output in cases:
        body = write(given_, model="gemini:gemini-2.5-flash", answer_id="a1")
        answer = good(name, body)
        assert answer.output == output
        assert answer.usage == given_.usage
        assert answer.metadata["model"] == "gemini:gemini-2.5-flash"
    several = write(completion(["a", "b"], n=2), model="m", answer_id="a")
    assert good(name, several).output == (["a", "b"] if name in ("openai", "gemini") else "ab")


def test_written_answers_fit_the_sdks_types() -> None:
    calls = completion({"tool_calls": [CALL], "text": ""}, finish_reason="tool_calls")
    chat_type = importlib.import_module("openai.types.chat").ChatCompletion
    response_type = importlib.import_module("openai.types.responses").Response
    list_type = importlib.import_module("openai.types").CreateEmbeddingResponse
    genai: Any = importlib.import_module("google.genai.types").GenerateContentResponse
    for given_ in (completion(), calls):
        chat_type.model_validate(openai.write_answer(given_, model="m", answer_id="a"), strict=True)
        body = responses.write_answer(given_, model="m", answer_id="a")
        response = response_type.model_validate(body)
        assert response.output_text == (given_.output if given_ is not calls else "")
        genai.model_validate(gemini.write_answer(given_, model="m", answer_id="a"))
    vectors = completion([[0.5], [1.0]])
    parsed = list_type.model_validate(openai.write_embeddings(vectors, model="m"), strict=True)
    assert [entry.embedding for entry in parsed.data] == vectors.output


def test_anthropics_written_answers_fit_its_sdk() -> None:
    sdk: Any = pytest.importorskip("anthropic.types")
    calls = completion({"tool_calls": [CALL], "text": ""}, finish_reason="tool_calls")
    for given_ in (completion(), calls):
        body = anthropic.write_answer(given_, model="m", answer_id="a")
        sdk.Message.model_validate(body, strict=True)
