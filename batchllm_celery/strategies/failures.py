"""Which kind of failure an exception is, and which tokens it spent: the general rules.

Status codes come before types, types before text: "Expected 4290 tokens" is not a 429.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import socket
import ssl
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from batchllm_celery.errors import (
    ERROR_MESSAGE_MAX_LENGTH,
    FailureKind,
    FrameworkTimeoutError,
    ProviderError,
    TokenTrackingError,
    describe,
)
from batchllm_celery.models import NO_TOKENS, Failure, TokenUsage

if TYPE_CHECKING:
    from batchllm_celery.strategies.base import LLMCallStrategy

logger = logging.getLogger("batchllm_celery")

_STAMP = "_failed_token_usage"
_MODEL_STAMP = "_priced_as"

_STATUS_KINDS = {
    401: FailureKind.AUTHENTICATION,
    402: FailureKind.BILLING,
    403: FailureKind.AUTHENTICATION,
    408: FailureKind.PROVIDER_TIMEOUT,
    409: FailureKind.OVERLOADED,  # OpenAI: could not take a lock; its own SDK retries it
    425: FailureKind.OVERLOADED,
    429: FailureKind.RATE_LIMITED,
    499: FailureKind.CONNECTION,
    500: FailureKind.OVERLOADED,
    501: FailureKind.INVALID_REQUEST,
    502: FailureKind.OVERLOADED,
    503: FailureKind.OVERLOADED,
    504: FailureKind.PROVIDER_TIMEOUT,
    522: FailureKind.CONNECTION,
    524: FailureKind.PROVIDER_TIMEOUT,
    529: FailureKind.OVERLOADED,
}

# By name, because the libraries may not be installed, and must not be imported for this.
_VALIDATION_NAMES = {
    "ValidationError",
    "JSONDecodeError",
    "UnexpectedModelBehavior",
    "OutputParserException",
}
_TIMEOUT_NAMES = {"TimeoutException", "APITimeoutError", "ServerTimeoutError", "ReadTimeoutError"}
_CONNECTION_NAMES = {
    "APIConnectionError",
    "TransportError",  # httpx
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "ClientOSError",
    "ServerDisconnectedError",
}
_LOGIC_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    NameError,
    ArithmeticError,
    AssertionError,
    ImportError,
    NotImplementedError,
    RecursionError,
)
# Last resort, for exceptions whose type says nothing. Whole words only.
_TEXTS = (
    (
        re.compile(r"\b429\b|resource_exhausted|rate[ _-]?limit|too many requests|\bquota\b", re.I),
        FailureKind.RATE_LIMITED,
    ),
    (re.compile(r"\b503\b|\boverloaded\b|service unavailable", re.I), FailureKind.OVERLOADED),
    (re.compile(r"\btime(d )?[ -]?out\b", re.I), FailureKind.PROVIDER_TIMEOUT),
    (re.compile(r"\bconnection\b", re.I), FailureKind.CONNECTION),
)


def classify(exception: BaseException) -> Failure:
    """Turn any exception into a `Failure` by the general rules; never raises."""
    if isinstance(exception, TokenTrackingError) and exception.__cause__ is not None:
        failure = classify(exception.__cause__)
        return Failure(
            failure.kind, failure.message, failure.retry_after, TokenUsage.of(exception.usage)
        )
    return Failure(
        kind=_kind(exception),
        message=_message(exception),
        retry_after=_retry_after(exception),
        usage=extract_token_usage(exception),
    )


def classify_for(strategy: LLMCallStrategy[Any], exception: BaseException) -> Failure:
    """What the strategy's own translator says, else the general rules.

    A translator that raises is logged and passed over. One that gives no tokens does not hide
    those which the exception carries.
    """
    try:
        failure = strategy.classify(exception)
    except Exception as error:
        logger.warning("classify_failed error=%s", describe(error))
        failure = None
    if failure is None:
        failure = classify(exception)
        if failure.kind in (FailureKind.LOGIC_ERROR, FailureKind.UNKNOWN):
            log_bug(type(strategy).__name__, exception)
        return failure
    if failure.usage:
        return failure
    usage = extract_token_usage(exception)
    return Failure(failure.kind, failure.message, failure.retry_after, usage)


#: The same bug is logged again after so many seconds; of so many bugs each process keeps count.
BUG_SECONDS = 60.0
MOST_BUGS = 100
_bugs: dict[tuple[str, str, int | None], float] = {}


def log_bug(name: str, exception: BaseException) -> None:
    """Log where user code failed, at ERROR, once a minute for each place.

    The exception's own text stands in the item's result: here it might quote a prompt or a key.
    """
    frames = traceback.extract_tb(exception.__traceback__)
    last = frames[-1] if frames else None
    bug = (type(exception).__name__, last.filename if last else "", last.lineno if last else None)
    now = time.monotonic()
    if now - _bugs.get(bug, -math.inf) < BUG_SECONDS or (
        bug not in _bugs and len(_bugs) >= MOST_BUGS
    ):
        return
    _bugs[bug] = now
    stack = "".join(traceback.format_list(frames[-10:]))[-4000:]
    logger.error(
        "strategy.bug strategy=%s error=%s\nTraceback (most recent call last):\n%s%s",
        *(name, bug[0], stack, bug[0]),
    )


def kind_of_status(status: int) -> FailureKind:
    """The failure kind of an HTTP status of 400 or more."""
    default = FailureKind.INVALID_REQUEST if status < 500 else FailureKind.UNKNOWN
    return _STATUS_KINDS.get(status, default)


def _kind(exception: BaseException) -> FailureKind:
    if isinstance(exception, ProviderError):
        return exception.kind
    if isinstance(exception, FrameworkTimeoutError):
        return FailureKind.FRAMEWORK_TIMEOUT
    if isinstance(exception, asyncio.CancelledError):
        return FailureKind.CANCELLED
    status = _status(exception)
    if status is not None:
        return kind_of_status(status)
    return _kind_of_type(exception) or _kind_of_text(str(exception))


def _kind_of_type(exception: BaseException) -> FailureKind | None:
    names = {cls.__name__ for cls in type(exception).__mro__}
    if names & _VALIDATION_NAMES:
        return FailureKind.VALIDATION
    if isinstance(exception, TimeoutError) or names & _TIMEOUT_NAMES:
        return FailureKind.PROVIDER_TIMEOUT
    if isinstance(exception, ConnectionError | socket.gaierror | ssl.SSLError):
        return FailureKind.CONNECTION
    if names & _CONNECTION_NAMES:
        return FailureKind.CONNECTION
    if isinstance(exception, _LOGIC_ERRORS):
        return FailureKind.LOGIC_ERROR
    return None


def _kind_of_text(text: str) -> FailureKind:
    for pattern, kind in _TEXTS:
        if pattern.search(text):
            return kind
    return FailureKind.UNKNOWN


def _status(exception: BaseException) -> int | None:
    response = getattr(exception, "response", None)
    candidates = [getattr(exception, name, None) for name in ("status_code", "code", "status")]
    candidates += [getattr(response, name, None) for name in ("status_code", "status")]
    for value in candidates:
        if type(value) is int and 400 <= value <= 599:
            return value
    return None


_KEYS = re.compile(r"\b(sk-|AIza|Bearer )[\w*.-]{6,}")


def without_keys(message: str) -> str:
    """`message` with what looks like an API key blanked: OpenAI's 401 quotes the key it refused."""
    return _KEYS.sub("[key]", message)


def _message(exception: BaseException) -> str:
    if not isinstance(exception, ProviderError):
        return without_keys(describe(exception))
    shown = exception.error_type or type(exception.__cause__ or exception).__name__
    return without_keys(f"{shown}: {str(exception)[:ERROR_MESSAGE_MAX_LENGTH]}")


def _retry_after(exception: BaseException) -> float | None:
    if isinstance(exception, ProviderError):
        return _number(exception.retry_after)
    headers = getattr(getattr(exception, "response", None), "headers", None)
    return retry_after_of(headers)


def retry_after_of(headers: Mapping[str, str] | None) -> float | None:
    """Seconds to wait by `retry-after-ms` or `retry-after` (seconds or a date); None without."""
    if not headers:
        return None
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after") or headers.get("Retry-After")
    seconds = _number(text)
    return seconds if seconds is not None or not text else _seconds_until(text)


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _seconds_until(date: str) -> float | None:
    try:
        return max(0.0, parsedate_to_datetime(date).timestamp() - time.time())
    except ValueError:
        return None


# -- tokens of failed attempts


def stamp_usage(exception: Exception, usage: TokenUsage) -> Exception:
    """Make `exception` carry the tokens its call has spent; raise what this returns.

    An exception that can hold no attribute comes back inside a `TokenTrackingError`.
    """
    try:
        exception.__dict__[_STAMP] = dict(usage.items())
    except AttributeError:
        stand_in = TokenTrackingError(str(exception), dict(usage.items()))
        stand_in.__cause__ = exception
        return stand_in
    return exception


def stamp_model(exception: BaseException, model: str | None) -> None:
    """Say whose price the tokens of a failed call have, where a strategy asks several models."""
    if model is not None and hasattr(exception, "__dict__"):
        exception.__dict__[_MODEL_STAMP] = model


def priced_as(exception: BaseException) -> str | None:
    """The model that `stamp_model` named; None: the strategy's own."""
    model = getattr(exception, "__dict__", {}).get(_MODEL_STAMP)
    return model if isinstance(model, str) else None


@contextmanager
def charged(usage: TokenUsage) -> Iterator[None]:
    """Whatever is raised inside carries `usage`: the call was paid for, its answer was no use."""
    try:
        yield
    except Exception as error:
        stamped = stamp_usage(error, usage)
        if stamped is error:
            raise
        raise stamped from error


def extract_token_usage(exception: BaseException) -> TokenUsage:
    """Tokens that a failed call has spent, as its exception tells; zeros where it tells none.
    Never raises."""
    try:
        for usage in _usages(exception):
            if usage:
                return usage
    except Exception as error:
        logger.debug(
            f"Failed to extract token usage from {type(exception).__name__}: {error}. "
            "Returning 0 tokens. This is normal for non-LLM exceptions."
        )
    return NO_TOKENS


def _usages(exception: BaseException) -> Iterator[TokenUsage]:
    """Candidates, most trustworthy first: our stamp, the exception's own word, its cause's."""
    yield read_usage(getattr(exception, "__dict__", {}).get(_STAMP))
    yield read_usage(getattr(exception, "usage", None))
    cause = exception.__cause__
    if cause is not None:
        result = getattr(cause, "result", None)
        yield read_usage(getattr(result, "usage", None))
        yield extract_token_usage(cause)


_INPUT_NAMES = ("input_tokens", "request_tokens", "prompt_tokens")


def read_usage(source: Any) -> TokenUsage:
    """Read any library's usage object, mapping or method: input/output, request/response and
    prompt/completion names are understood; anything else gives zeros."""
    named = any(hasattr(source, name) for name in _INPUT_NAMES)
    value = source() if callable(source) and not named else source
    if isinstance(value, TokenUsage) or value is None:
        return TokenUsage.of(value)

    def first(*names: str) -> int:
        for name in names:
            found = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
            if found:
                return int(found)
        return 0

    return TokenUsage(
        input_tokens=first(*_INPUT_NAMES),
        output_tokens=first("output_tokens", "response_tokens", "completion_tokens"),
        total_tokens=first("total_tokens"),
        cached_input_tokens=first("cached_input_tokens", "cache_read_tokens"),
    )
