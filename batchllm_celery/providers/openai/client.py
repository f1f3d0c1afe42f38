"""The openai client, and how its answers and errors are read."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from batchllm_celery.errors import FailureKind, ProviderError, UsageError, causes_of
from batchllm_celery.models import TokenUsage
from batchllm_celery.providers import bodies, google_rpc
from batchllm_celery.providers.http import EXTRA_CONNECTIONS, bounded_client, redirected
from batchllm_celery.redaction import keep_secret, keep_secrets_in
from batchllm_celery.strategies.base import Opened, ProcessResources
from batchllm_celery.strategies.failures import condensed, kind_of_refusal, retry_after_of
from batchllm_celery.strategies.usage import Reading, count, reasoned_output

_BILLING_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_BLOCKED_CODES = {"content_filter", "content_policy_violation"}
_GOOD_ENDS = {
    "stop",
    "stop_sequence",
    "end_turn",
    "eos",
    "eos_token",
    "complete",
}
_TOOL_ENDS = {"tool_calls", "function_call"}
_CUT_ENDS = {"length", "max_tokens", "max_output_tokens", "model_length"}
_BLOCKED_ENDS = {"content_filter", "safety", "refusal", "recitation"}
_DAY = re.compile(r"per[ _-]?day|\bRPD\b|\bTPD\b|per-day", re.IGNORECASE)
_TRY_AGAIN = re.compile(r"try again in ((?:\d+(?:\.\d+)?(?:ms|d|h|m|s))+)", re.IGNORECASE)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


async def open_client(
    resources: ProcessResources, *, base_url: str | None = None, api_key: str | None = None
) -> Any:
    """The process's one `AsyncOpenAI` for this base URL, on aiohttp, without its own retries.

    Args:
        resources: what the process shares; its `slots` size the connection pool.
        base_url: None: the settings' `openai_base_url`, else the SDK's (OPENAI_BASE_URL, else
            OpenAI's). Never from a message: a key must not travel to a host that one names.
        api_key: None: OPENAI_API_KEY; servers of one's own often need none.

    Raises:
        UsageError: where the `openai` extra is not installed.
        ProviderError: of kind `authentication` where there is no key.
    """
    url = base_url or resources.settings.openai_base_url
    opener = partial(_open, resources.slots, url, api_key)
    # Two keys at one server are two clients; the name may be logged, so it holds a hash.
    return await resources.shared(f"openai client {hash(api_key)} of {url}", opener)


async def _open(slots: int, base_url: str | None, api_key: str | None) -> Opened[Any]:
    openai = await asyncio.to_thread(import_openai)
    key = api_key or os.environ.get("OPENAI_API_KEY")
    keep_secret(key)
    keep_secrets_in(base_url or os.environ.get("OPENAI_BASE_URL"))
    if not key and not (base_url or os.environ.get("OPENAI_BASE_URL")):
        raise ProviderError(
            "no OpenAI API key: set OPENAI_API_KEY "
            "(get one at https://platform.openai.com/api-keys)",
            kind=FailureKind.AUTHENTICATION,
        )
    most = slots + EXTRA_CONNECTIONS
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
        max_connections=most, max_keepalive_connections=most, keepalive_expiry=60.0
    )
    http_client = bounded_client(openai.DefaultAioHttpClient)
    client = openai.AsyncOpenAI(
        api_key=key or "not-needed",
        base_url=base_url,
        max_retries=0,  # they hold a slot for as long as Retry-After says: the runner retries
        timeout=None,  # the runner bounds each attempt
        http_client=http_client(limits=limits, timeout=None),
    )
    return Opened(client, client.close)


def without_retries(client: Any) -> Any:
    """A user's client with the SDK's retries off: a call is one request."""
    if type(client).__module__.partition(".")[0] != "openai" or client.max_retries == 0:
        return client
    return client.with_options(max_retries=0)


def import_openai() -> Any:
    """The SDK.

    Raises:
        UsageError: with the command that installs it.
    """
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise UsageError(
            "the openai package is not installed: pip install 'batchllm-celery[openai]'"
        ) from error


# -- answers


def usage_of(response: Any) -> Reading:
    """Tokens of an answer; reasoning tokens are part of the output, cached ones of the input."""
    usage = getattr(response, "usage", None)
    details = getattr(usage, "prompt_tokens_details", None)
    reasoned = getattr(usage, "completion_tokens_details", None)
    inputs, total = _count(usage, "prompt_tokens"), _count(usage, "total_tokens")
    completion, reasoning = _count(usage, "completion_tokens"), _count(reasoned, "reasoning_tokens")
    outputs, guessed = reasoned_output(inputs, completion, total, reasoning)
    tokens = TokenUsage(
        input_tokens=inputs,
        output_tokens=outputs,
        total_tokens=inputs + outputs,
        cached_input_tokens=_count(details, "cached_tokens"),
    )
    return Reading(tokens, guessed)


def _count(source: Any, name: str) -> int:
    return count(getattr(source, name, None))


def read_answer(content: bytes, headers: Mapping[str, str] | None) -> Any:
    """The body of a status 200 as an object with the SDK's names.

    Raises:
        ProviderError: for an error in place of the answer (its code is the status), and of kind
            `unknown` for a body that is none.
    """
    body = bodies.read_object(content)
    error = bodies.error_in(body, "choices")
    if error is not None:
        raise _refused(bodies.status_in(error), error, headers)
    return bodies.as_attributes(body)


def text_of(response: Any) -> str:
    """The answer's text: the text parts, where it comes in parts.

    Raises:
        ProviderError: `content_blocked`, `truncated`, or `unknown` where nothing whole was
            answered.
    """
    choice = _finished_choice(response, _GOOD_ENDS)
    text = _text_of_content(getattr(choice.message, "content", None))
    if not text.strip():
        raise ProviderError(
            f"the answer is empty ({choice.finish_reason})", error_type="EmptyAnswer"
        )
    return text


def check_answer(response: Any) -> None:
    """Return if there is a whole text or a tool call, for a parser of the user's.

    Raises:
        ProviderError: as `text_of`.
    """
    if _end_of(response) in _TOOL_ENDS:
        _finished_choice(response, _TOOL_ENDS)
    else:
        text_of(response)


def _finished_choice(response: Any, good_ends: set[str]) -> Any:
    """The first choice, which has a message and came to a good end."""
    choices = getattr(response, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    if choice is None:
        raise ProviderError("the answer has no choices", error_type="EmptyAnswer")
    if error := getattr(choice, "error", None):
        plain = vars(error) if hasattr(error, "__dict__") else error
        raise _refused(bodies.status_in(plain), plain, None)
    finish = _end_of(response)
    message = getattr(choice, "message", None)
    if finish in _CUT_ENDS:
        raise ProviderError(
            "the answer was cut at the output limit: raise max_output_tokens",
            kind=FailureKind.TRUNCATED,
            error_type="Truncated",
        )
    if finish in _BLOCKED_ENDS or getattr(message, "refusal", None):
        raise ProviderError(
            "the answer was blocked",
            kind=FailureKind.CONTENT_BLOCKED,
            error_type="ContentBlocked",
        )
    # Some small servers have no such field at all; one that is there and says nothing is no end.
    if finish not in good_ends and hasattr(choice, "finish_reason"):
        raise ProviderError(
            f"the answer did not come to its end (finish_reason {finish[:40] or None!r})",
            error_type="UnfinishedAnswer",
        )
    if message is None:
        raise ProviderError("the answer has no message", error_type="EmptyAnswer")
    return choice


def _end_of(response: Any) -> str:
    """The same in one spelling; empty where there is none."""
    return (finish_reason_of(response) or "").strip().lower()


def finish_reason_of(response: Any) -> str | None:
    """`stop`, `length`, ... of the first choice."""
    choices = getattr(response, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    reason = getattr(first, "finish_reason", None)
    return reason if isinstance(reason, str) else None


def _text_of_content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    return "".join(_text_of_part(part) for part in parts)


def _text_of_part(part: Any) -> str:
    """Of a part of type text; of others (thinking, images) nothing."""
    if isinstance(part, str):
        return part
    field = part.get if isinstance(part, dict) else partial(getattr, part)
    kind, text = field("type", None), field("text", None)
    if kind == "refusal":
        raise ProviderError(
            "the answer was blocked",
            kind=FailureKind.CONTENT_BLOCKED,
            error_type="ContentBlocked",
        )
    known = kind in (None, "text", "output_text") and isinstance(text, str)
    return str(text) if known else ""


# -- errors


def translate(error: BaseException) -> ProviderError | None:
    """An SDK error as our own; None for anything that the general rules know."""
    if isinstance(error.__cause__, ProviderError):  # our own refusal, beneath a connection error
        return error.__cause__
    status = getattr(error, "status_code", None)
    if type(status) is int and hasattr(error, "body"):
        headers = getattr(getattr(error, "response", None), "headers", None)
        body = error.body or str(getattr(error, "message", ""))
        translated = redirected(error, status) or _refused(
            status, body, headers, type(error).__name__
        )
    elif type(error).__name__ == "APITimeoutError" and _never_connected(error):
        translated = ProviderError(
            "the connection failed or broke",
            kind=FailureKind.CONNECTION,
            error_type="APIConnectionError",
        )
    else:
        return None
    translated.__cause__ = error
    return translated


def _refused(
    status: int | None,
    body: Any,
    headers: Mapping[str, str] | None,
    error_type: str = "APIError",
) -> ProviderError:
    """The failure that an error's body describes.

    `status` is HTTP's, or the one that the body names for an error under status 200.
    """
    fields = bodies.fields_of(body)
    details = google_rpc.details_of(fields)
    words = bodies.words_of(body)
    wait = google_rpc.retry_delay(details)
    if wait is None:
        wait = retry_after_of(headers)
    if wait is None:
        wait = _wait_in_body(fields, words)
    return ProviderError(
        condensed(words or f"Error code: {status or 'none'}"),
        kind=_kind(status, fields, details, words),
        status=status,
        retry_after=wait,
        error_type=error_type,
    )


def _never_connected(error: BaseException) -> bool:
    """On aiohttp the SDK calls every broken connection a timeout; its cause knows better."""
    return any(
        "ClientConnectionError" in {cls.__name__ for cls in type(cause).__mro__}
        and not isinstance(cause, TimeoutError)
        for cause in causes_of(error, contexts=True)
    )


def _kind(
    status: int | None, fields: Mapping[str, Any], details: list[Mapping[str, Any]], words: str
) -> FailureKind:
    codes = {name for name in (fields.get("code"), fields.get("type")) if isinstance(name, str)}
    if codes & _BILLING_CODES:
        return FailureKind.BILLING
    if codes & _BLOCKED_CODES:
        return FailureKind.CONTENT_BLOCKED
    if status is None or status < 300:
        return FailureKind.UNKNOWN
    if details:  # Gemini's endpoint of this format
        return google_rpc.kind_of_error(status, details, words)
    if status != 429:
        return kind_of_refusal(status, words)
    if words.startswith("Request too large"):
        # No wait makes it smaller: as a refusal it would cool the fleet down for ever.
        return FailureKind.INVALID_REQUEST
    return FailureKind.QUOTA_EXHAUSTED if _DAY.search(words) else FailureKind.RATE_LIMITED


def _wait_in_body(fields: Mapping[str, Any], words: str) -> float | None:
    """Seconds that a body asks us to wait: a field, a header that a router passes on, or words."""
    metadata = fields.get("metadata")
    passed_on = metadata.get("headers") if isinstance(metadata, Mapping) else None
    for source in (fields, metadata, passed_on):
        if not isinstance(source, Mapping):
            continue
        plain = {str(name).lower().replace("_", "-"): value for name, value in source.items()}
        if (wait := retry_after_of(plain)) is not None:
            return wait
    return _wait_in_message(words)


def _wait_in_message(message: str) -> float | None:
    """Seconds of "Please try again in 1m2.5s"."""
    match = _TRY_AGAIN.search(message)
    if match is None:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)", match.group(1).lower())
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)
