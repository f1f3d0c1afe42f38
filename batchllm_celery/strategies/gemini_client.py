"""The google-genai client as we use it, and its answers and errors as our own words."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

from batchllm_celery.errors import FailureKind, ProviderError
from batchllm_celery.models import TokenUsage
from batchllm_celery.redaction import keep_secret
from batchllm_celery.strategies import bodies
from batchllm_celery.strategies.base import Opened, ProcessResources
from batchllm_celery.strategies.failures import condensed, kind_of_refusal, retry_after_of
from batchllm_celery.strategies.http import bounded_response, redirected
from batchllm_celery.strategies.usage import MOST_TOKENS
from batchllm_celery.strategies.usage import count as tokens

#: Sockets beyond the slots: cache calls, and those of cancelled calls that still close.
SPARE_CONNECTIONS = 16

_BLOCKED = {
    "SAFETY",
    "RECITATION",
    "LANGUAGE",
    "BLOCKLIST",
    "PROHIBITED_CONTENT",
    "SPII",
    "IMAGE_SAFETY",
    "IMAGE_PROHIBITED_CONTENT",
    "IMAGE_RECITATION",
    "MODEL_ARMOR",
}
#: The one end of a whole answer. Others that are not named here, and those still to come, fail.
_GOOD_END = "STOP"
_LIMIT_0 = re.compile(r"\blimit: 0(?![.\d])")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)s")
_KEY_REASONS = {"API_KEY_INVALID", "API_KEY_EXPIRED", "API_KEY_SERVICE_BLOCKED", "SERVICE_DISABLED"}
_BILLING_REASONS = {"BILLING_DISABLED", "CONSUMER_SUSPENDED", "CONSUMER_INVALID"}


async def open_client(
    resources: ProcessResources, *, base_url: str | None = None, api_key: str | None = None
) -> Any:
    """The process's one `genai.Client` for this base URL, on aiohttp, without its own retries.

    Args:
        resources: what the process shares; its `slots` size the connection pool.
        base_url: None: the SDK's (GOOGLE_GEMINI_BASE_URL, else Google's).
        api_key: None: the SDK's (GOOGLE_API_KEY, else GEMINI_API_KEY).

    Raises:
        ProviderError: of kind `authentication` where there is no key.
    """
    opener = partial(_open, resources.slots, base_url, api_key)
    # Two keys at one server are two clients; the name may be logged, so it holds a hash.
    return await resources.shared(f"gemini client {hash(api_key)} of {base_url}", opener)


async def _open(slots: int, base_url: str | None, api_key: str | None) -> Opened[Any]:
    # Importing takes a second: not on the loop, where other items wait for theirs.
    genai = await asyncio.to_thread(importlib.import_module, "google.genai")
    aiohttp = importlib.import_module("aiohttp")
    types = genai.types
    # It says "AFC is enabled" for each call, at INFO.
    logging.getLogger("google_genai.models").setLevel(logging.WARNING)
    connector = aiohttp.TCPConnector(limit=slots + SPARE_CONNECTIONS, keepalive_timeout=60)
    session = aiohttp.ClientSession(
        connector=connector,
        trust_env=True,
        response_class=bounded_response(),
        raise_for_status=_readable_error,
    )
    options = types.HttpOptions(
        base_url=base_url,
        aiohttp_client=session,
        client_args={"follow_redirects": False},
        # The SDK's retries ignore Retry-After, and hold a slot: the item runner retries.
        retry_options=types.HttpRetryOptions(attempts=1),
    )
    try:
        client = genai.Client(api_key=api_key, http_options=options)
    except ValueError as error:
        await session.close()
        raise ProviderError(
            "no Gemini API key: set GEMINI_API_KEY (get one at https://aistudio.google.com/apikey)",
            kind=FailureKind.AUTHENTICATION,
        ) from error

    keep_secret(account_of(client)[-1])
    _continue_nothing(client.aio.models)

    async def close() -> None:
        await client.aio.aclose()
        await session.close()

    return Opened(client, close)


async def _readable_error(response: Any) -> None:
    """Raise for an error whose body is not the JSON that it is said to be: the SDK would fail at
    that, and nobody would know the status."""
    if response.status < 400 or not str(response.content_type).endswith("json"):
        return
    content = await response.read()
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        raise _refused(response.status, content, response.headers, "APIError") from None


def _continue_nothing(models: Any) -> None:
    """Keep `generate_content` to one request, whoever calls it (PydanticAI gives a config of its
    own): the SDK would go on for as long as the answer says CONTINUATION, each request paid."""
    generate = models.generate_content

    async def generate_once(*, config: Any = None, **arguments: Any) -> Any:
        if config is None or isinstance(config, Mapping):
            config = {**(config or {}), "automatic_continuation": False}
        elif config.automatic_continuation is not False:
            config = config.model_copy(update={"automatic_continuation": False})
        return await generate(config=config, **arguments)

    models.generate_content = generate_once


def account_of(client: Any) -> list[str]:
    """Server, project, location and key that a client calls with: what a context cache belongs to.
    For hashing only, since the key is among them. A stranger's client may tell nothing."""
    inner = getattr(client, "_api_client", None)
    options = getattr(inner, "_http_options", None)
    parts = [getattr(options, "base_url", None)]
    parts += [getattr(inner, name, None) for name in ("project", "location", "api_key")]
    return [part if isinstance(part, str) else "" for part in parts]


# -- answers


def read_answer(body: str, headers: Mapping[str, str] | None) -> Any:
    """The body of a status 200 as an object with the SDK's names.

    Raises:
        ProviderError: for an error in place of the answer (its code is the status), and of kind
            `unknown` for a body that is none.
    """
    found = bodies.read_object(body)
    error = bodies.error_in(found, "candidates")
    if error is not None:
        raise _refused(bodies.status_in(error), error, headers, "APIError")
    if not isinstance(found.get("candidates"), list):
        found["candidates"] = None
    return bodies.as_attributes(found)


def usage_of(response: Any) -> TokenUsage:
    """Tokens of an answer: thoughts are billed as output, and count as such; cached tokens are
    part of the input."""
    counts = getattr(response, "usage_metadata", None)

    def count(name: str) -> int:
        return tokens(getattr(counts, name, None))

    input_tokens = count("prompt_token_count") + count("tool_use_prompt_token_count")
    output_tokens = count("candidates_token_count") + count("thoughts_token_count")
    total = count("total_token_count")
    return TokenUsage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        total_tokens=max(total if total < MOST_TOKENS else 0, input_tokens + output_tokens),
        cached_input_tokens=count("cached_content_token_count"),
    )


def check_answer(response: Any) -> None:
    """Safety blocks and truncation raise nothing in the SDK; here they do.

    Raises:
        ProviderError: `content_blocked`, `truncated`, or `unknown` (nothing whole was answered:
            the same prompt is asked again).
    """
    reason = name_of(getattr(getattr(response, "prompt_feedback", None), "block_reason", None))
    if reason:
        raise ProviderError(
            f"the prompt was blocked: {reason}",
            kind=FailureKind.CONTENT_BLOCKED,
            error_type="ContentBlocked",
        )
    if not hasattr(response, "candidates") and isinstance(getattr(response, "text", None), str):
        return  # a stand-in of the user's own client
    candidates = getattr(response, "candidates", None)
    if candidates is None or candidates == [] or candidates == [None]:
        raise ProviderError("the answer has no candidates", error_type="EmptyAnswer")
    if not isinstance(candidates, list):
        return
    finish = (finish_reason_of(response) or "").strip().upper()
    if finish == "MAX_TOKENS":
        raise ProviderError(
            "the answer was cut at the output limit: raise max_output_tokens",
            kind=FailureKind.TRUNCATED,
            error_type="Truncated",
        )
    if finish in _BLOCKED:
        raise ProviderError(
            f"the answer was blocked: {finish}",
            kind=FailureKind.CONTENT_BLOCKED,
            error_type="ContentBlocked",
        )
    if finish != _GOOD_END:
        raise ProviderError(
            f"the answer did not come to its end (finish_reason {finish[:40] or None})",
            error_type="UnfinishedAnswer",
        )


def text_of(response: Any) -> str:
    """The answer's text, without its thoughts.

    Raises:
        ProviderError: of kind `unknown` where there is none.
    """
    candidates = getattr(response, "candidates", None)
    if isinstance(candidates, list) and candidates:
        parts = getattr(getattr(candidates[0], "content", None), "parts", None)
        text = "".join(map(_text_of_part, parts)) if isinstance(parts, list) else ""
    else:
        text = getattr(response, "text", None) or ""
    if not text.strip():
        finish = finish_reason_of(response)
        raise ProviderError(f"the answer is empty ({finish})", error_type="EmptyAnswer")
    return text


def _text_of_part(part: Any) -> str:
    text = getattr(part, "text", None)
    return text if isinstance(text, str) and not getattr(part, "thought", None) else ""


def finish_reason_of(response: Any) -> str | None:
    """`STOP`, `MAX_TOKENS`, ... of the first candidate."""
    candidates = getattr(response, "candidates", None)
    if not isinstance(candidates, list) or not candidates:
        return None
    return name_of(getattr(candidates[0], "finish_reason", None))


def safety_ratings_of(response: Any) -> dict[str, str]:
    """Category -> probability of the first candidate, or of the prompt."""
    candidates = getattr(response, "candidates", None)
    first = candidates[0] if isinstance(candidates, list) and candidates else None
    ratings = getattr(first, "safety_ratings", None)
    if ratings is None:
        ratings = getattr(getattr(response, "prompt_feedback", None), "safety_ratings", None)
    named = (
        (name_of(getattr(rating, "category", None)), name_of(getattr(rating, "probability", None)))
        for rating in (ratings if isinstance(ratings, list | tuple) else ())
    )
    return {category: probability or "" for category, probability in named if category}


def name_of(value: Any) -> str | None:
    """An SDK enum's value, or the plain string in its place; None for anything else."""
    plain = getattr(value, "value", value)
    return plain if isinstance(plain, str) and plain else None


# -- errors


def translate(error: BaseException) -> ProviderError | None:
    """An SDK `APIError` as our own; None for anything else (the general rules know it)."""
    details: Any = getattr(error, "details", None)
    code = getattr(error, "code", None) if hasattr(error, "details") else None
    if type(code) is not int:
        return None
    headers = getattr(getattr(error, "response", None), "headers", None)
    body = details or {"message": getattr(error, "message", None)}
    translated = redirected(error, code) or _refused(code, body, headers, type(error).__name__)
    translated.__cause__ = error
    return translated


def _refused(
    status: int | None, body: Any, headers: Mapping[str, str] | None, error_type: str
) -> ProviderError:
    """What an error's body says: of an error status, or (`status` by its own word) of a 200."""
    fields = bodies.fields_of(body)
    details, words = details_of(fields), bodies.words_of(body)
    retry_after = retry_delay(details)
    if retry_after is None:
        retry_after = retry_after_of(headers)
    kind = FailureKind.UNKNOWN
    if status is not None and status >= 300:
        kind = kind_of_error(status, details, words)
    if kind is FailureKind.QUOTA_EXHAUSTED and retry_after is None:
        retry_after = seconds_to_pacific_midnight(datetime.now(_PACIFIC))
    named = fields.get("status")
    name = f" {named}." if isinstance(named, str) and named.isascii() else ""
    return ProviderError(
        condensed(f"{status or ''}{name} {words}".strip() or "an error without a word"),
        kind=kind,
        status=status,
        retry_after=retry_after,
        error_type=error_type,
    )


_PACIFIC = ZoneInfo("America/Los_Angeles")


def seconds_to_pacific_midnight(now: datetime) -> float:
    """Gemini's day quotas are reset at midnight Pacific time."""
    tomorrow = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return tomorrow.timestamp() - now.timestamp()


def details_of(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The google.rpc details of an error's body."""
    details = fields.get("details")
    found = details if isinstance(details, list) else []
    return [detail for detail in found if isinstance(detail, Mapping)]


def _of_type(details: list[Mapping[str, Any]], name: str) -> Iterator[Mapping[str, Any]]:
    return (detail for detail in details if str(detail.get("@type", "")).endswith(f".{name}"))


def retry_delay(details: list[Mapping[str, Any]]) -> float | None:
    """Seconds to wait, where a `RetryInfo` says so."""
    for detail in _of_type(details, "RetryInfo"):
        match = _DURATION.fullmatch(str(detail.get("retryDelay", "")))
        if match:
            return float(match.group(1))
    return None


def kind_of_error(code: int, details: list[Mapping[str, Any]], message: str) -> FailureKind:
    """The failure kind of a Google error: by its details, then its status and words."""
    reasons = {str(detail.get("reason")) for detail in _of_type(details, "ErrorInfo")}
    if reasons & _KEY_REASONS or (code == 400 and "api key" in message.lower()):
        return FailureKind.AUTHENTICATION
    if reasons & _BILLING_REASONS:
        return FailureKind.BILLING
    if code == 429:
        return _kind_of_429(details, message)
    if code == 400 and "billing" in message.lower():
        return FailureKind.BILLING
    return kind_of_refusal(code, message)


def _kind_of_429(details: list[Mapping[str, Any]], message: str) -> FailureKind:
    """Which 429. The message alone won't do: every one of them says "check your plan and billing
    details"; the violated quota's id tells minute from day, a free tier of 0 that money is
    missing."""
    violations = [
        violation
        for detail in _of_type(details, "QuotaFailure")
        for violation in detail.get("violations") or ()
    ]
    words = json.dumps(violations, default=str) + message
    nothing = any(str(violation.get("quotaValue")) == "0" for violation in violations)
    if re.search(r"free_?tier", words, re.IGNORECASE) and (nothing or _LIMIT_0.search(message)):
        return FailureKind.BILLING
    if "prepayment" in message.lower():
        return FailureKind.BILLING
    names = " ".join(
        str(violation.get(name, "")) for violation in violations for name in ("quotaId", "subject")
    )
    if re.search(r"PerDay|per day", f"{names} {message}", re.IGNORECASE):
        return FailureKind.QUOTA_EXHAUSTED
    return FailureKind.RATE_LIMITED
