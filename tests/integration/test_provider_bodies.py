"""What providers answer beside the usual: errors under status 200, bodies that are none, answers
that did not come to their end. Real clients, in both wire formats, against a server that sends
given bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("openai", reason="the openai extra is not installed")

from batchllm_celery.errors import FailureKind as K
from batchllm_celery.errors import ProviderError
from batchllm_celery.models import Failure, RetryState, StrategySpec
from batchllm_celery.providers import OpenAICompatibleStrategy, SimulatedStrategy
from batchllm_celery.settings import Settings
from batchllm_celery.strategies import (
    LLMCallStrategy,
    ProcessResources,
    Registry,
    as_completion,
    classify_for,
)

JSON = "application/json"


class Sent:
    """Bytes for each connection in turn, the last ones again and again; the bodies that came."""

    def __init__(self, *replies: bytes) -> None:
        self.replies = list(replies)
        self.bodies: list[str] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        [size] = [
            line[15:] for line in head.split(b"\r\n") if line.lower().startswith(b"content-l")
        ]
        self.bodies.append((await reader.readexactly(int(size))).decode())
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        writer.write(reply)
        await writer.drain()
        writer.close()


def http(
    body: Any, status: int = 200, type_: str = JSON, headers: dict[str, str] | None = None
) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {type_}", f"Content-Length: {len(content)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + content


@asynccontextmanager
async def calling(wire: str, sent: Sent, **options: Any) -> AsyncIterator[LLMCallStrategy[Any]]:
    server = await asyncio.start_server(sent.handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    settings = Settings(simulated_url=url, openai_base_url=f"{url}/v1")
    registry = Registry(ProcessResources(settings=settings))
    strategy: LLMCallStrategy[Any] = (
        OpenAICompatibleStrategy("m", **options)
        if wire == "openai"
        else SimulatedStrategy("m", **options)
    )
    await registry.prepare(strategy)
    try:
        yield strategy
    finally:
        await registry.close()
        server.close()


async def failure_of(wire: str, reply: bytes, **options: Any) -> Failure:
    async with calling(wire, Sent(reply), **options) as strategy:
        with pytest.raises(ProviderError) as caught:
            await strategy.execute("p", 1, 9)
    return classify_for(strategy, caught.value)


def good(wire: str, text: Any = "fine", finish: Any = "", **message: Any) -> dict[str, Any]:
    if wire == "openai":
        choice = {"message": {"content": text, **message}, "finish_reason": finish or "stop"}
        return {"choices": [choice], "usage": {"prompt_tokens": 4, "completion_tokens": 1}}
    candidate = {"content": {"parts": [{"text": text}]}, "finishReason": finish or "STOP"}
    usage = {"promptTokenCount": 4, "candidatesTokenCount": 1, "totalTokenCount": 5}
    return {"candidates": [candidate], "usageMetadata": usage}


WIRES = pytest.mark.parametrize("wire", ["openai", "gemini"])


# -- an error under status 200


def retry_info(seconds: str) -> dict[str, str]:
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": seconds}


@WIRES
@pytest.mark.parametrize(
    ("body", "kind", "wait", "words"),
    [
        ({"error": {"code": 429, "message": "slow down"}}, K.RATE_LIMITED, None, "slow down"),
        ({"error": {"code": 402, "message": "no credits"}}, K.BILLING, None, "no credits"),
        ({"error": {"code": "503", "message": "busy"}}, K.OVERLOADED, None, "busy"),
        ({"error": {"code": 401, "message": "who?"}}, K.AUTHENTICATION, None, "who?"),
        ([{"error": {"code": 429, "message": "a list"}}], K.RATE_LIMITED, None, "a list"),
        (
            {"error": {"code": 429, "message": "x", "details": [retry_info("7s")]}},
            K.RATE_LIMITED,
            7.0,
            "x",
        ),
        ({"error": "the upstream is away"}, K.UNKNOWN, None, "the upstream is away"),
        ({"detail": "no such route"}, K.UNKNOWN, None, "no such route"),
        ({"message": "bad request", "code": 400}, K.INVALID_REQUEST, None, "bad request"),
    ],
)
async def test_an_error_in_the_body_of_a_200_is_that_error(
    wire: str, body: Any, kind: K, wait: float | None, words: str
) -> None:
    """The body's code is the status, its words are shown, its hint when to come again is heard."""
    failure = await failure_of(wire, http(body))
    assert (failure.kind, failure.retry_after) == (kind, wait)
    assert words in failure.message


@WIRES
async def test_the_header_of_such_a_200_says_when_to_come_again(wire: str) -> None:
    """Retry-After counts whatever the status says."""
    body = {"error": {"code": 429, "message": "x"}}
    failure = await failure_of(wire, http(body, headers={"Retry-After": "3"}))
    assert failure.retry_after == 3.0


@pytest.mark.parametrize(
    ("error", "kind", "wait"),
    [
        ({"code": "rate_limit_exceeded", "message": "x"}, K.RATE_LIMITED, None),
        ({"type": "overloaded_error", "message": "x"}, K.OVERLOADED, None),
        ({"code": 429, "message": "Please try again in 2s."}, K.RATE_LIMITED, 2.0),
        (
            {"code": 429, "message": "x", "metadata": {"headers": {"Retry-After": "9"}}},
            K.RATE_LIMITED,
            9.0,
        ),
        ({"code": 429, "message": "x", "type": "insufficient_quota"}, K.BILLING, None),
    ],
)
async def test_routers_name_the_error_in_other_ways(
    error: Any, kind: K, wait: float | None
) -> None:
    """A word for a code, a wait in words or in a header that is passed on; also in the choice."""
    alone = await failure_of("openai", http({"error": error}))
    body = {"choices": [{"message": {"content": "half"}, "finish_reason": "error", "error": error}]}
    in_choice = await failure_of("openai", http(body))
    assert alone.kind is in_choice.kind is kind
    assert alone.retry_after == wait


# -- a body that is none


BODIES = {
    "empty": (b"", JSON),
    "blank": (b" \n\n", JSON),
    "cut": (b'{"choices": [{"mess', JSON),
    "a page": (b"<!doctype html><title>Welcome</title>", "text/html"),
    "a page called JSON": (b"\n<html></html>", JSON),
    "an event stream": (b'data: {"choices": []}\n\ndata: [DONE]\n', "text/event-stream"),
    "no UTF-8": (b'{"choices": [{"message": {"content": "\xff\xfe"}}]}', JSON),
    "a list": (b"[1, 2]", JSON),
    "null": (b"null", JSON),
    "deep": (b"[" * 90_000, JSON),
    "another object": (b'{"status": "ok"}', JSON),
    "null choices": (b'{"choices": null, "candidates": null}', JSON),
    "a null choice": (b'{"choices": [null], "candidates": [null]}', JSON),
    "a null message": (
        b'{"choices": [{"message": null, "finish_reason": "stop"}],'
        b' "candidates": [{"content": null, "finishReason": "STOP"}]}',
        JSON,
    ),
    "other types": (b'{"choices": "abc", "candidates": 5, "text": "abc"}', JSON),
    "choices of another type": (b'{"choices": ["abc"], "candidates": ["abc"]}', JSON),
}


@WIRES
@pytest.mark.parametrize("name", BODIES)
async def test_a_body_that_is_no_answer_is_the_provider_s_fault(wire: str, name: str) -> None:
    """It is asked again later, with the same prompt: the model's answer was not at fault, nor our
    code."""
    content, type_ = BODIES[name]
    sent, state = Sent(http(content, type_=type_), http(good(wire))), RetryState()
    schema = {"type": "string"}
    async with calling(wire, sent, schema=schema) as strategy:
        with pytest.raises(ProviderError) as caught:
            await strategy.execute("the prompt", 1, 9, state)
        await strategy.on_error(caught.value, 1, state)
        sent.replies = [http(good(wire, '"fine"'))]
        done = as_completion(await strategy.execute("the prompt", 2, 9, state))
    assert classify_for(strategy, caught.value).kind is K.UNKNOWN
    assert done.output == "fine"
    assert sent.bodies[0] == sent.bodies[1]


@WIRES
async def test_a_parser_of_one_s_own_hides_no_broken_body(wire: str) -> None:
    """It gets the SDK's object; a body that makes none is the provider's fault there too."""
    failure = await failure_of(wire, http(b'{"cut": '), response_parser=lambda response: 1)
    assert failure.kind is K.UNKNOWN


async def test_a_base_url_of_a_web_site_is_called_so_once_nothing_else_ever_came() -> None:
    """The first page may be a passing fault; the next ones fail their rows at one call each."""
    page = http(b"<html>Welcome</html>", type_="text/html")
    sent = Sent(page)
    async with calling("openai", sent) as strategy:
        kinds = []
        for _ in range(3):
            with pytest.raises(ProviderError) as caught:
                await strategy.execute("p", 1, 9)
            kinds.append(caught.value.kind)
        assert kinds == [K.UNKNOWN, K.INVALID_REQUEST, K.INVALID_REQUEST]
        assert "base URL" in str(caught.value)
        sent.replies = [http(good("openai")), page]
        await strategy.execute("p", 1, 9)
        for _ in range(3):
            with pytest.raises(ProviderError) as caught:
                await strategy.execute("p", 1, 9)
        assert caught.value.kind is K.UNKNOWN


# -- answers that did not come to their end


@pytest.mark.parametrize(
    ("wire", "finish", "kind"),
    [
        ("openai", "error", K.UNKNOWN),
        ("openai", "abort", K.UNKNOWN),
        ("openai", "a reason still to come", K.UNKNOWN),
        ("openai", 5, K.UNKNOWN),
        ("openai", "tool_calls", K.UNKNOWN),
        ("openai", "length", K.TRUNCATED),
        ("openai", "Length ", K.TRUNCATED),
        ("gemini", "max_tokens", K.TRUNCATED),
        ("openai", "content_filter", K.CONTENT_BLOCKED),
        ("gemini", "OTHER", K.UNKNOWN),
        ("gemini", "MALFORMED_FUNCTION_CALL", K.UNKNOWN),
        ("gemini", "CONTINUATION", K.UNKNOWN),
        ("gemini", "A_REASON_STILL_TO_COME", K.UNKNOWN),
        ("gemini", "FINISH_REASON_UNSPECIFIED", K.UNKNOWN),
        ("gemini", "MAX_TOKENS", K.TRUNCATED),
        ("gemini", "SAFETY", K.CONTENT_BLOCKED),
    ],
)
async def test_only_an_answer_that_came_to_its_end_is_one(wire: str, finish: Any, kind: K) -> None:
    """Partial text is no success, and its tokens are counted."""
    failure = await failure_of(wire, http(good(wire, "par", finish)))
    assert failure.kind is kind
    assert failure.usage.total_tokens == 5


@WIRES
async def test_an_answer_without_an_end_is_none(wire: str) -> None:
    """Nobody knows whether it is whole."""
    body = good(wire)
    body[{"openai": "choices", "gemini": "candidates"}[wire]][0].update(
        finish_reason=None, finishReason=None
    )
    assert (await failure_of(wire, http(body))).kind is K.UNKNOWN


@pytest.mark.parametrize(
    ("wire", "finish"),
    [
        ("openai", "stop"),
        ("openai", "STOP"),
        ("openai", " stop "),
        ("openai", "eos_token"),
        ("gemini", "STOP"),
        ("gemini", "stop"),
    ],
)
async def test_the_finish_reason_stands_in_the_result(wire: str, finish: str) -> None:
    """As README shows it."""
    async with calling(wire, Sent(http(good(wire, "fine", finish)))) as strategy:
        done = as_completion(await strategy.execute("p", 1, 9))
    assert (done.output, done.metadata["finish_reason"]) == ("fine", finish)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"text": "x"}],
        ["x"],
        [{"type": "text", "text": ""}, {"type": "output_text", "text": "x"}, None, {"text": 5}],
    ],
)
async def test_of_an_answer_in_parts_the_text_is_the_output(content: Any) -> None:
    """What the model thought is none of it."""
    async with calling("openai", Sent(http(good("openai", content)))) as strategy:
        assert as_completion(await strategy.execute("p", 1, 9)).output == "x"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ([{"type": "thinking", "thinking": "hm"}], K.UNKNOWN),
        ([{"type": "refusal", "refusal": "no"}], K.CONTENT_BLOCKED),
        ({"a": 1}, K.UNKNOWN),
        (5, K.UNKNOWN),
    ],
)
async def test_parts_without_text_are_no_answer(content: Any, kind: K) -> None:
    """Never their `str()`."""
    assert (await failure_of("openai", http(good("openai", content)))).kind is kind


@WIRES
@pytest.mark.parametrize("text", ["", " \n", "\u3000"])
async def test_a_blank_text_is_no_answer(wire: str, text: str) -> None:
    """It is asked again, and its tokens are counted."""
    failure = await failure_of(wire, http(good(wire, text)))
    assert (failure.kind, failure.usage.total_tokens) == (K.UNKNOWN, 5)


# -- error bodies of all shapes


@WIRES
@pytest.mark.parametrize(
    ("body", "type_", "words"),
    [
        ({"error": "model not found, try pulling it first"}, JSON, "try pulling it first"),
        ({"detail": "Not Found here"}, JSON, "Not Found here"),
        ({"detail": [{"loc": ["body", "model"], "msg": "field required"}]}, JSON, "field required"),
        ({"errors": [{"message": "one"}, {"message": "two"}]}, JSON, "one; two"),
        ({"errors": ["plain"]}, JSON, "plain"),
        ([{"error": {"message": "in a list", "code": 404}}], JSON, "in a list"),
        ({"object": "error", "message": "as vLLM says it"}, JSON, "as vLLM says it"),
        (b"just a text", "text/plain", "just a text"),
        (b"a text called JSON", JSON, "a text called JSON"),
        (
            b"<html><style>p {}</style><h1>404</h1>\n\n<p>Nothing here</p></html>",
            "text/html",
            "404 Nothing here",
        ),
    ],
)
async def test_an_error_body_of_any_shape_is_shown(
    wire: str, body: Any, type_: str, words: str
) -> None:
    """Never just "Error code: 404"."""
    failure = await failure_of(wire, http(body, 404, type_))
    assert failure.kind is K.INVALID_REQUEST
    assert words in failure.message
    assert "<" not in failure.message


async def test_an_error_that_quotes_the_prompt_in_other_fields_shows_none_of_them() -> None:
    """Only what is written for a person is shown."""
    error = {"code": 403, "message": "flagged", "metadata": {"flagged_input": "SECRET"}}
    failure = await failure_of("openai", http({"error": error}, 403))
    assert "flagged" in failure.message
    assert "SECRET" not in failure.message


async def test_gemini_s_errors_are_understood_in_openai_s_format() -> None:
    """They come in a list, with google.rpc's details."""
    info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
    wrong = [{"error": {"code": 400, "message": "API key not valid.", "details": [info]}}]
    failure = await failure_of("openai", http(wrong, 400))
    assert failure.kind is K.AUTHENTICATION
    slow = [{"error": {"code": 429, "message": "x", "details": [retry_info("12.5s")]}}]
    failure = await failure_of("openai", http(slow, 429))
    assert (failure.kind, failure.retry_after) == (K.RATE_LIMITED, 12.5)


@WIRES
async def test_both_ends_of_a_long_message_are_kept(wire: str) -> None:
    """The reason stands last."""
    body = {"error": {"message": "Provider returned an error: " + "x " * 900 + "out of cheese"}}
    failure = await failure_of(wire, http(body, 400))
    assert "Provider returned" in failure.message
    assert failure.message.endswith("out of cheese")
    assert len(failure.message) < 240


@WIRES
@pytest.mark.parametrize(
    ("status", "kind"), [(502, K.OVERLOADED), (429, K.RATE_LIMITED), (401, K.AUTHENTICATION)]
)
async def test_an_error_body_that_is_falsely_called_json_keeps_its_status(
    wire: str, status: int, kind: K
) -> None:
    """Proxies do that."""
    failure = await failure_of(wire, http(b"Bad gateway", status, headers={"Retry-After": "4"}))
    assert (failure.kind, failure.retry_after) == (kind, 4.0)


@WIRES
@pytest.mark.parametrize(
    "reply",
    [
        b"HTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 40_000 + b"\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"",
    ],
    ids=["status line", "header", "chunk", "cut", "nothing"],
)
async def test_an_answer_that_is_no_http_is_a_broken_connection(wire: str, reply: bytes) -> None:
    """No server said "400"."""
    async with calling(wire, Sent(reply)) as strategy:
        with pytest.raises(Exception) as caught:
            await strategy.execute("p", 1, 9)
    assert classify_for(strategy, caught.value).kind is K.CONNECTION


# -- a 403


@WIRES
@pytest.mark.parametrize(
    ("body", "type_", "kind"),
    [
        (b"<html><h1>Sorry, you have been blocked</h1></html>", "text/html", K.CONTENT_BLOCKED),
        ({"error": {"message": "Your input was flagged"}}, JSON, K.CONTENT_BLOCKED),
        (b"", "text/plain", K.CONTENT_BLOCKED),
        ({"error": {"message": "Your API key has no access"}}, JSON, K.AUTHENTICATION),
        ({"error": {"message": "Key limit exceeded"}}, JSON, K.AUTHENTICATION),
        ({"message": "The security token is invalid"}, JSON, K.AUTHENTICATION),
    ],
)
async def test_a_403_is_about_its_row_unless_it_speaks_of_the_key(
    wire: str, body: Any, type_: str, kind: K
) -> None:
    """A moderation or a firewall's page must not stop the batch."""
    assert (await failure_of(wire, http(body, 403, type_))).kind is kind


# -- the same by way of PydanticAI


def complete(wire: str, finish: str) -> dict[str, Any]:
    """With all the fields that PydanticAI wants."""
    body = good(wire, "par", finish)
    if wire == "openai":
        body |= {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
        body["choices"][0] |= {"index": 0}
        body["choices"][0]["message"] |= {"role": "assistant"}
        body["usage"]["total_tokens"] = 5
    return body


@WIRES
@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (http(b""), K.UNKNOWN),
        (http(b"<html></html>", type_="text/html"), K.UNKNOWN),
        (http(b"[1]"), K.UNKNOWN),
        (http({"choices": [None], "candidates": [None]}), K.UNKNOWN),
        (http({"choices": "abc", "candidates": 5}), K.UNKNOWN),
        ("MALFORMED_FUNCTION_CALL", K.UNKNOWN),
        ("OTHER", K.UNKNOWN),
        ({"openai": "length", "gemini": "MAX_TOKENS"}, K.TRUNCATED),
        ({"openai": "content_filter", "gemini": "SAFETY"}, K.CONTENT_BLOCKED),
        ({"openai": "stop", "gemini": "STOP"}, None),
    ],
)
async def test_pydantic_ai_s_words_do_not_hide_whose_fault_it_was(
    wire: str, reply: Any, kind: K | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken body or end is asked again with the same prompt; only a wrong answer is fed back."""
    pytest.importorskip("pydantic_ai", reason="the pydantic-ai extra is not installed")
    finish = reply[wire] if isinstance(reply, dict) else reply
    sent = Sent(http(complete(wire, finish)) if isinstance(finish, str) else finish)
    server = await asyncio.start_server(sent.handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", url)
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    registry = Registry(ProcessResources(settings=Settings(openai_base_url=f"{url}/v1")))
    strategy = await registry.get(StrategySpec(name="pydantic-ai", params={"model": f"{wire}:m"}))
    await registry.prepare(strategy)
    state, failure, done = RetryState(), None, None
    try:
        done = as_completion(await strategy.execute("p", 1, 9, state))
    except Exception as error:
        await strategy.on_error(error, 1, state)
        failure = classify_for(strategy, error)
    await registry.close()
    server.close()
    assert not state
    if failure is not None:
        assert failure.kind is kind
    else:
        assert done is not None
        assert kind is None
        assert (done.output, done.metadata) == ("par", {"finish_reason": finish})


# -- whole answers in an unusual wrapping


@WIRES
@pytest.mark.parametrize("status", [201, 203, 206])
async def test_a_whole_answer_of_another_2xx_is_an_answer(wire: str, status: int) -> None:
    """It is paid for: asking again would pay twice."""
    async with calling(wire, Sent(http(good(wire), status))) as strategy:
        assert as_completion(await strategy.execute("p", 1, 9)).output == "fine"


@pytest.mark.parametrize(
    ("encoding", "declared"),
    [("utf-16", ""), ("utf-16-le", ""), ("utf-32", ""), ("latin-1", "ISO-8859-1")],
)
async def test_an_answer_in_another_encoding_is_read(encoding: str, declared: str) -> None:
    """By its zeros, or as its header says."""
    body = json.dumps(good("openai", "schön"), ensure_ascii=False).encode(encoding)
    type_ = f"{JSON}; charset={declared}" if declared else JSON
    async with calling("openai", Sent(http(body, type_=type_))) as strategy:
        assert as_completion(await strategy.execute("p", 1, 9)).output == "schön"


@WIRES
async def test_an_error_in_words_alone_is_understood(wire: str) -> None:
    """A 200 that says `rate limit` is one."""
    assert (await failure_of(wire, http({"error": "rate limit"}))).kind is K.RATE_LIMITED
