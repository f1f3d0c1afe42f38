"""The openai client as we use it, and its answers and errors as our own words."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from batchllm_celery.errors import FailureKind, ProviderError, UsageError
from batchllm_celery.models import TokenUsage
from batchllm_celery.strategies.base import Opened, ProcessResources
from batchllm_celery.strategies.failures import kind_of_status, retry_after_of
from batchllm_celery.strategies.usage import Reading, count, reasoned_output

#: Sockets beyond the slots: those of cancelled calls that still close.
SPARE_CONNECTIONS = 16

_BILLING_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_BLOCKED_CODES = {"content_filter", "content_policy_violation"}
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
    if not key and not (base_url or os.environ.get("OPENAI_BASE_URL")):
        raise ProviderError(
            "no OpenAI API key: set OPENAI_API_KEY "
            "(get one at https://platform.openai.com/api-keys)",
            kind=FailureKind.AUTHENTICATION,
        )
    most = slots + SPARE_CONNECTIONS
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
        max_connections=most, max_keepalive_connections=most, keepalive_expiry=60.0
    )
    client = openai.AsyncOpenAI(
        api_key=key or "not-needed",
        base_url=base_url,
        max_retries=0,  # they hold a slot for as long as Retry-After says: the runner retries
        timeout=None,  # the runner bounds each attempt
        http_client=openai.DefaultAioHttpClient(limits=limits, timeout=None),
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


def text_of(response: Any) -> str:
    """The answer's text.

    Raises:
        ProviderError: `content_blocked`, `truncated`, or `unknown` where nothing was answered.
    """
    choices = getattr(response, "choices", None)
    if not choices:
        raise ProviderError("the answer has no choices", error_type="EmptyAnswer")
    message, finish = choices[0].message, choices[0].finish_reason
    if finish == "length":
        raise ProviderError(
            "the answer was cut at the output limit: raise max_output_tokens",
            kind=FailureKind.TRUNCATED,
            error_type="Truncated",
        )
    if finish == "content_filter" or getattr(message, "refusal", None):
        raise ProviderError(
            "the answer was blocked",
            kind=FailureKind.CONTENT_BLOCKED,
            error_type="ContentBlocked",
        )
    if not message.content:
        raise ProviderError(f"the answer is empty ({finish})", error_type="EmptyAnswer")
    return str(message.content)


# -- errors


def translate(error: BaseException) -> ProviderError | None:
    """An SDK error as our own; None for anything that the general rules know."""
    status = getattr(error, "status_code", None)
    if type(status) is int and hasattr(error, "body"):
        translated = _translate_status(error, status)
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


def _translate_status(error: BaseException, status: int) -> ProviderError:
    body = _body(error)
    message = str(body.get("message") or getattr(error, "message", ""))
    headers = getattr(getattr(error, "response", None), "headers", None)
    retry_after = retry_after_of(headers)
    return ProviderError(
        message,
        kind=_kind(status, _codes(error, body), message),
        status=status,
        retry_after=retry_after if retry_after is not None else _wait_named_in(message),
        error_type=type(error).__name__,
    )


def _never_connected(error: BaseException) -> bool:
    """On aiohttp the SDK calls every broken connection a timeout; its cause knows better."""
    cause: BaseException | None = error
    while cause is not None:
        names = {cls.__name__ for cls in type(cause).__mro__}
        if "ClientConnectionError" in names and not isinstance(cause, TimeoutError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _body(error: BaseException) -> Mapping[str, Any]:
    body = getattr(error, "body", None)
    inner = body.get("error", body) if isinstance(body, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _codes(error: BaseException, body: Mapping[str, Any]) -> set[str]:
    names = [body.get("code"), body.get("type")]
    names += [getattr(error, name, None) for name in ("code", "type")]
    return {name for name in names if isinstance(name, str)}


def _kind(status: int, codes: set[str], message: str) -> FailureKind:
    if codes & _BILLING_CODES:
        return FailureKind.BILLING
    if codes & _BLOCKED_CODES:
        return FailureKind.CONTENT_BLOCKED
    if status != 429:
        return kind_of_status(status)
    if message.startswith("Request too large"):
        # No wait makes it smaller: as a refusal it would cool the fleet down for ever.
        return FailureKind.INVALID_REQUEST
    return FailureKind.QUOTA_EXHAUSTED if _DAY.search(message) else FailureKind.RATE_LIMITED


def _wait_named_in(message: str) -> float | None:
    """Seconds of "Please try again in 1m2.5s"."""
    match = _TRY_AGAIN.search(message)
    if match is None:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)", match.group(1).lower())
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)
