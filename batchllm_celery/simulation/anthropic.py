"""Anthropic's wire format (Messages): bodies in, bodies out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from batchllm_celery.simulation.answers import count_tokens, digest_of
from batchllm_celery.simulation.provider import Provider
from batchllm_celery.simulation.quotas import QuotaRefusal
from batchllm_celery.simulation.replies import GenerateRequest, Reply, ReplyOutcome
from batchllm_celery.simulation.strictness import check
from batchllm_celery.simulation.wire import HttpAnswer, WireError, retry_after_header

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def check_key(provider: Provider, key: str | None, version: str | None) -> None:
    """Refuse a missing or a wrong key where one is required, and a call without a version."""
    if not version:
        raise WireError(400, "anthropic-version: header is required")
    wanted = provider.config.api_key
    if wanted is not None and key != wanted:
        raise WireError(401, "invalid x-api-key")


def parse_message(provider: Provider, body: Mapping[str, Any]) -> GenerateRequest:
    """Read the body of messages."""
    if provider.config.strict:
        check("anthropic", body)
    model = str(body.get("model"))
    models = provider.config.models
    if models is not None and model not in models:
        raise WireError(404, f"model: {model}")
    if body.get("stream"):
        raise WireError(400, "stream: Streaming is not simulated.")
    asked = [one for one in body.get("messages") or () if one.get("role") == "user"]
    config = body.get("output_config") or {}
    schema = (config.get("format") or {}).get("schema")
    tool, parameters = _forced_tool(body)
    return GenerateRequest(
        model=model,
        prompt="\n".join(filter(None, (_text(one.get("content")) for one in asked))),
        system=_text(body.get("system")),
        wants_json=schema is not None,
        schema=parameters if tool else schema,
        tool=tool,
        max_output_tokens=body.get("max_tokens"),
        body=body,
    )


def answered(provider: Provider, request: GenerateRequest, reply: Reply, number: int) -> HttpAnswer:
    """The body of a message, or of one that failed."""
    if reply.outcome is ReplyOutcome.ERROR:
        words = "Overloaded" if reply.status in (503, 529) else "Internal server error"
        return error(WireError(reply.status, words))
    stop = "end_turn"
    content: list[dict[str, Any]] = [{"type": "text", "text": reply.text, "citations": None}]
    if reply.outcome is ReplyOutcome.TRUNCATED:
        stop = "max_tokens"
    elif reply.outcome is ReplyOutcome.BLOCKED:
        stop, content = "refusal", []
    elif reply.tool is not None:
        stop = "tool_use"
        content = [
            {
                "type": "tool_use",
                "id": f"toolu_{digest_of(request.prompt)}",
                "name": reply.tool,
                "input": _object(reply.text),
            }
        ]
    return HttpAnswer(
        200,
        {
            "id": f"msg_{number:08x}",
            "type": "message",
            "role": "assistant",
            "model": request.model,
            "content": content,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": _usage(provider, request, reply),
        },
        {"request-id": f"req_{number:08x}"},
    )


def refused(request: GenerateRequest, refusal: QuotaRefusal) -> HttpAnswer:
    """The body of a 429."""
    words = f"This request would exceed your rate limit of {refusal.limit:g} ({request.model})"
    return error(WireError(429, words, headers=retry_after_header(refusal)))


def error(problem: WireError) -> HttpAnswer:
    """The body of an error."""
    usual = "api_error" if problem.status >= 500 else "invalid_request_error"
    inner = {"type": _TYPES.get(problem.status, usual), "message": problem.message}
    return HttpAnswer(problem.status, {"type": "error", "error": inner}, problem.headers)


def _usage(provider: Provider, request: GenerateRequest, reply: Reply) -> dict[str, int]:
    """Cached input is counted beside the input; the first call with a marked prefix writes it."""
    marked = _marked(request.body or {})
    total, read, written = reply.input_tokens, 0, 0
    if marked:
        tokens = min(count_tokens(marked), total)
        if provider.remembers(f"anthropic {request.model} {marked}"):
            read = tokens
        else:
            written = tokens
    return {
        "input_tokens": total - read - written,
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": written,
        "output_tokens": reply.output_tokens + reply.thoughts_tokens,
    }


def _marked(body: Mapping[str, Any]) -> str:
    """The text up to the last `cache_control` in tools and system."""
    blocks = [*(body.get("tools") or ())]
    system = body.get("system")
    blocks += system if isinstance(system, list) else []
    last = max((i for i, b in enumerate(blocks) if b.get("cache_control")), default=-1)
    return "\n".join(block.get("text") or json.dumps(block) for block in blocks[: last + 1])


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = []
    for part in parts:
        if part.get("type") == "text":
            texts.append(str(part["text"]))
        elif part.get("type") == "tool_result":
            texts.append(_text(part.get("content")))
    return "\n".join(filter(None, texts))


def _forced_tool(body: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any] | None]:
    choice = body.get("tool_choice") or {}
    tools = list(body.get("tools") or ())
    if choice.get("type") == "tool":
        tools = [tool for tool in tools if tool.get("name") == choice.get("name")]
    elif choice.get("type") != "any":
        return None, None
    if not tools:
        return None, None
    return tools[0]["name"], tools[0].get("input_schema") or {"type": "object"}


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
