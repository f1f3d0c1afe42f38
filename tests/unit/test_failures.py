"""Which kind of failure an exception is, and which tokens it carries."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import math
import socket
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from batchllm_celery.errors import (
    FailureKind,
    FrameworkTimeoutError,
    ProviderError,
    TokenTrackingError,
    stack_of,
)
from batchllm_celery.models import FAILURE_POLICIES, Failure, FailurePolicy, TokenUsage
from batchllm_celery.models.failure import OUR_KINDS
from batchllm_celery.providers.openai.client import translate
from batchllm_celery.strategies import (
    CallableStrategy,
    classify,
    classify_for,
    extract_token_usage,
    stamp_usage,
)
from batchllm_celery.strategies.failures import charged, retry_after_of

K = FailureKind


class StatusError(Exception):
    def __init__(self, status: int, message: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status_code = status
        self.response = SimpleNamespace(headers=headers or {})


def named(name: str, base: type[Exception] = Exception, message: str = "") -> Exception:
    """An exception of a library that need not be installed."""
    return type(name, (base,), {})(message)


def a_validation_error() -> ValidationError:
    class Model(BaseModel):
        number: int

    with pytest.raises(ValidationError) as caught:
        Model.model_validate({"number": "x"})
    return caught.value


CASES: list[tuple[BaseException, FailureKind]] = [
    *((ProviderError("said so", kind=kind), kind) for kind in FailureKind if kind not in OUR_KINDS),
    (FrameworkTimeoutError("Framework timeout after 1.0s (limit: 1.0s)"), K.FRAMEWORK_TIMEOUT),
    (asyncio.CancelledError(), K.CANCELLED),
    (StatusError(400), K.INVALID_REQUEST),
    (StatusError(401), K.AUTHENTICATION),
    (StatusError(402), K.BILLING),
    (StatusError(403), K.CONTENT_BLOCKED),
    (StatusError(403, "Sorry, you have been blocked"), K.CONTENT_BLOCKED),
    (StatusError(403, "Your API key lacks the scope"), K.AUTHENTICATION),
    (StatusError(403, "invalid credentials"), K.AUTHENTICATION),
    (StatusError(403, "The access token has expired"), K.AUTHENTICATION),
    (StatusError(404), K.INVALID_REQUEST),
    (StatusError(408), K.PROVIDER_TIMEOUT),
    (StatusError(409), K.OVERLOADED),
    (StatusError(422), K.INVALID_REQUEST),
    (StatusError(429), K.RATE_LIMITED),
    (StatusError(500), K.OVERLOADED),
    (StatusError(502), K.OVERLOADED),
    (StatusError(503), K.OVERLOADED),
    (StatusError(504), K.PROVIDER_TIMEOUT),
    (StatusError(529), K.OVERLOADED),
    (StatusError(599), K.UNKNOWN),
    # status before text
    (StatusError(400, "see RFC 429 about rate limit quota timeout"), K.INVALID_REQUEST),
    (StatusError(500, "429 connection"), K.OVERLOADED),
    # types
    (a_validation_error(), K.VALIDATION),
    (json.JSONDecodeError("no", "", 0), K.VALIDATION),
    (named("UnexpectedModelBehavior"), K.VALIDATION),
    (TimeoutError("the provider's own"), K.PROVIDER_TIMEOUT),
    (named("ReadTimeout", type("TimeoutException", (Exception,), {})), K.PROVIDER_TIMEOUT),
    (named("ServerTimeoutError", TimeoutError), K.PROVIDER_TIMEOUT),
    (named("APITimeoutError", type("APIConnectionError", (Exception,), {})), K.PROVIDER_TIMEOUT),
    (named("APIConnectionError"), K.CONNECTION),
    (named("ConnectError", type("TransportError", (Exception,), {})), K.CONNECTION),
    (named("ServerDisconnectedError"), K.CONNECTION),
    (ConnectionResetError(), K.CONNECTION),
    (socket.gaierror(-2, "unknown host"), K.CONNECTION),
    # "Expected 4290 tokens" is neither a 429 nor worth another try
    (ValueError("Expected 4290 tokens"), K.LOGIC_ERROR),
    (ValueError("429 rate limit quota connection timeout"), K.LOGIC_ERROR),
    (TypeError(), K.LOGIC_ERROR),
    (AttributeError(), K.LOGIC_ERROR),
    (KeyError("x"), K.LOGIC_ERROR),
    (IndexError(), K.LOGIC_ERROR),
    (NameError(), K.LOGIC_ERROR),
    (ZeroDivisionError(), K.LOGIC_ERROR),
    (AssertionError(), K.LOGIC_ERROR),
    (NotImplementedError(), K.LOGIC_ERROR),
    # text, last
    (Exception("429 RESOURCE_EXHAUSTED"), K.RATE_LIMITED),
    (RuntimeError("Rate limit exceeded"), K.RATE_LIMITED),
    (Exception("Expected 4290 tokens"), K.UNKNOWN),
    (Exception("the model is overloaded"), K.OVERLOADED),
    (Exception("request timed out"), K.PROVIDER_TIMEOUT),
    (Exception("Connection refused"), K.CONNECTION),
    (Exception("something else"), K.UNKNOWN),
]


@pytest.mark.parametrize(("error", "kind"), CASES, ids=lambda value: repr(value)[:60])
def test_every_exception_has_one_kind(error: BaseException, kind: FailureKind) -> None:
    """Status codes come before types, types before text."""
    assert classify(error).kind is kind


def test_the_message_names_the_provider_s_own_exception() -> None:
    """A translated error is shown under the SDK's name. Of a long message both ends are kept,
    because many put the reason last."""
    error = ProviderError("a" * 150 + "b" * 350 + "the reason", error_type="ClientError")
    kept = "a" * 120 + " .. " + "b" * 66 + "the reason"
    assert classify(error).message == f"ClientError: {kept}"
    assert len(kept) == 200
    translated = ProviderError("down")
    translated.__cause__ = OSError("cause")
    assert classify(translated).message == "OSError: down"


@pytest.mark.parametrize(
    "error",
    [
        ProviderError("x", error_type="\x1b]0;" + "a" * 5000),
        type("\u202e" + "a" * 5000, (Exception,), {})("x"),
        ProviderError("x", error_type=5),  # type: ignore[arg-type]
    ],
)
def test_the_name_of_an_error_s_type_is_shown_as_its_text_is(error: Exception) -> None:
    """Short and printable: some libraries make it of what a server said."""
    message = classify(error).message
    assert message.endswith(": x")
    assert message.isprintable()
    assert len(message) < 110


def test_a_key_in_a_provider_s_message_is_blanked() -> None:
    """OpenAI's 401 quotes the key that it refused; a result must not."""
    message = classify(Exception("Incorrect API key provided: sk-abc123***9Xyz. See docs")).message
    assert "sk-" not in message
    assert "[key]" in message


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "17"}, 17.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "inf"}, None),
        ({"Retry-After": "2"}, 2.0),
    ],
)
def test_retry_after_is_read_in_every_form(headers: dict[str, str], seconds: float | None) -> None:
    """Milliseconds are the finer word; nonsense counts as absent."""
    assert retry_after_of(headers) == seconds
    assert classify(StatusError(429, headers=headers)).retry_after == seconds


@pytest.mark.parametrize(
    ("told", "seconds"),
    [(2.5, 2.5), (None, None), (math.inf, None), (math.nan, None), (-1.0, None)],
)
def test_a_wait_that_is_none_is_not_told(told: float | None, seconds: float | None) -> None:
    """Whatever a user's strategy has computed."""
    error = ProviderError("busy", kind=FailureKind.OVERLOADED, retry_after=told)
    assert classify(error).retry_after == seconds


def test_retry_after_may_be_a_date() -> None:
    """An HTTP date becomes the seconds until then, never less than none."""
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert retry_after_of({"retry-after": soon}) == pytest.approx(30, abs=2)
    assert retry_after_of({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0


def test_a_strategy_s_own_translator_comes_first() -> None:
    """What it returns wins; None, or an exception of its own, leaves it to the general rules."""

    async def ask(prompt: str) -> str:
        return prompt

    class Mine(CallableStrategy[str]):
        def classify(self, exception: BaseException) -> Failure | None:
            if str(exception) == "boom":
                raise RuntimeError("a translator's own bug")
            return Failure(K.BILLING, "mine") if str(exception) == "pay" else None

    strategy = Mine(ask)
    paid = stamp_usage(Exception("pay"), TokenUsage(input_tokens=3))
    assert classify_for(strategy, paid) == Failure(
        K.BILLING, "mine", None, TokenUsage(input_tokens=3)
    )
    assert classify_for(strategy, ValueError("x")).kind is K.LOGIC_ERROR
    assert classify_for(strategy, Exception("boom")).kind is K.UNKNOWN


# -- tokens


def with_usage(usage: Any) -> Exception:
    error = Exception("failed")
    error.__dict__["usage"] = usage
    return error


def caused_by_result(usage: Any) -> Exception:
    error, cause = Exception("failed"), Exception("cause")
    cause.__dict__["result"] = SimpleNamespace(usage=lambda: usage)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        stamp_usage(ValueError("x"), TokenUsage(input_tokens=10, output_tokens=5)),
        ProviderError("x", usage={"input_tokens": 10, "output_tokens": 5}),
        TokenTrackingError("x", {"input_tokens": 10, "output_tokens": 5}),
        with_usage({"request_tokens": 10, "response_tokens": 5}),
        with_usage(SimpleNamespace(prompt_tokens=10, completion_tokens=5)),
        with_usage(lambda: SimpleNamespace(input_tokens=10, output_tokens=5)),
        caused_by_result(SimpleNamespace(request_tokens=10, response_tokens=5, total_tokens=15)),
    ],
    ids=str,
)
def test_tokens_of_a_failed_attempt_are_found(error: Exception) -> None:
    """However an exception carries its tokens, all 15 are counted."""
    assert extract_token_usage(error).total_tokens == 15
    assert classify(error).usage == TokenUsage(input_tokens=10, output_tokens=5)


def test_the_stamp_outranks_what_the_exception_says() -> None:
    """Ours was read from the answer itself."""
    error = with_usage({"input_tokens": 1})
    stamp_usage(error, TokenUsage(input_tokens=10))
    assert extract_token_usage(error).input_tokens == 10


def test_extraction_never_raises_and_says_why_it_found_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A broken usage object gives zeros and one DEBUG line."""

    def broken() -> None:
        raise RuntimeError("no usage here")

    caplog.set_level(logging.DEBUG, logger="batchllm_celery")
    assert extract_token_usage(with_usage(broken)).total_tokens == 0
    assert caplog.messages == [
        "Failed to extract token usage from Exception: no usage here. Returning 0 tokens. "
        "This is normal for non-LLM exceptions."
    ]


def test_an_exception_that_can_t_be_stamped_is_wrapped() -> None:
    """`TokenTrackingError` carries the tokens, and is classified as what it stands for."""

    class Slotted(ValueError):
        def __getattribute__(self, name: str) -> Any:
            if name == "__dict__":
                raise AttributeError(name)  # as of an exception written in C
            return super().__getattribute__(name)

    with pytest.raises(TokenTrackingError) as caught, charged(TokenUsage(input_tokens=7)):
        raise Slotted("parse")
    failure = classify(caught.value)
    assert (failure.kind, failure.usage.input_tokens) == (K.LOGIC_ERROR, 7)
    assert failure.message == "Slotted: parse"


# -- the table in the docs


def yes(value: bool) -> str:
    return "yes" if value else "no"


def row(kind: FailureKind, policy: FailurePolicy) -> tuple[str, ...]:
    wait = "at once" if policy.retried and not policy.waits else yes(policy.retried)
    return (
        f"`{kind.value}`",
        wait,
        yes(policy.uses_attempt),
        yes(kind is FailureKind.RATE_LIMITED),
        yes(policy.stops_batch),
    )


def test_the_docs_show_the_table_that_the_code_follows() -> None:
    """docs/failures.md and FAILURE_POLICIES say the same of every kind."""
    text = (Path(__file__).parents[2] / "docs" / "failures.md").read_text()
    cells = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    shown = {line[0]: (line[0], *line[2:6]) for line in cells}
    assert set(FAILURE_POLICIES) == set(FailureKind)
    assert shown == {f"`{kind.value}`": row(kind, one) for kind, one in FAILURE_POLICIES.items()}


class ServiceError(Exception):
    """As botocore's ClientError: what the service said is a dict."""

    def __init__(self, code: str, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(f"An error occurred ({code}) when calling the Converse operation")
        metadata = {"HTTPStatusCode": status, "HTTPHeaders": headers or {}}
        self.response = {"Error": {"Code": code}, "ResponseMetadata": metadata}


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("ThrottlingException", 429, K.RATE_LIMITED),
        ("ThrottlingException", 400, K.RATE_LIMITED),
        ("ServiceUnavailableException", 503, K.OVERLOADED),
        ("ModelTimeoutException", 408, K.PROVIDER_TIMEOUT),
        ("ModelErrorException", 424, K.OVERLOADED),
        ("ExpiredTokenException", 403, K.AUTHENTICATION),
        ("AccessDeniedException", 403, K.AUTHENTICATION),
        ("ValidationException", 400, K.INVALID_REQUEST),
        ("InternalServerException", 500, K.OVERLOADED),
    ],
)
def test_an_aws_error_is_read_by_its_code_then_its_status(code: str, status: int, kind: K) -> None:
    """Its status is in a dict; some throttlings have the status 400."""
    failure = classify(ServiceError(code, status, {"retry-after": "6"}))
    assert (failure.kind, failure.retry_after) == (kind, 6.0)


class RpcError(Exception):
    """As grpc's: the code is an enum that a method answers."""

    def __init__(self, name: str) -> None:
        super().__init__("the channel's words")
        self.name = name

    def code(self) -> Any:
        return SimpleNamespace(name=self.name, value=(8, self.name.lower()))


class ApiCallError(Exception):
    """As google.api_core's: the code is an `HTTPStatus`."""

    code = HTTPStatus.TOO_MANY_REQUESTS


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("RESOURCE_EXHAUSTED", K.RATE_LIMITED),
        ("UNAVAILABLE", K.OVERLOADED),
        ("DEADLINE_EXCEEDED", K.PROVIDER_TIMEOUT),
        ("UNAUTHENTICATED", K.AUTHENTICATION),
        ("PERMISSION_DENIED", K.CONTENT_BLOCKED),
        ("INVALID_ARGUMENT", K.INVALID_REQUEST),
        ("CANCELLED", K.CONNECTION),
        ("A_CODE_STILL_TO_COME", K.UNKNOWN),
    ],
)
def test_a_grpc_code_is_read_as_the_http_status_that_means_it(name: str, kind: K) -> None:
    """google.rpc.Code says which."""
    assert classify(RpcError(name)).kind is kind
    assert classify(ApiCallError("slow down")).kind is K.RATE_LIMITED


def test_an_answer_that_is_no_http_is_a_broken_connection() -> None:
    """aiohttp says "400" of it; the standard library and requests have words of their own."""
    from aiohttp import ClientResponseError, http_exceptions

    request: Any = SimpleNamespace(real_url="http://server")
    broken = ClientResponseError(request, (), status=400, message="Bad status line")
    broken.__cause__ = http_exceptions.BadStatusLine("HTP/1.1")
    said = ClientResponseError(request, (), status=400, message="Bad Request")
    assert classify(broken).kind is K.CONNECTION
    assert classify(said).kind is K.INVALID_REQUEST
    assert classify(http.client.BadStatusLine("HTP/1.1")).kind is K.CONNECTION
    assert classify(http.client.IncompleteRead(b"")).kind is K.CONNECTION


@pytest.mark.parametrize("kind", ["cancelled", K.ABORTED, "budget", K.EXHAUSTED, "skipped"])
def test_a_call_can_not_end_as_what_only_we_decide(kind: str) -> None:
    """Such an outcome of a batch that goes on would be refused, and the item called again."""
    failure = classify(ProviderError("it said so", kind=kind))
    assert failure.kind is K.LOGIC_ERROR
    assert "it said so" in failure.message


class Leaving(Exception):
    """One that can't be looked at without leaving."""

    @property
    def status_code(self) -> int:
        raise SystemExit(3)


class LeavingWithUsage(Exception):
    @property
    def usage(self) -> object:
        raise KeyboardInterrupt


@pytest.mark.parametrize("error", [Leaving("x"), LeavingWithUsage("x")])
def test_looking_at_an_exception_ends_nothing(error: Exception) -> None:
    """A property that raises SystemExit ended the worker's loop."""
    assert classify(error).kind in (K.LOGIC_ERROR, K.UNKNOWN)


def test_a_translator_that_leaves_is_passed_over() -> None:
    """`sys.exit()` in `classify` ends no worker."""

    class Quitting(CallableStrategy[str]):
        def classify(self, exception: BaseException) -> Failure | None:
            raise SystemExit(3)

    async def call(prompt: str) -> str:
        return prompt

    assert classify_for(Quitting(call), TimeoutError()).kind is K.PROVIDER_TIMEOUT


def _caused_by_itself(error: BaseException, other: BaseException | None = None) -> BaseException:
    error.__cause__ = error if other is None else other
    if other is not None:
        other.__cause__ = error
    return error


@pytest.mark.parametrize(
    "error",
    [
        _caused_by_itself(RuntimeError("x")),  # `raise error from error`
        _caused_by_itself(RuntimeError("x"), OSError("y")),
        _caused_by_itself(ExceptionGroup("x", [OSError("y")])),
    ],
)
def test_causes_in_a_circle_come_to_an_end(error: BaseException) -> None:
    """The worker's loop stood still for ever."""
    assert classify(error).usage.total_tokens == 0
    assert stack_of(error)
    assert translate(error) is None


REFUSED = StatusError(429, headers={"retry-after": "7"})


def _wrapped(cause: BaseException, words: str = "call failed") -> Exception:
    try:
        raise RuntimeError(words) from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "kind", "wait"),
    [
        (ExceptionGroup("a TaskGroup", [REFUSED]), K.RATE_LIMITED, 7),
        (ExceptionGroup("x", [ExceptionGroup("y", [REFUSED]), ValueError()]), K.RATE_LIMITED, 7),
        (_wrapped(REFUSED), K.RATE_LIMITED, 7),
        (_wrapped(ExceptionGroup("x", [REFUSED])), K.RATE_LIMITED, 7),
        (_wrapped(ValueError("a bug")), K.UNKNOWN, None),
        (_wrapped(REFUSED, "the model is overloaded"), K.OVERLOADED, None),
    ],
)
def test_groups_and_wrappers_are_what_is_in_them(error: Exception, kind: K, wait: float) -> None:
    """A client that calls in a TaskGroup, or wraps what went wrong, hides no refusal."""
    failure = classify(error)
    assert (failure.kind, failure.retry_after) == (kind, wait)


def test_the_tokens_of_a_call_in_a_group_count() -> None:
    """The call was paid for, whatever it ran in."""
    spent = ProviderError("no use", usage={"input_tokens": 3, "output_tokens": 2})
    assert extract_token_usage(ExceptionGroup("x", [spent])).total_tokens == 5


def test_a_message_of_megabytes_is_searched_in_no_time() -> None:
    """It held the process for a minute."""
    started = time.process_time()
    assert classify(RuntimeError("x" * 50_000_000)).kind is K.UNKNOWN
    assert time.process_time() - started < 5


def _in_a_circle(depth: int) -> TokenTrackingError:
    errors = [TokenTrackingError("x", {"input_tokens": 5}) for _ in range(depth)]
    for error, cause in zip(errors, [*errors[1:], errors[0]], strict=True):
        error.__cause__ = cause
    return errors[0]


@pytest.mark.parametrize("depth", [1, 2, 30])
def test_a_stand_in_that_is_its_own_cause_ends(depth: int) -> None:
    """It is one failure, with its tokens."""
    failure = classify(_in_a_circle(depth))
    assert failure.usage.total_tokens == 5


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\u202eb", "x" * 5000, 5, object()])
def test_the_name_of_an_error_is_shown_safely(name: Any) -> None:
    """A strategy may have it from the provider: no control characters, no end in sight."""
    message = classify(ProviderError("it failed", error_type=name)).message
    assert message.isprintable()
    assert len(message) < 400
    assert "it failed" in message


@pytest.mark.parametrize("error", [ValueError, SystemExit, OSError])
def test_a_classify_that_fails_leaves_its_place_in_the_log_and_not_its_text(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """Its text may quote the prompt."""

    class Own(CallableStrategy[Any]):
        def classify(self, exception: BaseException) -> Failure | None:
            raise error(f"the prompt was: {exception}")

    strategy = Own(_answer)
    assert classify_for(strategy, ValueError("a secret")).kind is FailureKind.LOGIC_ERROR
    assert "in classify" in caplog.text
    assert "secret" not in caplog.text


async def _answer(prompt: str) -> str:
    return prompt
