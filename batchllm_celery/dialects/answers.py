"""Replies of any provider, as far as they are the same: bodies that are no answer, errors.

An error may come with an error's status, in a body of status 200, inside a list, as text or as a
page; gateways mix the forms of all providers. So one reader knows them all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from batchllm_celery.dialects.headers import (
    clamped,
    lowered,
    rate_limits_of,
    request_id_of,
    retry_after_of,
    seconds_of,
    server_time,
)
from batchllm_celery.errors import FailureKind
from batchllm_celery.models import NO_TOKENS, Completion, Failure, TokenUsage
from batchllm_celery.models.rate_limits import RateLimits
from batchllm_celery.redaction import printable, without_secrets

#: What one answer can have cost at most: ten times the largest context window that is sold.
MOST_TOKENS = 20_000_000


@dataclass(frozen=True, slots=True)
class Answer(Completion[Any]):
    """A good answer, with what its reply said besides."""

    status: int = 200
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class FailedAnswer(Failure):
    """A reply that is no answer, or none that can be used.

    `metadata` has `partial_output` where a text was cut, `finish_reason`, `model`, `response_id`.
    `code` is the status that the error itself names, where it came under another one.
    """

    status: int = 0
    request_id: str | None = None
    limits: RateLimits | None = None
    code: int | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """What a dialect read out of a body: an answer, or why it is none."""

    output: Any = None
    usage: TokenUsage = NO_TOKENS
    metadata: Mapping[str, Any] = field(default_factory=dict)
    failed: FailureKind | None = None
    message: str = ""


class BadAnswerError(ValueError):
    """A body that has not the form of its dialect."""


def read(
    status: int,
    headers: Mapping[str, str] | None,
    body: bytes,
    reader: Callable[[Mapping[str, Any]], Read],
    usage: Callable[[Mapping[str, Any]], TokenUsage],
) -> Answer | FailedAnswer:
    """A reply as an answer or a failure; never raises, whatever the body is.

    Args:
        status: of HTTP.
        headers: of the reply.
        body: as it came.
        reader: reads a body of the dialect that is no error.
        usage: reads its tokens, which were paid for whatever else is wrong.
    """
    names = lowered(headers)
    reply = _Reply(status, names, request_id_of(names), rate_limits_of(names))
    try:
        return _read(reply, body, reader, usage)
    except RecursionError:
        return _unread(reply, b"", "it is nested too deep")


def _read(
    reply: _Reply,
    body: bytes,
    reader: Callable[[Mapping[str, Any]], Read],
    usage: Callable[[Mapping[str, Any]], TokenUsage],
) -> Answer | FailedAnswer:
    value = _parse(body, reply.headers)
    if isinstance(value, str):
        return _unread(reply, body, value)
    error = find_error(value, reply.status)
    if error is not None:
        spent = usage(value) if isinstance(value, dict) else NO_TOKENS
        return _read_error(reply, error, spent)
    if not isinstance(value, dict):
        return reply.failed(_bad("the body is no JSON object"))
    try:
        found = reader(value)
    except BadAnswerError as bad:
        return reply.failed(_bad(str(bad), usage(value)))
    if found.failed is None:
        return reply.answered(found)
    name = _TYPE_NAMES.get(found.failed, "BadAnswer")
    failure = Failure(found.failed, f"{name}: {found.message}", usage=found.usage)
    return reply.failed(failure, found.metadata)


_TYPE_NAMES = {FailureKind.TRUNCATED: "Truncated", FailureKind.CONTENT_BLOCKED: "ContentBlocked"}


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    headers: Mapping[str, str]
    request_id: str | None
    limits: RateLimits | None

    def answered(self, found: Read) -> Answer:
        return Answer(
            found.output,
            found.usage,
            found.metadata,
            limits=self.limits,
            status=self.status,
            request_id=self.request_id,
        )

    def failed(
        self,
        failure: Failure,
        metadata: Mapping[str, Any] | None = None,
        code: int | None = None,
    ) -> FailedAnswer:
        return FailedAnswer(
            failure.kind,
            failure.message,
            failure.retry_after,
            failure.usage,
            metadata or {},
            status=self.status,
            request_id=self.request_id,
            limits=self.limits,
            code=code,
        )


def _bad(message: str, usage: TokenUsage = NO_TOKENS) -> Failure:
    """The provider's fault: asked again with the same prompt, after a while."""
    return Failure(FailureKind.UNKNOWN, f"BadAnswer: {message}", usage=usage)


# -- bodies


def _parse(body: bytes, headers: Mapping[str, str]) -> Any:
    """The body's JSON, or a text that says why there is none."""
    text = _decoded(body, headers)
    if text is None:
        return "it is not UTF-8"
    try:
        value = _loads(text)
    except ValueError:
        return _shape_of(text)
    if isinstance(value, str):
        return "it is a bare JSON text"
    return _without_halves(value) if "\\ud" in text or "\\uD" in text else value


def text_of_body(body: bytes, headers: Mapping[str, str] | None = None) -> str:
    """A body as text, whatever it is."""
    text = _decoded(body, headers or {})
    return body.decode("utf-8", "replace") if text is None else text


_CHARSET = re.compile(r"charset\s*=\s*\"?([\w.:-]{1,40})", re.IGNORECASE)


def _decoded(body: bytes, headers: Mapping[str, str]) -> str | None:
    """The body as text: UTF-8, as JSON should be, UTF-16 and UTF-32 by their zeros, else what the
    header says. None for none of these."""
    declared = _CHARSET.search(headers.get("content-type", ""))
    for encoding in (json.detect_encoding(body), declared and declared.group(1)):
        try:
            return body.decode("utf-8-sig" if encoding == "utf-8" else encoding or "utf-8")
        except (UnicodeError, LookupError):
            continue
    return None


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        # `int` refuses thousands of digits, though the rest may be good.
        return json.loads(text, parse_int=_whole)


def _without_halves(value: Any) -> Any:
    """Half a surrogate pair is no text, and could not be stored: U+FFFD takes its place."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_halves(element) for element in value]
    if isinstance(value, dict):
        return {_without_halves(name): _without_halves(inner) for name, inner in value.items()}
    return value


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= 4000 else float("inf")


def _shape_of(text: str) -> str:
    start = text.lstrip()[:20].lower()
    if not start:
        return "it is empty"
    if start.startswith("<"):
        return "it is a page of HTML or XML"
    if start.startswith(("data:", "event:", ":")):
        return "it is a stream of events, which was not asked for"
    return "it is cut off" if start.startswith(("{", "[")) else "it is not JSON"


def _unread(reply: _Reply, body: bytes, why: str) -> FailedAnswer:
    if reply.status < 300:
        return reply.failed(_bad(f"the body of status {reply.status} is no answer: {why}"))
    return _read_error(reply, page_text(body.decode("utf-8", "replace")), NO_TOKENS)


_TAG = re.compile(r"<[^<>]{0,2000}>")


def page_text(text: str) -> str:
    """The words of a text or an HTML page, of a page its title where it has one."""
    text = text[:20_000]
    lower = text.lower()
    start = lower.find("<title")
    if start >= 0:
        opened = text.find(">", start)
        closed = lower.find("</title", start)
        if 0 <= opened < closed:
            text = text[opened + 1 : closed]
    return " ".join(_TAG.sub(" ", text).split())


# -- errors


def find_error(value: Any, status: int) -> Any:
    """The error in a body of any provider: an object or a text; None where there is none.

    A body of an error's status is an error whatever it holds.
    """
    if isinstance(value, list):  # Gemini's OpenAI endpoint wraps them
        inner = next((e for e in value if isinstance(e, Mapping) and e.get("error")), None)
        if inner is not None:
            return find_error(inner, status)
    if isinstance(value, Mapping):
        error = value.get("error") or _choice_error(value)
        if error or value.get("object") == "error" or value.get("type") == "error":
            return error if isinstance(error, Mapping) else value
    if status < 300 and not _speaks_of_error(value):
        return None
    return value if isinstance(value, Mapping) else json.dumps(value)[:2000]


def _choice_error(value: Mapping[str, Any]) -> Any:
    """OpenRouter: the choice carries the error of the server behind it."""
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first.get("error") if isinstance(first, Mapping) else None


#: Fields of answers: a body that has one is no error, whatever else it holds.
_ANSWER_FIELDS = frozenset(
    {"choices", "candidates", "promptFeedback", "prompt_feedback", "content", "output", "data"}
)
_ERROR_FIELDS = ("errors", "detail", "message")


def _speaks_of_error(value: Any) -> bool:
    if not isinstance(value, Mapping) or any(value.get(name) for name in _ANSWER_FIELDS):
        return False
    return any(value.get(name) for name in _ERROR_FIELDS)


_NAME_STATUS = {
    # google.rpc
    "invalid_argument": 400,
    "failed_precondition": 400,
    "out_of_range": 400,
    "unauthenticated": 401,
    "permission_denied": 403,
    "not_found": 404,
    "aborted": 409,
    "already_exists": 409,
    "resource_exhausted": 429,
    "cancelled": 499,
    "internal": 500,
    "data_loss": 500,
    "unknown": 500,
    "unimplemented": 501,
    "unavailable": 503,
    "deadline_exceeded": 504,
    # Anthropic
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
    # OpenAI
    "invalid_api_key": 401,
    "insufficient_quota": 429,
    "rate_limit_exceeded": 429,
    "too_many_requests": 429,
    "model_not_found": 404,
    "server_error": 500,
    "internal_server_error": 500,
    "service_unavailable": 503,
    # last, since gateways put it beside better names
    "badrequesterror": 400,
    "invalid_request_error": 400,
}

_STATUS_KINDS = {
    401: FailureKind.AUTHENTICATION,
    402: FailureKind.BILLING,
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
    520: FailureKind.CONNECTION,
    521: FailureKind.CONNECTION,
    522: FailureKind.CONNECTION,
    523: FailureKind.CONNECTION,
    524: FailureKind.PROVIDER_TIMEOUT,
    529: FailureKind.OVERLOADED,
}

_BILLING_NAMES = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "billing_error",
        "exceeded_current_quota_error",
        "insufficient_balance",
        "billing_disabled",
        "consumer_suspended",
        "consumer_invalid",
    }
)
_BLOCKED_NAMES = frozenset({"content_filter", "content_policy_violation"})
_KEY_NAMES = frozenset(
    {
        "api_key_invalid",
        "api_key_expired",
        "api_key_service_blocked",
        "service_disabled",
        "invalid_api_key",
        "authentication_error",
        "account_deactivated",
    }
)
#: Words of a 403 that mean who calls, not what is asked. Its names don't tell: Google calls every
#: 403 a denied permission.
_KEY_WORDS = re.compile(
    r"\b(?:api[_-]?)?keys?\b|\bcredentials?\b|\b(?:access|auth|bearer|security) token\b"
    r"|\bunregistered callers?\b|\bnot authenticated\b|\bunauthenticated\b",
    re.IGNORECASE,
)
_MONEY_WORDS = re.compile(
    r"credit balance|insufficient (?:balance|credit|fund)|billing (?:is|has|account)|"
    r"enable billing|prepayment",
    re.IGNORECASE,
)
_DAY_WORDS = re.compile(r"per[ _-]?day|\bRPD\b|\bTPD\b|daily", re.IGNORECASE)
_LIMIT_0 = re.compile(r"\blimit: 0(?![.\d])")
_TRY_AGAIN = re.compile(r"try again in ([\d.]{1,20}[a-z]{1,2}[\d.a-z]{0,30})", re.IGNORECASE)
#: Last resort, for an error of status 200 that has words only.
_WORD_KINDS = (
    (
        re.compile(r"\b429\b|rate[ _-]?limit|too many requests|\bquota\b", re.IGNORECASE),
        FailureKind.RATE_LIMITED,
    ),
    (
        re.compile(r"(?:invalid|incorrect|missing|no) api[ _-]?key", re.IGNORECASE),
        FailureKind.AUTHENTICATION,
    ),
    (
        re.compile(r"\b50[023]\b|overloaded|unavailable|at capacity", re.IGNORECASE),
        FailureKind.OVERLOADED,
    ),
    (re.compile(r"\btime(?:d )?[ -]?out\b", re.IGNORECASE), FailureKind.PROVIDER_TIMEOUT),
    (
        re.compile(r"\bmodel\b.{0,80}\bnot found\b|not a valid model", re.IGNORECASE),
        FailureKind.INVALID_REQUEST,
    ),
)


def kind_of_status(status: int) -> FailureKind:
    """The failure kind of a status of 300 or more (a redirect is not followed: the address is
    wrong). A 403 is the row's own: a moderation or a firewall refused it."""
    if status == 403:
        return FailureKind.CONTENT_BLOCKED
    default = FailureKind.INVALID_REQUEST if status < 500 else FailureKind.UNKNOWN
    return _STATUS_KINDS.get(status, default)


@dataclass(frozen=True, slots=True)
class _Error:
    """An error's parts, whatever its form."""

    words: str
    names: frozenset[str]
    title: str | None
    code: int | None
    details: tuple[Mapping[str, Any], ...] = ()
    wait: float | None = None


def _read_error(reply: _Reply, value: Any, usage: TokenUsage) -> FailedAnswer:
    status, headers = reply.status, reply.headers
    error = _take_apart(value)
    code = status if status >= 300 else error.code
    kind = _kind_of(code, error)
    waits = (error.wait, retry_after_of(headers), _wait_in_words(error.words))
    wait = next((seconds for seconds in waits if seconds is not None), None)
    if kind is FailureKind.QUOTA_EXHAUSTED and wait is None and error.details:
        wait = seconds_to_pacific_midnight(server_time(headers))
    shown = " ".join(part for part in (str(code or ""), error.words) if part)
    title = condense(error.title or "ProviderError")
    failure = Failure(
        kind,
        f"{title}: {condense(shown) or 'no reason was given'}",
        None if wait is None else clamped(wait),
        usage,
    )
    return reply.failed(failure, code=code if code != status else None)


def _take_apart(value: Any) -> _Error:
    if not isinstance(value, Mapping):
        return _Error(page_text(str(value)), frozenset(), None, None)
    details = tuple(_details(value))
    found = [value.get(name) for name in ("type", "status", "code")]
    named = [name for name in found if isinstance(name, str) and name and not name.isdigit()]
    reasons = [str(detail["reason"]) for detail in details if detail.get("reason")]
    names = frozenset(name.lower() for name in [*named, *reasons])
    title = next((name for name in named if name != "error"), None)
    wait = _wait_in_body(value)
    return _Error(_words(value), names, title, _code(value, names), details, wait)


def _code(error: Mapping[str, Any], names: frozenset[str]) -> int | None:
    for field_name in ("code", "status", "status_code", "statusCode"):
        text = str(error.get(field_name, ""))
        if re.fullmatch(r"[45]\d\d", text):
            return int(text)
    return next((code for name, code in _NAME_STATUS.items() if name in names), None)


def _words(error: Any) -> str:
    """What an error says, of whatever form."""
    if isinstance(error, str):
        return page_text(error)
    if isinstance(error, list):
        return "; ".join(filter(None, (_words(element) for element in error[:5])))
    if not isinstance(error, Mapping):
        return ""
    for name in ("message", "msg", "detail", "errors", "error", "title", "description"):
        words = _words(error.get(name))
        if words:
            place = error.get("loc")
            where = ".".join(map(str, place)) + ": " if isinstance(place, list) else ""
            return where + words + _upstream(error)
    return ""


def _upstream(error: Mapping[str, Any]) -> str:
    """OpenRouter says "Provider returned error", and the provider's own words beside it."""
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    return f" ({page_text(raw)})" if isinstance(raw, str) and raw else ""


#: Characters of each end of a message that are searched for secrets, and that are kept.
_SEARCHED, _HEAD, _TAIL = 5_000, 120, 76


def condense(message: str) -> str:
    """At most 200 characters, secrets blanked and control characters escaped. Both ends are kept:
    providers put the reason last."""
    if len(message) > 2 * _SEARCHED:
        message = message[:_SEARCHED] + message[-_SEARCHED:]
    text = printable(without_secrets(message))
    return text if len(text) <= 200 else f"{text[:_HEAD]} .. {text[-_TAIL:]}"


def _kind_of(code: int | None, error: _Error) -> FailureKind:
    if error.names & _BILLING_NAMES:
        return FailureKind.BILLING
    if error.names & _BLOCKED_NAMES:
        return FailureKind.CONTENT_BLOCKED
    if code is None:
        return next((k for pattern, k in _WORD_KINDS if pattern.search(error.words)), _NO_KIND)
    if code == 429:
        return _kind_of_refusal(error)
    if code in (400, 403) and _MONEY_WORDS.search(error.words):
        return FailureKind.BILLING
    if code == 403 and (error.names & _KEY_NAMES or _KEY_WORDS.search(error.words)):
        return FailureKind.AUTHENTICATION
    if code == 400 and (error.names & _KEY_NAMES or "api key" in error.words.lower()):
        return FailureKind.AUTHENTICATION
    return kind_of_status(code)


_NO_KIND = FailureKind.UNKNOWN


def _kind_of_refusal(error: _Error) -> FailureKind:
    """Which 429. Gemini's words alone won't do: each says "check your plan and billing details".
    The violated quota's id tells minute from day, a free tier of 0 that money is missing."""
    violations = [v for detail in error.details for v in _violations(detail)]
    if _free_tier_of_nothing(error, violations) or _MONEY_WORDS.search(error.words):
        return FailureKind.BILLING
    if error.words.startswith("Request too large"):
        # No wait makes it smaller: as a refusal it would cool the fleet down for ever.
        return FailureKind.INVALID_REQUEST
    names = " ".join(str(v.get(name, "")) for v in violations for name in ("quotaId", "subject"))
    if _DAY_WORDS.search(f"{names} {error.words}"):
        return FailureKind.QUOTA_EXHAUSTED
    return FailureKind.RATE_LIMITED


def _free_tier_of_nothing(error: _Error, violations: list[Mapping[str, Any]]) -> bool:
    words = json.dumps(violations, default=str) + error.words
    nothing = any(str(violation.get("quotaValue")) == "0" for violation in violations)
    free = re.search(r"free_?tier", words, re.IGNORECASE)
    return bool(free and (nothing or _LIMIT_0.search(error.words)))


def _violations(detail: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    found = detail.get("violations")
    for violation in found if isinstance(found, list) else ():
        if isinstance(violation, Mapping):
            yield violation


def _details(error: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    details = error.get("details")
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, Mapping):
            yield detail


def _wait_in_body(error: Mapping[str, Any]) -> float | None:
    """Seconds to wait by Google's `RetryInfo`, a field, or a header that a router passes on."""
    delays = [detail.get("retryDelay") for detail in _details(error)]
    metadata = error.get("metadata")
    passed_on = metadata.get("headers") if isinstance(metadata, Mapping) else None
    for told in (error, metadata, passed_on):
        if isinstance(told, Mapping):
            plain = {str(name).lower().replace("_", "-"): str(v) for name, v in told.items()}
            delays.append(str(retry_after_of(plain)))
    found = (seconds_of(delay) for delay in delays if isinstance(delay, str))
    return next((seconds for seconds in found if seconds is not None), None)


def _wait_in_words(words: str) -> float | None:
    """Seconds of "Please try again in 1m2.5s."."""
    match = _TRY_AGAIN.search(words)
    return seconds_of(match.group(1).rstrip(".")) if match else None


_PACIFIC = ZoneInfo("America/Los_Angeles")


def seconds_to_pacific_midnight(now: float) -> float:
    """Gemini's day quotas are reset at midnight Pacific time."""
    today = datetime.fromtimestamp(now, _PACIFIC)
    tomorrow = (today + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return tomorrow.timestamp() - now


# -- values that all dialects read


def count(source: Any, name: str) -> int:
    """A number of tokens; 0 for anything that is none, and never more than one call can cost."""
    value = source.get(name) if isinstance(source, dict) else None
    if type(value) is int:
        return min(max(value, 0), MOST_TOKENS)
    if type(value) is float and value == value:
        return int(min(max(value, 0), MOST_TOKENS))
    return 0


def nonsense(source: Any, *names: str) -> bool:
    """Whether a number of tokens can't be meant, so that `count` gave another."""
    return any(type(source.get(n)) in (int, float) and count(source, n) != source[n] for n in names)


def tool_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call that the model made, in the form of OpenAI's chat completions."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def output_of(text: str, calls: list[dict[str, Any]]) -> Any:
    """The text, or `{"tool_calls", "text"}` where the model called tools."""
    return {"tool_calls": calls, "text": text} if calls else text


def short(value: Any) -> str:
    """A foreign word in a message of ours."""
    return ascii(value[:40] if isinstance(value, str) else value)[:60]
