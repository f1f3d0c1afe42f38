"""Batch files of the providers: rows in as they are, result rows as theirs."""

from __future__ import annotations

import copy
import importlib
import json
from typing import Any

import pytest

from batchllm_celery.dialects import anthropic, gemini, openai, responses
from batchllm_celery.dialects.answers import Answer, FailedAnswer
from batchllm_celery.dialects.refusals import Refusals
from batchllm_celery.dialects.rows import Row, RowOutcome, read_row, recognise, write_row
from batchllm_celery.errors import FailureKind, InputError
from batchllm_celery.models import Completion, TokenUsage
from batchllm_celery.models.request import NativeRequest, Request
from tests.unit.dialects import native_rows as rows
from tests.unit.dialects.sdk_types import CHAT, EMBEDDINGS, RESPONSES, check, check_gemini, strict
from tests.unit.dialects.test_answers import chat, claude, generated

K = FailureKind
ALL = [*rows.openai_rows(), *rows.gemini_rows(), *rows.anthropic_rows()]


def read(fields: dict[str, Any]) -> Row:
    row = read_row(fields)
    assert isinstance(row, Row), str(row)
    return row


def refused(fields: dict[str, Any]) -> list[str]:
    result = read_row(fields)
    assert isinstance(result, Refusals)
    return [refusal.path for refusal in result]


# -- rows in


def test_the_files_hold_every_documented_field() -> None:
    """The rows of these tests name each field that the SDKs know, but for what is refused."""
    assert len(rows.openai_rows()) >= 40
    assert len(rows.gemini_rows()) >= 20
    assert len(rows.anthropic_rows()) >= 20
    types = {
        "/v1/chat/completions": "chat.completion_create_params:CompletionCreateParamsNonStreaming",
        "/v1/responses": "responses.response_create_params:ResponseCreateParamsNonStreaming",
        "/v1/embeddings": "embedding_create_params:EmbeddingCreateParams",
    }
    never = {"stream_options", "background_options", "previous_response_id"}
    for url, path in types.items():
        module, _, name = path.partition(":")
        wanted = getattr(importlib.import_module(f"openai.types.{module}"), name).__annotations__
        used = {f for row in rows.openai_rows() if row["url"] == url for f in row["body"]}
        assert set(wanted) - used <= never, url


def test_the_rows_of_openai_are_what_its_sdk_sends() -> None:
    adapters = {"chat/completions": CHAT, "responses": RESPONSES, "embeddings": EMBEDDINGS}
    for row in rows.openai_rows():
        check(adapters[row["url"].removeprefix("/v1/")], row["body"])


def test_the_rows_of_anthropic_are_what_its_sdk_sends() -> None:
    pytest.importorskip("anthropic")
    adapter = strict("anthropic.types.message_create_params:MessageCreateParamsNonStreaming")
    for row in rows.anthropic_rows():
        known = {k: v for k, v in row["params"].items() if k not in rows.CLAUDE_SAMPLING}
        check(adapter, known)


def test_the_rows_of_gemini_are_what_its_sdk_knows() -> None:
    for row in rows.gemini_rows():
        body = row["request"]
        check_gemini({gemini.camel(name): value for name, value in body.items()})


@pytest.mark.parametrize("index", range(len(ALL)))
def test_a_body_is_kept_as_it_is(index: int) -> None:
    """From the row to a payload and back, field by field, nulls and spellings included."""
    fields = copy.deepcopy(ALL[index])
    row = read(fields)
    body = next(fields[name] for name in ("body", "request", "params") if name in fields)
    assert fields == ALL[index]
    assert row.request.body == body
    stored = json.loads(json.dumps(row.request.to_json()))
    assert NativeRequest.of(stored) == row.request
    assert row.key == (fields.get("custom_id") or fields.get("key"))
    assert row.model == body.get("model")
    assert row.rest == {}


def test_formats_are_told_apart() -> None:
    assert recognise(rows.openai_rows()[0]) == "openai"
    assert recognise(rows.gemini_rows()[0]) == "gemini"
    assert recognise(rows.anthropic_rows()[0]) == "anthropic"
    others: list[dict[str, Any]] = [
        {"prompt": "x"},
        {"messages": []},
        {"request": "x"},
        {"body": "x", "url": "y"},
        {},
    ]
    for other in others:
        assert recognise(other) is None
    with_prompt = {**rows.openai_rows()[0], "prompt": "x"}
    assert recognise(with_prompt) is None
    assert refused({"prompt": "x"}) == ["row"]


def test_urls_choose_the_dialect() -> None:
    body = rows.chat()
    for url in (
        "/v1/chat/completions",
        "/chat/completions",
        "https://api.openai.com/v1/chat/completions",
        "/v1/chat/completions/",
    ):
        row = read({"custom_id": "a", "method": "POST", "url": url, "body": body})
        assert row.request.dialect == "openai"
    row = read({"custom_id": "a", "url": "/v1/responses", "body": rows.respond()})
    assert row.request.dialect == "responses"
    unknown: tuple[Any, ...] = (
        "/v1/completions",
        "/v1/images/generations",
        "/v1/moderations",
        "/v1/not/chat/completions",
        "",
        None,
        7,
    )
    for url in unknown:
        assert "row.url" in refused({"custom_id": "a", "url": url, "body": body})
    assert refused(
        {"custom_id": "a", "method": "GET", "url": "/v1/responses", "body": rows.respond()}
    ) == ["row.method"]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"stream": True}, "body.stream"),
        ({"background": True}, "body.background"),
        ({"previous_response_id": "resp_1"}, "body.previous_response_id"),
        ({"messages": None}, "body.messages"),
        ({"model": None}, "body.model"),
        ({"model": "a b"}, "body.model"),
        ({"model": "../x"}, "body.model"),
        ({"model": 7}, "body.model"),
        ({"model": "x" * 129}, "body.model"),
    ],
)
def test_what_can_not_be_run_is_refused_by_name(change: dict[str, Any], path: str) -> None:
    row = {"custom_id": "a", "url": "/v1/chat/completions", "body": rows.chat(**change)}
    assert refused(row) == [path]


def test_a_body_that_is_nested_too_deep_is_refused() -> None:
    """It would break decoders on its way, and take other rows along."""
    for depth in (99, 3000):
        deep: Any = "x"
        for _ in range(depth):
            deep = [deep]
        row = {"custom_id": "a", "url": "/v1/chat/completions", "body": rows.chat(user=deep)}
        if depth == 99:
            assert read(row).request.body["user"] == deep
        else:
            assert refused(row) == ["body"]
    nested: dict[str, Any] = {}
    for _ in range(3000):
        nested = {"a": nested}
    for field in ("schema", "extra"):
        with pytest.raises(InputError, match=f"{field}: is nested deeper"):
            Request.of({"messages": [rows.USER], field: nested})
    with pytest.raises(InputError, match=r"tools\[0\].parameters: is nested deeper"):
        Request.of({"messages": [rows.USER], "tools": [{"name": "f", "parameters": nested}]})
    with pytest.raises(InputError, match="body: is nested deeper"):
        NativeRequest.of({"dialect": "openai", "body": nested})


def test_fields_that_ask_for_nothing_are_kept() -> None:
    body = rows.chat(stream=False, background=False, previous_response_id=None)
    row = read({"custom_id": "a", "url": "/v1/chat/completions", "body": body})
    assert row.request.body == body


def test_keys() -> None:
    body = rows.chat()
    url = "/v1/chat/completions"
    assert read({"url": url, "body": body}).key is None
    assert refused({"custom_id": " ", "url": url, "body": body}) == ["row.custom_id"]
    assert refused({"custom_id": 7, "url": url, "body": body}) == ["row.custom_id"]
    assert refused({"custom_id": "a b", "params": rows.message()}) == ["row.custom_id"]
    assert refused({"custom_id": "x" * 65, "params": rows.message()}) == ["row.custom_id"]


def test_columns_beside_the_providers_own_are_kept() -> None:
    row = read({"key": "a", "request": rows.generate(), "label": "yes"})
    assert row.rest == {"label": "yes"}


def test_a_row_of_gemini_may_name_its_model() -> None:
    body = rows.generate(model="models/gemini-2.5-flash")
    row = read({"key": "a", "request": body})
    assert row.model == "gemini-2.5-flash"
    assert row.request.body == body


# -- rows out


def outcome_of(answer: Answer | FailedAnswer, raw: str, **fields: Any) -> RowOutcome:
    if isinstance(answer, FailedAnswer):
        return RowOutcome.of_failure("k", answer, raw=raw, **fields)
    return RowOutcome(
        "k",
        completion=answer,
        status=answer.status,
        request_id=answer.request_id,
        raw=raw,
        **fields,
    )


def line(row_format: Any, outcome: RowOutcome) -> tuple[dict[str, Any], bool]:
    text, is_error = write_row(row_format, outcome)
    assert "\n" not in text
    return json.loads(text), is_error


def test_an_answer_of_openai_is_spliced_as_it_came() -> None:
    """1.0 stays 1.0, and what we know nothing of stays too."""
    raw = json.dumps({**chat(), "service_score": 1.0, "odd": [1e400, None]}, indent=1)
    answer = openai.read_answer(200, {"x-request-id": "req_1"}, raw.encode())
    text, is_error = write_row("openai", outcome_of(answer, raw, batch_id="b"))
    assert not is_error
    assert '"service_score": 1.0' in text
    assert "Infinity" in text
    row = json.loads(text)
    assert list(row) == ["id", "custom_id", "response", "error"]
    assert row["id"].startswith("batch_req_")
    assert len(row["id"]) == len("batch_req_") + 32
    assert row["response"]["status_code"] == 200
    assert row["response"]["request_id"] == "req_1"
    assert row["response"]["body"] == json.loads(raw)
    assert row["error"] is None
    again, _ = write_row("openai", outcome_of(answer, raw, batch_id="b"))
    other, _ = write_row("openai", outcome_of(answer, raw, batch_id="c"))
    assert again == text
    assert json.loads(other)["id"] != row["id"]
    types: Any = importlib.import_module("openai.types.chat")
    types.ChatCompletion.model_validate(row["response"]["body"])


def test_a_failure_of_http_goes_to_openais_error_file() -> None:
    raw = json.dumps({"error": {"message": "slow down", "code": 429}})
    failure = openai.read_answer(429, {"x-request-id": "r"}, raw.encode())
    row, is_error = line("openai", outcome_of(failure, raw))
    assert is_error
    assert row["response"] == {"status_code": 429, "request_id": "r", "body": json.loads(raw)}
    assert row["error"] is None
    page = openai.read_answer(502, {}, b"<html>")
    row, is_error = line("openai", outcome_of(page, "<html>"))
    assert is_error
    assert row["response"]["body"]["error"]["code"] == "overloaded"


def test_a_cut_answer_is_in_openais_error_file_with_its_text() -> None:
    raw = json.dumps(chat("half", "length"))
    row, is_error = line("openai", outcome_of(openai.read_answer(200, {}, raw.encode()), raw))
    assert is_error
    assert row["response"]["body"]["choices"][0]["message"]["content"] == "half"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (K.DEADLINE, "batch_expired"),
        (K.CANCELLED, "batch_cancelled"),
        (K.FRAMEWORK_TIMEOUT, "framework_timeout"),
        (K.BUDGET, "budget"),
        (K.INVALID_INPUT, "invalid_input"),
    ],
)
def test_what_no_reply_came_for_has_openais_error(kind: FailureKind, code: str) -> None:
    row, is_error = line("openai", RowOutcome("k", kind=kind, message="T: why"))
    assert is_error
    assert row["response"] is None
    assert row["error"] == {"code": code, "message": "T: why"}


def test_result_rows_of_gemini() -> None:
    raw = json.dumps(generated())
    row, is_error = line("gemini", outcome_of(gemini.read_answer(200, {}, raw.encode()), raw))
    assert not is_error
    assert row == {"key": "k", "response": json.loads(raw)}
    cut = json.dumps(generated("half", "MAX_TOKENS"))
    row, _ = line("gemini", outcome_of(gemini.read_answer(200, {}, cut.encode()), cut))
    assert row["response"]["candidates"][0]["finishReason"] == "MAX_TOKENS"


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (429, K.RATE_LIMITED, 8),
        (400, K.INVALID_REQUEST, 3),
        (422, K.INVALID_REQUEST, 3),
        (401, K.AUTHENTICATION, 16),
        (403, K.CONTENT_BLOCKED, 7),
        (404, K.INVALID_REQUEST, 5),
        (500, K.OVERLOADED, 13),
        (503, K.OVERLOADED, 14),
        (504, K.PROVIDER_TIMEOUT, 4),
        (None, K.FRAMEWORK_TIMEOUT, 4),
        (None, K.CANCELLED, 1),
        (None, K.CONNECTION, 14),
        (None, K.LOGIC_ERROR, 13),
        (None, K.DEADLINE, 4),
        (200, K.UNKNOWN, 13),
    ],
)
def test_failures_of_gemini_have_googles_codes(
    status: int | None, kind: FailureKind, code: int
) -> None:
    row, _ = line("gemini", RowOutcome("k", kind=kind, message="T: why", status=status))
    assert row == {"key": "k", "error": {"code": code, "message": "T: why"}}


def test_result_rows_of_anthropic() -> None:
    raw = json.dumps(claude())
    row, is_error = line("anthropic", outcome_of(anthropic.read_answer(200, {}, raw.encode()), raw))
    assert not is_error
    assert row == {"custom_id": "k", "result": {"type": "succeeded", "message": json.loads(raw)}}
    cut = json.dumps(claude("half", "max_tokens"))
    row, _ = line("anthropic", outcome_of(anthropic.read_answer(200, {}, cut.encode()), cut))
    assert row["result"]["type"] == "succeeded"
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "x"}}
    failure = anthropic.read_answer(529, {}, json.dumps(error).encode())
    row, _ = line("anthropic", outcome_of(failure, json.dumps(error)))
    assert row["result"] == {"type": "errored", "error": error}
    row, _ = line("anthropic", RowOutcome("k", kind=K.FRAMEWORK_TIMEOUT, message="T: why"))
    assert row["result"]["error"]["error"] == {"type": "timeout_error", "message": "T: why"}
    for kind, name in ((K.CANCELLED, "canceled"), (K.DEADLINE, "expired")):
        row, _ = line("anthropic", RowOutcome("k", kind=kind, message="x"))
        assert row["result"] == {"type": name}


def test_result_rows_of_anthropic_are_read_by_its_sdk() -> None:
    sdk: Any = pytest.importorskip("anthropic.types.messages")
    raw = json.dumps(claude())
    outcomes = [
        outcome_of(anthropic.read_answer(200, {}, raw.encode()), raw),
        RowOutcome("k", kind=K.FRAMEWORK_TIMEOUT, message="T: why"),
        RowOutcome("k", kind=K.OVERLOADED, message="T: why", status=529, raw="<html>"),
        RowOutcome("k", kind=K.CANCELLED, message="x"),
        RowOutcome("k", kind=K.DEADLINE, message="x"),
    ]
    types = []
    for outcome in outcomes:
        row, _ = line("anthropic", outcome)
        parsed = sdk.MessageBatchIndividualResponse.model_validate(row)
        types.append(parsed.result.type)
    assert types == ["succeeded", "errored", "errored", "canceled", "expired"]


def test_an_answer_of_another_provider_has_the_form_of_the_row() -> None:
    """Without a body of that form, one is made of the answer; the model says whose it is."""
    usage = TokenUsage(input_tokens=3, output_tokens=2)
    outcome = RowOutcome("k", completion=Completion("hi", usage), model="gemini:flash")
    row, _ = line("openai", outcome)
    types: Any = importlib.import_module("openai.types.chat")
    body = types.ChatCompletion.model_validate(row["response"]["body"], strict=True)
    assert (body.choices[0].message.content, body.model) == ("hi", "gemini:flash")
    assert body.usage.total_tokens == 5
    for row_format, dialect, module in (
        ("gemini", "gemini", gemini),
        ("anthropic", "anthropic", anthropic),
    ):
        made = RowOutcome(
            "k",
            completion=Completion("hi", usage),
            model="openai:m",
            dialect=dialect,  # type: ignore[arg-type]
        )
        row, _ = line(row_format, made)
        body = row["response"] if row_format == "gemini" else row["result"]["message"]
        answer = module.read_answer(200, {}, json.dumps(body).encode())
        assert answer.output == "hi"
    response = RowOutcome("k", completion=Completion("hi"), model="m", dialect="responses")
    row, _ = line("openai", response)
    read_back = responses.read_answer(200, {}, json.dumps(row["response"]["body"]).encode())
    assert isinstance(read_back, Answer)
    vectors = RowOutcome("k", completion=Completion([[0.5]]), model="m", dialect="embeddings")
    row, _ = line("openai", vectors)
    assert row["response"]["body"]["data"][0]["embedding"] == [0.5]


def test_ids_and_words_can_not_break_a_line() -> None:
    key = 'a"b\n\u2028\ud800'
    for row_format in ("openai", "gemini", "anthropic"):
        row, _ = line(row_format, RowOutcome(key, kind=K.UNKNOWN, message="x\ny\u2028"))
        assert row.get("custom_id", row.get("key")) == key
    raw = json.dumps(chat("a\nb"), indent=2).replace("\n", "\r\n")
    answer = openai.read_answer(200, {}, raw.encode())
    row, _ = line("openai", outcome_of(answer, raw))
    assert row["response"]["body"]["choices"][0]["message"]["content"] == "a\nb"
