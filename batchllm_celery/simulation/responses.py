"""OpenAI's Responses and embeddings: bodies in, bodies out."""

from __future__ import annotations

import array
import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from batchllm_celery.simulation.answers import digest_of
from batchllm_celery.simulation.openai import error
from batchllm_celery.simulation.provider import Provider
from batchllm_celery.simulation.replies import GenerateRequest, Reply, ReplyOutcome
from batchllm_celery.simulation.strictness import check
from batchllm_celery.simulation.wire import HttpAnswer, WireError

#: Numbers of a vector, where the request names none.
DIMENSIONS = 8


def parse_response(provider: Provider, body: Mapping[str, Any]) -> GenerateRequest:
    """Read a body of responses."""
    if provider.config.strict:
        check("responses", body)
    _check_model(provider, body)
    if body.get("stream") or body.get("background"):
        raise WireError(400, "Only whole answers are simulated.", code="unsupported_value")
    form = (body.get("text") or {}).get("format") or {}
    tool, parameters = _forced_tool(body)
    return GenerateRequest(
        model=str(body["model"]),
        prompt=_text(body.get("input")),
        system=str(body.get("instructions") or ""),
        wants_json=form.get("type") in ("json_schema", "json_object"),
        schema=parameters if tool else form.get("schema"),
        tool=tool,
        max_output_tokens=body.get("max_output_tokens"),
        body=body,
    )


def responded(
    provider: Provider, request: GenerateRequest, reply: Reply, number: int
) -> HttpAnswer:
    """The body of a response, or of one that failed."""
    if reply.outcome is ReplyOutcome.ERROR:
        return error(WireError(reply.status, "The server had an error. Sorry about that!"))
    part: dict[str, Any] = {"type": "output_text", "text": reply.text, "annotations": []}
    if reply.outcome is ReplyOutcome.BLOCKED:
        part = {"type": "refusal", "refusal": "I can't help with that."}
    cut = reply.outcome is ReplyOutcome.TRUNCATED
    item: dict[str, Any] = {
        "type": "message",
        "id": f"msg_{number:08x}",
        "role": "assistant",
        "status": "incomplete" if cut else "completed",
        "content": [part],
    }
    if reply.tool is not None:
        item = {
            "type": "function_call",
            "id": f"fc_{number:08x}",
            "call_id": f"call_{digest_of(request.prompt)}",
            "name": reply.tool,
            "arguments": reply.text,
            "status": "completed",
        }
    output = reply.output_tokens + reply.thoughts_tokens
    body = {
        "id": f"resp_{number:08x}",
        "object": "response",
        "created_at": int(provider.clock()),
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None,
        "instructions": request.system or None,
        "metadata": {},
        "model": request.model,
        "output": [item],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": {
            "input_tokens": reply.input_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": reply.thoughts_tokens},
            "total_tokens": reply.input_tokens + output,
        },
    }
    return HttpAnswer(200, body)


def parse_embeddings(provider: Provider, body: Mapping[str, Any]) -> GenerateRequest:
    """Read a body of embeddings."""
    if provider.config.strict:
        check("embeddings", body)
    _check_model(provider, body)
    return GenerateRequest(
        model=str(body["model"]), prompt="\n".join(_inputs(body)), body=body, only_input=True
    )


def embedded(provider: Provider, request: GenerateRequest, reply: Reply) -> HttpAnswer:
    """A list of vectors, or an error."""
    if reply.outcome is ReplyOutcome.ERROR:
        return error(WireError(reply.status, "The server had an error. Sorry about that!"))
    body = request.body or {}
    size = int(body.get("dimensions") or DIMENSIONS)
    vectors = [_vector(text, size) for text in _inputs(body)]
    in_base64 = body.get("encoding_format") == "base64"
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(vector.tobytes()).decode() if in_base64 else list(vector),
        }
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": reply.input_tokens, "total_tokens": reply.input_tokens}
    found = {"object": "list", "data": data, "model": request.model, "usage": usage}
    return HttpAnswer(200, found)


def _vector(text: str, size: int) -> array.array[float]:
    digest = hashlib.sha256(text.encode()).digest()
    return array.array("f", [(digest[i % 32] - 128) / 128 for i in range(size)])


def _inputs(body: Mapping[str, Any]) -> list[str]:
    given = body["input"]
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given and all(isinstance(one, int) for one in given):
        return [str(given)]
    return [str(one) for one in given] if isinstance(given, list) else [str(given)]


def _check_model(provider: Provider, body: Mapping[str, Any]) -> None:
    models = provider.config.models
    if models is not None and body["model"] not in models:
        raise WireError(404, f"The model `{body['model']}` does not exist.", code="model_not_found")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(filter(None, map(_text, value)))
    if isinstance(value, Mapping) and value.get("role") != "assistant":
        return _text(value.get("content")) or str(value.get("text") or value.get("output") or "")
    return ""


def _forced_tool(body: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any] | None]:
    choice = body.get("tool_choice")
    tools = [tool for tool in body.get("tools") or () if tool.get("type") == "function"]
    if isinstance(choice, Mapping):
        tools = [tool for tool in tools if tool.get("name") == choice.get("name")]
    elif choice != "required":
        return None, None
    if not tools:
        return None, None
    return tools[0]["name"], tools[0].get("parameters") or {"type": "object"}
