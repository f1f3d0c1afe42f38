"""OpenAI's wire format (chat completions): bodies in, bodies out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchllm_celery.simulation.answers import digest_of
from batchllm_celery.simulation.config import RetryHint
from batchllm_celery.simulation.provider import Provider
from batchllm_celery.simulation.quotas import QuotaRefusal
from batchllm_celery.simulation.replies import GenerateRequest, Reply, ReplyOutcome
from batchllm_celery.simulation.strictness import check
from batchllm_celery.simulation.wire import HttpAnswer, WireError, retry_after_header

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
#: Our limit -> OpenAI's error type and the limit's name in its message.
_LIMITS = {
    "rpm": ("requests", "requests per min (RPM)"),
    "tpm": ("tokens", "tokens per min (TPM)"),
    "input_tpm": ("tokens", "input tokens per min (TPM)"),
    "output_tpm": ("tokens", "output tokens per min (TPM)"),
    "rpd": ("requests", "requests per day (RPD)"),
    "concurrency": ("requests", "concurrent requests"),
    "injected": ("requests", "requests per min (RPM)"),
}


def check_key(provider: Provider, authorization: str | None) -> None:
    """Refuse a missing or a wrong key where one is required."""
    wanted = provider.config.api_key
    if wanted is not None and authorization != f"Bearer {wanted}":
        raise WireError(401, "Incorrect API key provided.", code="invalid_api_key")


def parse_chat(provider: Provider, body: Mapping[str, Any]) -> GenerateRequest:
    """Read a chat completion's body."""
    if provider.config.strict:
        check("openai", body)
    model = str(body.get("model") or "")
    messages = body.get("messages")
    if not model or not isinstance(messages, list) or not messages:
        raise WireError(400, "You must provide a model and messages.", code="missing_parameter")
    models = provider.config.models
    if models is not None and model not in models:
        raise WireError(404, f"The model `{model}` does not exist.", code="model_not_found")
    if body.get("stream"):
        raise WireError(400, "Streaming is not simulated.", code="unsupported_value")
    system = _texts(messages, "system", "developer")
    wants_json, schema = _response_format(body.get("response_format"))
    tool, parameters = _forced_tool(body)
    return GenerateRequest(
        model=model,
        prompt=_texts(messages, "user"),
        system=system,
        wants_json=wants_json,
        schema=parameters if tool else schema,
        tool=tool,
        max_output_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
        user=str(body["user"]) if body.get("user") is not None else None,
        body=body,
    )


def completed(
    provider: Provider, request: GenerateRequest, reply: Reply, number: int
) -> HttpAnswer:
    """The body of a completion, or of one that failed."""
    if reply.outcome is ReplyOutcome.ERROR:
        message = "The server had an error while processing your request. Sorry about that!"
        if reply.status == 503:
            message = "The engine is currently overloaded, please try again later"
        return error(WireError(reply.status, message))
    cached = min(provider.cached_system_tokens(request.system), reply.input_tokens)
    body = {
        "id": f"chatcmpl-{number:08x}",
        "object": "chat.completion",
        "created": int(provider.clock()),
        "model": request.model,
        "choices": [_choice(request, reply, index) for index in range(_answers_of(request))],
        "usage": _usage(reply, cached),
    }
    return HttpAnswer(200, body)


def refused(provider: Provider, request: GenerateRequest, refusal: QuotaRefusal) -> HttpAnswer:
    """The body of a 429."""
    if refusal.limit_name == "billing":
        message = "You exceeded your current quota, please check your plan and billing details."
        return error(WireError(429, message, code="insufficient_quota"), "insufficient_quota")
    kind, words = _LIMITS[refusal.limit_name]
    message = (
        f"Rate limit reached for {request.model} in organization org-simulated on {words}: "
        f"Limit {refusal.limit:g}."
    )
    hint, headers = provider.config.retry_hint, {}
    if hint is RetryHint.RETRY_INFO:
        milliseconds = max(1, round(refusal.retry_after * 1000))
        headers = {"retry-after-ms": str(milliseconds), **retry_after_header(refusal)}
        message += f" Please try again in {milliseconds}ms."
    elif hint is RetryHint.RETRY_AFTER:
        headers = retry_after_header(refusal)
    problem = WireError(429, message, headers=headers, code="rate_limit_exceeded")
    return error(problem, kind)


def error(problem: WireError, kind: str | None = None) -> HttpAnswer:
    """The body of an error."""
    usual = "server_error" if problem.status >= 500 else "invalid_request_error"
    body = {
        "message": problem.message,
        "type": kind or _TYPES.get(problem.status, usual),
        "param": None,
        "code": problem.code,
    }
    return HttpAnswer(problem.status, {"error": body}, problem.headers)


def models(provider: Provider) -> dict[str, Any]:
    """The list of models."""
    names = provider.config.models or ("simulated",)
    listed = [
        {"id": name, "object": "model", "created": 0, "owned_by": "simulated"} for name in names
    ]
    return {"object": "list", "data": listed}


def _texts(messages: list[Any], *roles: str) -> str:
    texts = (_text(one.get("content")) for one in messages if one.get("role") in roles)
    return "\n".join(filter(None, texts))


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part["text"]) for part in parts if part.get("type") == "text")


def _response_format(form: Any) -> tuple[bool, Mapping[str, Any] | None]:
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "json_schema":
        return True, form["json_schema"].get("schema")
    return kind == "json_object", None


def _forced_tool(body: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any] | None]:
    choice = body.get("tool_choice")
    tools = [tool["function"] for tool in body.get("tools") or () if tool.get("type") == "function"]
    if isinstance(choice, Mapping):
        name = choice.get("function", {}).get("name")
        tools = [tool for tool in tools if tool["name"] == name]
    elif choice != "required":
        return None, None
    if not tools:
        return None, None
    return tools[0]["name"], tools[0].get("parameters") or {"type": "object"}


def _answers_of(request: GenerateRequest) -> int:
    asked = (request.body or {}).get("n")
    return asked if isinstance(asked, int) and 1 <= asked <= 128 else 1


def _logprobs(request: GenerateRequest, reply: Reply) -> dict[str, Any] | None:
    body = request.body or {}
    if not body.get("logprobs"):
        return None
    tops = [{"token": reply.text[:4], "logprob": -0.1, "bytes": None}]
    token = {**tops[0], "top_logprobs": tops[: int(body.get("top_logprobs") or 0)]}
    return {"content": [token], "refusal": None}


def _choice(request: GenerateRequest, reply: Reply, index: int) -> dict[str, Any]:
    digest = digest_of(request.prompt)
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    finish = "length" if reply.outcome is ReplyOutcome.TRUNCATED else "stop"
    if reply.outcome is ReplyOutcome.BLOCKED:
        finish = "content_filter"
        message |= {"content": None, "refusal": "I can't help with that."}
    elif reply.tool is not None:
        function = {"name": reply.tool, "arguments": reply.text}
        called = [{"id": f"call_{digest}", "type": "function", "function": function}]
        message |= {"content": None, "tool_calls": called}
        finish = "tool_calls" if finish == "stop" else finish
    logprobs = _logprobs(request, reply)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}


def _usage(reply: Reply, cached: int) -> dict[str, Any]:
    output = reply.output_tokens + reply.thoughts_tokens  # OpenAI counts reasoning as output
    return {
        "prompt_tokens": reply.input_tokens,
        "completion_tokens": output,
        "total_tokens": reply.input_tokens + output,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reply.thoughts_tokens},
    }
