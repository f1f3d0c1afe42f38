"""What the HTTP bodies of providers say, whatever their shape.

An answer is a JSON object; an error may be anything, also under status 200.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from batchllm_celery.errors import FailureKind, ProviderError

#: Characters of an error's body that are kept as its message.
_MOST_WORDS = 2000
_MARKUP = re.compile(r"<(script|style)\b[^<>]*>[^<]*|<[^<>]*>", re.IGNORECASE)
_WORDS = ("message", "error", "detail", "errors", "error_description", "msg", "title")
_STATUS_NAMES = ("code", "status_code", "status", "statusCode")
#: Words in the place of a status: in error bodies of 200, which have no other.
_STATUS_WORDS = {
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "resource_exhausted": 429,
    "too_many_requests": 429,
    "overloaded_error": 503,
    "unavailable": 503,
    "server_error": 500,
    "api_error": 500,
    "internal": 500,
    "deadline_exceeded": 504,
    "invalid_api_key": 401,
    "authentication_error": 401,
    "unauthenticated": 401,
    "permission_error": 403,
    "permission_denied": 403,
    "insufficient_quota": 402,
    "invalid_request_error": 400,
    "invalid_argument": 400,
    "badrequesterror": 400,
    "not_found_error": 404,
    "not_found": 404,
}


def unreadable(what: str) -> ProviderError:
    """The provider's fault: its answer is no answer. The same prompt is asked again, later."""
    return ProviderError(what, kind=FailureKind.UNKNOWN, error_type="UnreadableAnswer")


def read_object(body: bytes | str) -> dict[str, Any]:
    """The JSON object that the body of a status 200 holds.

    Raises:
        ProviderError: of kind `unknown`; says what came in its place, never quotes it.
    """
    try:
        text = body.decode("utf-8-sig") if isinstance(body, bytes) else body
    except UnicodeDecodeError:
        raise unreadable("the answer's body is not valid UTF-8") from None
    start = text[:200].lstrip()
    if not start and not text.strip():
        raise unreadable("the answer's body is empty")
    if is_page(start):
        raise unreadable("the answer's body is a web page, not JSON")
    if start.startswith(("data:", "event:")):
        raise unreadable("the answer's body is an event stream, not JSON")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise unreadable("the answer's body is not valid JSON (cut off?)") from None
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, dict):
        raise unreadable(f"the answer's body is a JSON {type(found).__name__}, not an object")
    return found


def is_page(text: str) -> bool:
    """Whether `text` begins as HTML or XML does."""
    return text.lstrip().startswith("<")


def as_attributes(value: Any) -> Any:
    """JSON as objects with attributes in snake_case: the SDKs' models, unknown fields kept and
    nothing validated.

    Raises:
        ProviderError: of kind `unknown` for JSON nested without end.
    """
    try:
        return _as_attributes(value)
    except RecursionError:
        raise unreadable("the answer's body is nested too deep") from None


def _as_attributes(value: Any) -> Any:
    if isinstance(value, dict):
        return SimpleNamespace(**{_snake(key): _as_attributes(one) for key, one in value.items()})
    return [_as_attributes(one) for one in value] if isinstance(value, list) else value


def _snake(name: str) -> str:
    return name if name.islower() else re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()


# -- errors


def error_in(body: Mapping[str, Any], answered: str) -> Any:
    """The error in the body of a status 200; None if there is none.

    `answered` names the field that holds the answer. A body without it that speaks of a message or
    a detail is an error as a whole.
    """
    if body.get("error"):
        return body["error"]
    if body.get(answered):
        return None
    return body if any(body.get(name) for name in ("message", "detail", "errors")) else None


def fields_of(body: Any) -> Mapping[str, Any]:
    """The object within an error's body: also one under `error`, or alone in a list."""
    for _ in range(3):
        if isinstance(body, list) and body:
            body = body[0]
        elif isinstance(body, Mapping) and isinstance(body.get("error"), Mapping | list):
            body = body["error"]
    return body if isinstance(body, Mapping) else {}


def status_in(error: Any) -> int | None:
    """The HTTP status that an error's body names, as a number or in words."""
    fields = fields_of(error)
    for name in _STATUS_NAMES:
        value = fields.get(name)
        if isinstance(value, str) and value.isdecimal() and len(value) == 3:
            value = int(value)
        if isinstance(value, int) and 400 <= value <= 599:
            return value
    named = (fields.get(name) for name in ("code", "type", "status"))
    words = (name.lower() for name in named if isinstance(name, str))
    return next((_STATUS_WORDS[word] for word in words if word in _STATUS_WORDS), None)


def words_of(body: Any) -> str:
    """What an error's body says to a person: its message, wherever that stands, or its text
    without markup; empty where it says nothing."""
    try:
        return " ".join(_words(body).split())[:_MOST_WORDS]
    except RecursionError:
        return ""


def _words(body: Any) -> str:
    if isinstance(body, bytes):
        body = body[: 8 * _MOST_WORDS].decode("utf-8", "replace")
    if isinstance(body, str):
        text = body[: 8 * _MOST_WORDS]
        return _MARKUP.sub(" ", text) if is_page(text) else text
    if isinstance(body, Mapping):
        # Only fields that are meant for a person: others may quote the prompt.
        said = (_words(body[name]) for name in _WORDS if body.get(name))
        return next((words for words in said if words.strip()), "")
    if isinstance(body, list | tuple):
        return _joined(body)
    return ""


def _joined(parts: Iterable[Any]) -> str:
    return "; ".join(words for part in list(parts)[:5] if (words := _words(part).strip()))
