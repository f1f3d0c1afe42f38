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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from batchllm_celery.errors import (
    ERROR_MESSAGE_MAX_LENGTH,
    MOST_TYPE_CHARACTERS,
    FailureKind,
    FrameworkTimeoutError,
    ProviderError,
    TokenTrackingError,
    causes_of,
    describe,
    shown_message,
    stack_of,
    text_of,
)
from batchllm_celery.models import NO_TOKENS, Failure, TokenUsage
from batchllm_celery.models.failure import OUR_KINDS
from batchllm_celery.redaction import printable, without_secrets
from batchllm_celery.strategies.usage import read_usage

if TYPE_CHECKING:
    from batchllm_celery.strategies.base import LLMCallStrategy

logger = logging.getLogger("batchllm_celery")

#: Longest wait, in seconds, that a provider may ask for: a day, after which a day's quota is reset.
MOST_SECONDS = 86_400.0

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

#: Words of a 403 that mean who calls, not what is asked.
_OF_THE_KEY = re.compile(
    r"\b(api[_-]?)?keys?\b|\bcredentials?\b|\b(access|auth|bearer|security) token\b"
    r"|\bunregistered callers?\b|\bnot authenticated\b|\bunauthenticated\b",
    re.IGNORECASE,
)

_GRPC_STATUSES = {
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 400,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
    "UNAUTHENTICATED": 401,
}

# AWS gives some of these the status 400 or 403; the code says what it is.
_AWS_KINDS = {
    "Throttling": FailureKind.RATE_LIMITED,
    "ThrottlingException": FailureKind.RATE_LIMITED,
    "ThrottledException": FailureKind.RATE_LIMITED,
    "RequestThrottled": FailureKind.RATE_LIMITED,
    "RequestThrottledException": FailureKind.RATE_LIMITED,
    "TooManyRequestsException": FailureKind.RATE_LIMITED,
    "ProvisionedThroughputExceededException": FailureKind.RATE_LIMITED,
    "RequestLimitExceeded": FailureKind.RATE_LIMITED,
    "LimitExceededException": FailureKind.RATE_LIMITED,
    "ServiceQuotaExceededException": FailureKind.RATE_LIMITED,
    "SlowDown": FailureKind.RATE_LIMITED,
    "ModelNotReadyException": FailureKind.OVERLOADED,
    "ModelErrorException": FailureKind.OVERLOADED,
    "ModelTimeoutException": FailureKind.PROVIDER_TIMEOUT,
    "AccessDenied": FailureKind.AUTHENTICATION,
    "AccessDeniedException": FailureKind.AUTHENTICATION,
    "ExpiredToken": FailureKind.AUTHENTICATION,
    "ExpiredTokenException": FailureKind.AUTHENTICATION,
    "InvalidClientTokenId": FailureKind.AUTHENTICATION,
    "InvalidSignatureException": FailureKind.AUTHENTICATION,
    "SignatureDoesNotMatch": FailureKind.AUTHENTICATION,
    "UnrecognizedClientException": FailureKind.AUTHENTICATION,
}

#: Failures beneath a wrapper that are the provider's and not the strategy's.
_OF_A_PROVIDER = frozenset(_STATUS_KINDS.values()) | {FailureKind.CONTENT_BLOCKED}
_DEEPEST_GROUP = 5

#: What `condensed` keeps of a long message.
_HEAD, _GAP, _TAIL = 120, " .. ", 76
#: Characters of each end of a message that are searched.
_SEARCHED = 5_000

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
    "ConnectionError",  # requests; botocore has subclasses of its own
    "HTTPException",  # http.client: a broken status line, a body cut off
    "HTTPClientError",  # botocore
    "ProtocolError",  # urllib3
    "ChunkedEncodingError",
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
    if isinstance(exception, TokenTrackingError):
        causes = causes_of(exception)
        carried = next((one for one in causes if not isinstance(one, TokenTrackingError)), None)
        if carried is not None:
            return replace(classify(carried), usage=extract_token_usage(exception))
    try:
        said = _said_by(exception)
        return Failure(
            kind=_kind(said),
            message=_message(_first_of(exception)),
            retry_after=_seconds(
                said.retry_after
                if isinstance(said, ProviderError)
                else retry_after_of(_headers_of(said))
            ),
            usage=extract_token_usage(exception),
            metadata=said.metadata if isinstance(said, ProviderError) else {},
            reply=said.reply if isinstance(said, ProviderError) else None,
        )
    except BaseException as error:  # an attribute of it fails, or even leaves
        message = f"{type(exception).__name__}: it can't be looked at ({type(error).__name__})"
        return Failure(FailureKind.LOGIC_ERROR, message, usage=extract_token_usage(exception))


def _first_of(exception: BaseException) -> BaseException:
    """The first exception of a group (of a `TaskGroup`, say), else itself."""
    for _ in range(_DEEPEST_GROUP):
        if not isinstance(exception, BaseExceptionGroup):
            break
        exception = exception.exceptions[0]
    return exception


def _said_by(exception: BaseException) -> BaseException:
    """The exception that says what happened: where a wrapper's own words say nothing, the
    provider's error beneath it."""
    first = _first_of(exception)
    if isinstance(first, ProviderError) or _kind(first) is not FailureKind.UNKNOWN:
        return first
    causes = (_first_of(cause) for cause in causes_of(first) if cause is not first)
    return next((cause for cause in causes if _kind(cause) in _OF_A_PROVIDER), first)


def classify_for(strategy: LLMCallStrategy[Any], exception: BaseException) -> Failure:
    """The failure by the strategy's `classify`, else by the general rules.

    A `classify` that raises is logged and ignored. Tokens that the exception carries are kept if
    `classify` returns none.
    """
    try:
        failure = strategy.classify(exception)
        if failure is not None:
            failure = _checked(failure)
    except BaseException as error:
        log_bug("strategy.classify_failed", error, strategy=type(strategy).__name__)
        failure = None
    if failure is None:
        return classify(exception)
    message = printable(without_secrets(failure.message))
    usage = failure.usage or extract_token_usage(exception)
    return replace(failure, message=message, usage=usage)


def _checked(failure: Failure) -> Failure:
    """The result of a strategy's `classify`, with the types that the runner relies on.

    Raises:
        TypeError: if it is no `Failure`.
        ValueError: for an unknown kind.
    """
    if not isinstance(failure, Failure):
        raise TypeError(f"classify() must return a Failure or None, not {type(failure).__name__}")
    return Failure(
        _kind_for_a_call(failure.kind),
        str(failure.message),
        None if failure.retry_after is None else _seconds(failure.retry_after),
        read_usage(failure.usage),
        failure.metadata,
        failure.reply,
    )


#: Seconds until the same bug is logged again.
BUG_SECONDS = 60.0
#: Number of different bugs that a process logs; further ones are not logged.
MOST_BUGS = 100
_logged: dict[object, float] = {}


def log_bug(event: str, error: BaseException, **fields: str) -> None:
    """Log where user code (or ours) failed, at ERROR, once a minute for each place.

    The exception's own text stands in the item's result: here it might quote a prompt or a key.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    bug = (event, type(error), last and (last.tb_frame.f_code, last.tb_lineno))
    now = time.monotonic()
    known = bug in _logged
    if now - _logged.get(bug, -math.inf) < BUG_SECONDS or (not known and len(_logged) >= MOST_BUGS):
        return
    _logged[bug] = now
    words = " ".join(f"{name}={value}" for name, value in fields.items())
    logger.error("%s %s error=%s\n%s", event, words, type(error).__name__, stack_of(error))


def kind_of_status(status: int) -> FailureKind:
    """The failure kind of an HTTP status of 400 or more."""
    default = FailureKind.INVALID_REQUEST if status < 500 else FailureKind.UNKNOWN
    return _STATUS_KINDS.get(status, default)


def kind_of_refusal(status: int, words: str) -> FailureKind:
    """The failure kind of an error status with what the provider said.

    A 403 that speaks of the key would meet every item. Any other one (a moderation or a firewall's
    page) is about this request; the item runner notices when all get one.
    """
    if status == 403 and not _OF_THE_KEY.search(words):
        return FailureKind.CONTENT_BLOCKED
    return kind_of_status(status)


def status_of(exception: BaseException) -> int | None:
    """The HTTP status (400 to 599) that an exception carries; None where it carries none."""
    if isinstance(exception, ProviderError):
        return exception.status
    return _status(exception)


def _kind(exception: BaseException) -> FailureKind:
    if isinstance(exception, ProviderError):
        return _named_kind(exception) or FailureKind.LOGIC_ERROR
    if isinstance(exception, FrameworkTimeoutError):
        return FailureKind.FRAMEWORK_TIMEOUT
    if isinstance(exception, asyncio.CancelledError):
        return FailureKind.CANCELLED
    if _is_broken_http(exception):
        return FailureKind.CONNECTION
    aws = _aws_code(exception)
    if aws in _AWS_KINDS:
        return _AWS_KINDS[aws]
    status = _status(exception)
    if status is not None:
        return kind_of_refusal(status, text_of(exception)[:_SEARCHED])
    return _kind_of_type(exception) or _kind_of_text(text_of(exception))


def _named_kind(exception: ProviderError) -> FailureKind | None:
    """The kind that it names; None where there is none of that name for a call."""
    try:
        return _kind_for_a_call(exception.kind)
    except ValueError:
        return None


def _kind_for_a_call(name: str) -> FailureKind:
    """The kind of this name.

    Raises:
        ValueError: where there is none, or one that a call can't end with: an item that was
            "cancelled" by its strategy would be run again, as one of a resumed batch is.
    """
    kind = FailureKind(name)
    if kind in OUR_KINDS:
        raise ValueError(f"no call ends as {kind.value}")
    return kind


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
    text = text[:_SEARCHED]  # megabytes of it take the process's time
    for pattern, kind in _TEXTS:
        if pattern.search(text):
            return kind
    return FailureKind.UNKNOWN


def _status(exception: BaseException) -> int | None:
    for value in _statuses(exception):
        if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
            return int(value)
    return _grpc_status(exception)


def _statuses(exception: BaseException) -> Iterator[Any]:
    response = getattr(exception, "response", None)
    yield getattr(exception, "status_code", None)
    yield getattr(exception, "status", None)  # before `code`: aiohttp warns of its own `code`
    yield getattr(exception, "code", None)
    yield getattr(response, "status_code", None)
    yield getattr(response, "status", None)
    yield _aws_metadata(exception).get("HTTPStatusCode")


def _grpc_status(exception: BaseException) -> int | None:
    """The HTTP status that means what a gRPC code means (google.rpc.Code says which)."""
    for name in ("grpc_status_code", "code"):
        code = getattr(exception, name, None)
        try:
            code = code() if callable(code) else code
        except Exception:
            continue
        if (found := _GRPC_STATUSES.get(str(getattr(code, "name", "")))) is not None:
            return found
    return None


def _aws_metadata(exception: BaseException) -> Mapping[str, Any]:
    """botocore keeps what the service said in a dict, where others have an object."""
    response = getattr(exception, "response", None)
    found = response.get("ResponseMetadata") if isinstance(response, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _aws_code(exception: BaseException) -> str | None:
    response = getattr(exception, "response", None)
    error = response.get("Error") if isinstance(response, Mapping) else None
    code = error.get("Code") if isinstance(error, Mapping) else None
    return code if isinstance(code, str) else None


def _headers_of(exception: BaseException) -> Mapping[str, str] | None:
    found = getattr(getattr(exception, "response", None), "headers", None)
    found = found or _aws_metadata(exception).get("HTTPHeaders")
    return found if hasattr(found, "get") else None


def _is_broken_http(exception: BaseException) -> bool:
    """Whether the answer was no HTTP (a broken status line, an oversize header): aiohttp says
    "400" of it, which no server said."""
    return any(
        "HttpProcessingError" in {cls.__name__ for cls in type(cause).__mro__}
        for cause in causes_of(exception)
    )


def _message(exception: BaseException) -> str:
    if not isinstance(exception, ProviderError):
        return describe(exception)
    shown = shown_message(str(exception.error_type or ""))[:_HEAD]
    shown = shown or type(exception.__cause__ or exception).__name__
    text = text_of(exception)
    if _named_kind(exception) is None:
        text = f"no failure kind of a call is called {str(exception.kind)[:40]!r}; it said: {text}"
    return f"{shown_message(str(shown))[:MOST_TYPE_CHARACTERS]}: {condensed(text)}"


def condensed(message: str) -> str:
    """A provider's message in at most `ERROR_MESSAGE_MAX_LENGTH` characters, secrets blanked and
    control characters escaped. Both ends are kept, because many providers put the reason last."""
    if len(message) > 2 * _SEARCHED:  # what lies between is not shown, and needs no search
        message = message[:_SEARCHED] + message[-_SEARCHED:]
    text = printable(without_secrets(message))
    if len(text) <= ERROR_MESSAGE_MAX_LENGTH:
        return text
    return f"{text[:_HEAD]}{_GAP}{text[-_TAIL:]}"


def _seconds(asked: object) -> float | None:
    """A foreign number of seconds; longer ones than `MOST_SECONDS` are cut to that."""
    value = _number(asked)
    return None if value is None else min(value, MOST_SECONDS)


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


def stamp_usage(exception: BaseException, usage: TokenUsage) -> BaseException:
    """Make `exception` carry the tokens its call has spent; raise what this returns.

    An exception that can hold no attribute comes back inside a `TokenTrackingError`.
    """
    try:
        exception.__dict__[_STAMP] = dict(usage.items())
    except AttributeError:
        stand_in = TokenTrackingError(text_of(exception), dict(usage.items()))
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
    """Make every exception from the block carry `usage`: the failed call was paid for."""
    try:
        yield
    except BaseException as error:
        stamped = stamp_usage(error, usage)
        if stamped is error:
            raise
        raise stamped from error


def extract_token_usage(exception: BaseException) -> TokenUsage:
    """Tokens that a failed call has spent, as its exception carries them; zeros if it carries none.
    Never raises."""
    try:
        for one in (*causes_of(exception), _first_of(exception)):
            for usage in _usages(one):
                if usage:
                    return usage
    except BaseException as error:
        logger.debug(
            f"Failed to extract token usage from {type(exception).__name__}: {text_of(error)}. "
            "Returning 0 tokens. This is normal for non-LLM exceptions."
        )
    return NO_TOKENS


def _usages(exception: BaseException) -> Iterator[TokenUsage]:
    """Candidates, most trustworthy first: our stamp, the exception's own usage, its cause's."""
    yield read_usage(getattr(exception, "__dict__", {}).get(_STAMP))
    yield read_usage(getattr(exception, "usage", None))
    result = getattr(exception.__cause__, "result", None)
    yield read_usage(getattr(result, "usage", None))
