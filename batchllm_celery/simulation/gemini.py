"""Gemini's wire format: bodies in, bodies out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from batchllm_celery.simulation.answers import count_tokens
from batchllm_celery.simulation.caches import DEFAULT_TTL_SECONDS, CachedContent
from batchllm_celery.simulation.config import RetryHint
from batchllm_celery.simulation.provider import Provider
from batchllm_celery.simulation.quotas import QuotaRefusal
from batchllm_celery.simulation.replies import GenerateRequest, Reply, ReplyOutcome
from batchllm_celery.simulation.strictness import check
from batchllm_celery.simulation.wire import HttpAnswer, WireError, retry_after_header

_STATUS_NAMES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "CANCELLED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
    529: "UNAVAILABLE",
}
_MESSAGES = {
    500: "An internal error has occurred. Please retry.",
    503: "The model is overloaded. Please try again later.",
    504: "The request timed out. Please try again.",
}
_METRIC = "generativelanguage.googleapis.com/generate_content"
#: Our limit -> metric, quota id, as the real service names them.
_QUOTAS = {
    "rpm": (f"{_METRIC}_requests", "GenerateRequestsPerMinutePerProjectPerModel"),
    "tpm": (f"{_METRIC}_token_count", "GenerateContentTokensPerModelPerMinute"),
    "input_tpm": (f"{_METRIC}_input_token_count", "GenerateContentInputTokensPerModelPerMinute"),
    "output_tpm": (f"{_METRIC}_output_token_count", "GenerateContentOutputTokensPerModelPerMinute"),
    "rpd": (f"{_METRIC}_requests", "GenerateRequestsPerDayPerProjectPerModel"),
    "concurrency": (f"{_METRIC}_concurrent_requests", "GenerateConcurrentRequestsPerProject"),
    "injected": (f"{_METRIC}_requests", "GenerateRequestsPerMinutePerProjectPerModel"),
    "billing": (
        f"{_METRIC}_free_tier_requests",
        "GenerateRequestsPerDayPerProjectPerModel-FreeTier",
    ),
}


def check_key(provider: Provider, key: str | None) -> None:
    """Refuse a missing or a wrong key where one is required."""
    wanted = provider.config.api_key
    if wanted is None or key == wanted:
        return
    if not key:
        raise WireError(403, "Method doesn't allow unregistered callers. Please use API Key.")
    reason = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": "API_KEY_INVALID",
        "domain": "googleapis.com",
    }
    raise WireError(400, "API key not valid. Please pass a valid API key.", details=[reason])


def check_model(provider: Provider, model: str) -> None:
    """Refuse a model that does not exist."""
    models = provider.config.models
    if models is not None and model not in models:
        raise WireError(404, f"models/{model} is not found for API version v1beta")


def parse_generate(provider: Provider, model: str, body: Mapping[str, Any]) -> GenerateRequest:
    """Read a generateContent body; both spellings of field names are understood."""
    if provider.config.strict:
        check("gemini", body)
    contents = _get(body, "contents")
    prompt = _user_text(contents)
    if not prompt and not _has_parts(contents):
        raise WireError(400, "* GenerateContentRequest.contents: contents is not specified")
    settings = _get(body, "generationConfig") or {}
    tool, schema = _forced_tool(body)
    if tool is None:
        schema = next(
            (found for name in _SCHEMAS if (found := _get(settings, name)) is not None), None
        )
    return GenerateRequest(
        model=model,
        prompt=prompt,
        system=_text(_get(body, "systemInstruction")),
        wants_json=_get(settings, "responseMimeType") == "application/json",
        schema=schema,
        tool=tool,
        max_output_tokens=_get(settings, "maxOutputTokens"),
        cached_tokens=_cached_tokens(provider, model, body),
        body=body,
    )


def generated(request: GenerateRequest, reply: Reply) -> HttpAnswer:
    """The body of an answer, or of one that failed."""
    if reply.outcome is ReplyOutcome.ERROR:
        return error(WireError(reply.status, _MESSAGES.get(reply.status, "Simulated error.")))
    body: dict[str, Any] = {
        "usageMetadata": _usage(reply),
        "modelVersion": request.model,
        "responseId": "simulated",
    }
    if reply.outcome is ReplyOutcome.BLOCKED:
        body["promptFeedback"] = {"blockReason": "SAFETY", "safetyRatings": _ratings("HIGH")}
        return HttpAnswer(200, body)
    candidate: dict[str, Any] = {
        "content": {"role": "model", "parts": [_part(reply)]},
        "finishReason": "MAX_TOKENS" if reply.outcome is ReplyOutcome.TRUNCATED else "STOP",
        "index": 0,
        "safetyRatings": _ratings("NEGLIGIBLE"),
    }
    return HttpAnswer(200, {"candidates": [candidate], **body})


def refused(provider: Provider, request: GenerateRequest, refusal: QuotaRefusal) -> HttpAnswer:
    """The body of a 429, with the violated quota and the retry hint."""
    metric, quota_id = _QUOTAS[refusal.limit_name]
    limit = f"{refusal.limit:g}"
    violation = {
        "quotaMetric": metric,
        "quotaId": quota_id,
        "quotaDimensions": {"location": "global", "model": request.model},
        "quotaValue": limit,
    }
    details: list[dict[str, Any]] = [
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [violation]}
    ]
    message = (
        "You exceeded your current quota, please check your plan and billing details.\n"
        f"* Quota exceeded for metric: {metric}, limit: {limit}, model: {request.model}"
    )
    hint, headers = provider.config.retry_hint, {}
    if hint is RetryHint.RETRY_INFO and refusal.retry_after > 0:
        delay = f"{refusal.retry_after:.3f}s"
        details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay})
        message += f"\nPlease retry in {delay}."
    elif hint is RetryHint.RETRY_AFTER:
        headers = retry_after_header(refusal)
    return error(WireError(429, message, details=details, headers=headers))


def error(problem: WireError) -> HttpAnswer:
    """The body of an error."""
    body: dict[str, Any] = {
        "code": problem.status,
        "message": problem.message,
        "status": _STATUS_NAMES[problem.status],
    }
    if problem.details:
        body["details"] = problem.details
    return HttpAnswer(problem.status, {"error": body}, problem.headers)


def count(body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to countTokens."""
    request = _get(body, "generateContentRequest") or body
    text = _text(_get(request, "systemInstruction")) + _text(_get(request, "contents"))
    return {"totalTokens": count_tokens(text)}


def create_cache(provider: Provider, body: Mapping[str, Any]) -> dict[str, Any]:
    """Make a context cache."""
    model = str(_get(body, "model") or "")
    if not model:
        raise WireError(400, "model is required")
    check_model(provider, model.removeprefix("models/"))
    tokens = count_tokens(_text(_get(body, "systemInstruction")) + _text(_get(body, "contents")))
    least = provider.config.min_cache_tokens
    if tokens < least:
        raise WireError(
            400,
            f"Cached content is too small. total_token_count={tokens}, "
            f"min_total_token_count={least}",
        )
    name = str(_get(body, "displayName") or "")
    if len(name) > 128:
        raise WireError(400, "display_name must be no more than 128 characters")
    return cache_body(provider.caches.create(model, name, tokens, _ttl(provider, body)))


def update_cache(provider: Provider, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Prolong a context cache."""
    cache = provider.caches.update(name, _ttl(provider, body))
    return cache_body(cache or _missing_cache(provider))


def get_cache(provider: Provider, name: str) -> dict[str, Any]:
    """Read a context cache."""
    return cache_body(provider.caches.get(name) or _missing_cache(provider))


def delete_cache(provider: Provider, name: str) -> dict[str, Any]:
    """Delete a context cache."""
    if not provider.caches.delete(name):
        _missing_cache(provider)
    return {}


def list_caches(provider: Provider, query: Mapping[str, str]) -> dict[str, Any]:
    """One page of the context caches."""
    size = min(1000, int(query.get("pageSize") or 50))
    page, following = provider.caches.page(int(query.get("pageToken") or 0), size)
    body: dict[str, Any] = {"cachedContents": [cache_body(cache) for cache in page]}
    if following is not None:
        body["nextPageToken"] = str(following)
    return body


def cache_body(cache: CachedContent) -> dict[str, Any]:
    """A context cache as JSON."""
    return {
        "name": cache.name,
        "model": cache.model,
        "displayName": cache.display_name,
        "createTime": _timestamp(cache.created),
        "updateTime": _timestamp(cache.updated),
        "expireTime": _timestamp(cache.expires),
        "usageMetadata": {"totalTokenCount": cache.tokens},
    }


_SCHEMAS = ("responseJsonSchema", "responseSchema", "_responseJsonSchema")


def _get(body: Mapping[str, Any], name: str) -> Any:
    """A field under its camelCase or its snake_case name; the SDK mixes the two."""
    if name in body:
        return body[name]
    return body.get("".join(f"_{char.lower()}" if char.isupper() else char for char in name))


def _text(content: Any) -> str:
    """All text of a content, of several, or of a bare string."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(filter(None, map(_text, content)))
    if isinstance(content, Mapping):
        return str(content.get("text") or "") + _text(content.get("parts"))
    return ""


def _user_text(contents: Any) -> str:
    if not isinstance(contents, list):
        return _text(contents)
    asked = [
        one for one in contents if not (isinstance(one, Mapping) and one.get("role") == "model")
    ]
    return _text(asked)


def _has_parts(contents: Any) -> bool:
    turns = contents if isinstance(contents, list) else [contents]
    return any(isinstance(turn, Mapping) and turn.get("parts") for turn in turns)


def _forced_tool(body: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any] | None]:
    calling = _get(_get(body, "toolConfig") or {}, "functionCallingConfig") or {}
    if str(_get(calling, "mode")).upper() != "ANY":
        return None, None
    for tool in _get(body, "tools") or ():
        for function in _get(tool, "functionDeclarations") or ():
            parameters = _get(function, "parametersJsonSchema") or _get(function, "parameters")
            return str(function["name"]), parameters or {"type": "object"}
    return None, None


def _cached_tokens(provider: Provider, model: str, body: Mapping[str, Any]) -> int:
    name = _get(body, "cachedContent")
    if not name:
        return 0
    cache = provider.caches.get(str(name)) or _missing_cache(provider)
    if cache.model.removeprefix("models/") != model:
        raise WireError(
            400, f"Model used by GenerateContent request (models/{model}) and CachedContent differ"
        )
    if _get(body, "systemInstruction") or _get(body, "tools"):
        raise WireError(
            400,
            "CachedContent can not be used with GenerateContent request setting "
            "system_instruction, tools or tool_config.",
        )
    return cache.tokens


def _missing_cache(provider: Provider) -> CachedContent:
    status = provider.config.missing_cache_status
    raise WireError(status, "CachedContent not found (or permission denied)")


def _ttl(provider: Provider, body: Mapping[str, Any]) -> float:
    """Seconds from now that `ttl` ("3600s") or `expireTime` asks for."""
    ttl, expire = _get(body, "ttl"), _get(body, "expireTime")
    try:
        if ttl is not None:
            return float(str(ttl).removesuffix("s"))
        if expire is not None:
            return datetime.fromisoformat(str(expire)).timestamp() - provider.clock()
    except ValueError as cause:
        raise WireError(400, "Invalid value for ttl or expire_time") from cause
    return DEFAULT_TTL_SECONDS


def _timestamp(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")


def _part(reply: Reply) -> dict[str, Any]:
    if reply.tool is None:
        return {"text": reply.text}
    try:
        arguments = json.loads(reply.text)
    except ValueError:  # a malformed answer: Gemini's arguments are always an object
        arguments = {}
    return {"functionCall": {"name": reply.tool, "args": arguments}}


def _usage(reply: Reply) -> dict[str, int]:
    usage = {
        "promptTokenCount": reply.input_tokens,
        "totalTokenCount": reply.input_tokens + reply.output_tokens + reply.thoughts_tokens,
    }
    if reply.output_tokens:
        usage["candidatesTokenCount"] = reply.output_tokens
    if reply.thoughts_tokens:
        usage["thoughtsTokenCount"] = reply.thoughts_tokens
    if reply.cached_tokens:
        usage["cachedContentTokenCount"] = reply.cached_tokens
    return usage


def _ratings(probability: str) -> list[dict[str, str]]:
    return [{"category": "HARM_CATEGORY_DANGEROUS_CONTENT", "probability": probability}]
