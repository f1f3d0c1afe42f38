"""The google-genai client, and how its answers and errors are read."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

from batchllm_celery.errors import FailureKind, ProviderError
from batchllm_celery.models import TokenUsage
from batchllm_celery.providers import bodies, google_rpc
from batchllm_celery.providers.http import EXTRA_CONNECTIONS, bounded_response, redirected
from batchllm_celery.redaction import keep_secret
from batchllm_celery.strategies.base import Opened, ProcessResources
from batchllm_celery.strategies.failures import condensed, retry_after_of
from batchllm_celery.strategies.usage import MOST_TOKENS
from batchllm_celery.strategies.usage import count as tokens

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
#: The finish reason of a complete answer. Any reason that is not known here fails the attempt.
_GOOD_END = "STOP"


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
    connector = aiohttp.TCPConnector(limit=slots + EXTRA_CONNECTIONS, keepalive_timeout=60)
    session = aiohttp.ClientSession(
        connector=connector,
        # A proxy of the environment leads to Google's, not to a server that we name (the simulated
        # provider, mostly on this machine).
        trust_env=base_url is None,
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
    _disable_continuation(client.aio.models)

    async def close() -> None:
        await client.aio.aclose()
        await session.close()

    return Opened(client, close)


async def _readable_error(response: Any) -> None:
    """Raise for an error whose body is not JSON although its content type is: the SDK would fail to
    parse it, and the status would be lost."""
    if response.status < 400 or not str(response.content_type).endswith("json"):
        return
    content = await response.read()
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        raise _refused(response.status, content, response.headers, "APIError") from None


def _disable_continuation(models: Any) -> None:
    """Keep `generate_content` to one request, also when PydanticAI calls it with its own config.

    The SDK sends another paid request each time that the finish reason is CONTINUATION.
    """
    generate = models.generate_content

    async def generate_once(*, config: Any = None, **arguments: Any) -> Any:
        if config is None or isinstance(config, Mapping):
            config = {**(config or {}), "automatic_continuation": False}
        elif config.automatic_continuation is not False:
            config = config.model_copy(update={"automatic_continuation": False})
        return await generate(config=config, **arguments)

    models.generate_content = generate_once


def account_of(client: Any) -> list[str]:
    """Server, project, location and key of a client: what a context cache belongs to.

    For hashing only, since the key is among them. Parts that a user's own client hides are empty.
    """
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
    """The failure that an error's body describes.

    `status` is HTTP's, or the one that the body names for an error under status 200.
    """
    fields = bodies.fields_of(body)
    details, words = google_rpc.details_of(fields), bodies.words_of(body)
    retry_after = google_rpc.retry_delay(details)
    if retry_after is None:
        retry_after = retry_after_of(headers)
    kind = FailureKind.UNKNOWN
    if status is not None and status >= 300:
        kind = google_rpc.kind_of_error(status, details, words)
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
