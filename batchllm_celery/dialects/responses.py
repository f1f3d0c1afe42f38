"""OpenAI's Responses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from batchllm_celery.dialects.answers import (
    Answer,
    BadAnswerError,
    FailedAnswer,
    Read,
    count,
    nonsense,
    output_of,
    read,
    short,
    tool_call,
)
from batchllm_celery.dialects.openai import (
    CUT,
    build_request,
    content_text,
    note,
    read_function,
    read_schema,
    read_url,
    split_output,
    text_only,
    url_of,
    write_schema,
)
from batchllm_celery.dialects.refusals import Fields, Reader, Refusals
from batchllm_celery.dialects.writing import Writer, Written
from batchllm_celery.errors import FailureKind
from batchllm_celery.models import Completion, TokenUsage
from batchllm_celery.models.request import (
    AssistantMessage,
    FilePart,
    ImagePart,
    NamedTool,
    Request,
    TextPart,
    ToolMessage,
)

_LOGPROBS = "message.output_text.logprobs"

# -- reading a request


def read_request(body: Any) -> Request | Refusals:
    """A body of responses in words of no provider; its model is left to the caller.

    Returns:
        `Refusals` where a field can't be carried to another provider, each by its path.
    """
    reader = Reader()
    with reader.fields(body, "body") as fields:
        fields.text("model")
        fields.expect("stream", False)
        fields.expect("background", False)
        instructions = fields.text("instructions")
        messages = [] if instructions is None else [_message("system", instructions)]
        messages += _read_input(reader, fields)
        request: dict[str, Any] = {
            "messages": messages,
            "tools": [_read_tool(reader, *found) for found in fields.elements("tools")],
            "tool_choice": _read_tool_choice(fields),
            **_read_text(fields),
        }
        request["parameters"] = _read_parameters(fields) | request.get("parameters", {})
    return build_request(reader, request)


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _read_input(reader: Reader, fields: Fields) -> list[dict[str, Any]]:
    value = fields.take("input")
    if isinstance(value, str):
        return [_message("user", value)]
    if not isinstance(value, list):
        fields.refuse("input", "must be a text or a list of items")
        return []
    messages: list[dict[str, Any]] = []
    path = fields.at("input")
    for i, item in enumerate(value):
        _read_item(reader, f"{path}[{i}]", item, messages)
    return messages


def _read_item(reader: Reader, path: str, value: Any, messages: list[dict[str, Any]]) -> None:
    with reader.fields(value, path) as fields:
        kind = fields.text("type") or "message"
        if kind == "function_call":
            fields.expect("status", "completed")
            _add_call(messages, _read_call(fields))
        elif kind == "function_call_output":
            fields.expect("status", "completed")
            answered = fields.needed_text("call_id")
            content = _read_content(reader, fields, "output", ("input_text",))
            messages.append({"role": "tool", "tool_call_id": answered, "content": content})
        elif kind == "message":
            messages.append(_read_message(reader, fields))
        else:
            fields.refuse("type")


def _read_call(fields: Fields) -> dict[str, Any]:
    call_id = fields.needed_text("call_id")
    name, arguments = fields.needed_text("name"), fields.needed_text("arguments")
    fields.take("id")  # of the answer that it came with; the call is known by its call_id
    return tool_call(call_id, name, arguments)


def _add_call(messages: list[dict[str, Any]], call: dict[str, Any]) -> None:
    """Calls belong to the assistant's message before them, which may have said nothing."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append(_message("assistant", ""))
    messages[-1].setdefault("tool_calls", []).append(call)


def _read_message(reader: Reader, fields: Fields) -> dict[str, Any]:
    role = fields.needed_text("role")
    if role in ("system", "developer"):
        return _message("system", _read_content(reader, fields, "content", ("input_text",)))
    if role == "user":
        return _message(role, _read_content(reader, fields, "content", _USER_PARTS))
    if role != "assistant":
        fields.refuse("role", "must be system, developer, user or assistant")
    fields.take("id")  # of the answer that it came with
    fields.expect("status", "completed")
    return _message("assistant", _read_content(reader, fields, "content", ("output_text",)))


_USER_PARTS = ("input_text", "input_image", "input_file")


def _read_content(reader: Reader, fields: Fields, name: str, allowed: Collection[str]) -> Any:
    value = fields.take(name)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        fields.refuse(name, "must be a text or a list of parts")
        return ""
    path = fields.at(name)
    return [_read_part(reader, f"{path}[{i}]", part, allowed) for i, part in enumerate(value)]


def _read_part(reader: Reader, path: str, value: Any, allowed: Collection[str]) -> dict[str, Any]:
    with reader.fields(value, path) as fields:
        kind = fields.needed_text("type")
        if kind not in allowed:
            fields.refuse("type")
        elif kind in ("input_text", "output_text"):
            fields.expect("annotations", [])
            fields.expect("logprobs", [])
            return {"type": "text", "text": fields.needed_text("text")}
        elif kind == "input_image":
            detail = fields.text("detail")
            detail = None if detail == "auto" else detail  # which is the default
            return {"type": "image", **read_url(fields, "image_url"), "detail": detail}
        elif kind == "input_file":
            source = read_url(fields, "file_data" if fields.has("file_data") else "file_url")
            return {"type": "file", **source, "name": fields.text("filename")}
    return {"type": "text", "text": ""}


def _read_tool(reader: Reader, path: str, value: Any) -> dict[str, Any]:
    with reader.fields(value, path) as fields:
        if fields.needed_text("type") == "function":
            return read_function(fields)
        fields.refuse("type")
        return {}


def _read_tool_choice(fields: Fields) -> Any:
    choice = fields.take("tool_choice")
    if not isinstance(choice, Mapping):
        return choice
    with fields.reader.fields(choice, fields.at("tool_choice")) as inner:
        inner.expect("type", "function")
        return {"name": inner.needed_text("name")}


def _read_text(fields: Fields) -> dict[str, Any]:
    text = fields.inner("text")
    if text is None:
        return {}
    with text:
        form = text.inner("format")
        if form is None:
            return {}
        with form:
            kind = form.needed_text("type")
            if kind == "json_schema":
                return read_schema(form)
            if kind == "json_object":
                return {"parameters": {"json_output": True}}
            if kind != "text":
                form.refuse("type")
    return {}


def _read_parameters(fields: Fields) -> dict[str, Any]:
    included = fields.elements("include")
    for path, name in included:
        if name != _LOGPROBS:
            fields.reader.refuse(path)
    top = fields.whole("top_logprobs")
    if top is not None and not included:
        fields.refuse("top_logprobs", f"needs include: {_LOGPROBS}")
    effort = None
    reasoning = fields.inner("reasoning")
    if reasoning is not None:
        with reasoning:
            effort = reasoning.text("effort")
    found = {
        "temperature": fields.number("temperature"),
        "top_p": fields.number("top_p"),
        "max_output_tokens": fields.whole("max_output_tokens"),
        "logprobs": (top or 0) if included else None,
        "reasoning_effort": effort,
        "service_tier": fields.text("service_tier"),
    }
    return {name: value for name, value in found.items() if value is not None}


# -- writing a request

_WORDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_output_tokens": "max_output_tokens",
    "service_tier": "service_tier",
    "reasoning_effort": "",
    "logprobs": "",
    "json_output": "",
}


def write_request(
    request: Request, *, model: str, allow_dropping: Collection[str] = ()
) -> Written | Refusals:
    """A body of responses.

    Args:
        request: what to ask.
        model: the model's name.
        allow_dropping: parameters that may be left out where the provider has no word for them.
    """
    writer = Writer("OpenAI's Responses", allow_dropping)
    body: dict[str, Any] = {"model": model}
    first = request.messages[0]
    if first.role == "system" and isinstance(first.content, str):
        body["instructions"] = first.content
    body["input"] = [
        item
        for i, message in enumerate(request.messages)
        if i > 0 or "instructions" not in body
        for item in _write_items(writer, message, f"messages[{i}]")
    ]
    body |= writer.parameters(request, _WORDS)
    parameters = request.parameters
    if parameters.reasoning_effort is not None:
        body["reasoning"] = {"effort": parameters.reasoning_effort}
    if parameters.logprobs is not None:
        body["include"] = [_LOGPROBS]
        if parameters.logprobs:
            body["top_logprobs"] = parameters.logprobs
    if request.tools:
        body["tools"] = [_write_tool(tool) for tool in request.tools]
    if isinstance(request.tool_choice, NamedTool):
        body["tool_choice"] = {"type": "function", "name": request.tool_choice.name}
    elif request.tool_choice is not None:
        body["tool_choice"] = request.tool_choice
    if request.schema is not None:
        body["text"] = {"format": {"type": "json_schema", **write_schema(request)}}
    elif parameters.json_output:
        body["text"] = {"format": {"type": "json_object"}}
    return writer.finish(body, request)


def _write_tool(tool: Any) -> dict[str, Any]:
    # Both fields are required here, null is their "not said".
    return {
        "type": "function",
        "parameters": None,
        "strict": None,
        **tool.model_dump(exclude_none=True),
    }


def _write_items(writer: Writer, message: Any, path: str) -> Iterator[dict[str, Any]]:
    content = f"{path}.content"
    if isinstance(message, ToolMessage):
        text_only(writer, message.content, content)
        output = _write_content(writer, message.content, content, "input_text")
        call_id = message.tool_call_id
        yield {"type": "function_call_output", "call_id": call_id, "output": output}
    elif isinstance(message, AssistantMessage):
        if message.content:
            text = _write_content(writer, message.content, content, "output_text")
            yield {"type": "message", "role": "assistant", "content": text}
        for call in message.tool_calls:
            yield {"type": "function_call", "call_id": call.id, **call.function.model_dump()}
    else:
        parts = _write_content(writer, message.content, content, "input_text")
        yield {"type": "message", "role": message.role, "content": parts}


def _write_content(writer: Writer, content: Any, path: str, text_type: str) -> Any:
    if isinstance(content, str):
        return content
    return [_write_part(writer, part, f"{path}[{j}]", text_type) for j, part in enumerate(content)]


def _write_part(writer: Writer, part: Any, path: str, text_type: str) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": text_type, "text": part.text}
    if isinstance(part, ImagePart):
        url = url_of(writer, part, path)
        return {"type": "input_image", "image_url": url, "detail": part.detail or "auto"}
    return _write_file(writer, part, path)


def _write_file(writer: Writer, part: FilePart, path: str) -> dict[str, Any]:
    media_type, data = writer.media(part, path) or ("", "")
    if media_type.startswith(("audio/", "video/")):
        writer.refuse(path, f"unsupported: {media_type}")
    if part.data is None:
        file = {"type": "input_file", "file_url": part.url or ""}
    else:
        file = {"type": "input_file", "file_data": f"data:{media_type};base64,{data}"}
    return file if part.name is None else {**file, "filename": part.name}


# -- reading an answer


def read_answer(
    status: int, headers: Mapping[str, str] | None, body: bytes
) -> Answer | FailedAnswer:
    """A reply of responses; never raises, whatever the body is. Outputs as of chat completions."""
    return read(status, headers, body, _read_response, usage_of)


def _read_response(body: Mapping[str, Any]) -> Read:
    items = body.get("output")
    if not isinstance(items, list):
        raise BadAnswerError("the answer has no output")
    parts = list(_content_parts(items))
    text, calls = content_text(parts), list(_calls(items))
    usage, metadata = usage_of(body), _notes(body)
    listed = [part["logprobs"] for part in parts if isinstance(part.get("logprobs"), list)]
    logprobs = [entry for entries in listed for entry in entries]
    if logprobs:
        metadata["logprobs"] = logprobs
    output = output_of(text, calls)
    failed = _failure(body, parts, output)
    if failed is None:
        metadata["finish_reason"] = "tool_calls" if calls else "completed"
        return Read(output, usage, metadata)
    reason = _incomplete_reason(body) or body.get("status")
    metadata["finish_reason"] = reason if isinstance(reason, str) else None
    if output:
        metadata["partial_output"] = output
    return Read(None, usage, metadata, *failed)


def _failure(
    body: Mapping[str, Any], parts: list[Mapping[str, Any]], output: Any
) -> tuple[FailureKind, str] | None:
    reason = _incomplete_reason(body)
    if reason == "max_output_tokens":
        return FailureKind.TRUNCATED, CUT
    if reason == "content_filter":
        return FailureKind.CONTENT_BLOCKED, "the answer was blocked: content_filter"
    if any(part.get("type") == "refusal" for part in parts):
        return FailureKind.CONTENT_BLOCKED, "the model refused"
    if body.get("status", "completed") != "completed" or reason is not None:
        return FailureKind.UNKNOWN, f"the answer ended with {short(reason or body.get('status'))}"
    if not output or (isinstance(output, str) and not output.strip()):
        return FailureKind.UNKNOWN, "the answer is empty (completed)"
    return None


def _incomplete_reason(body: Mapping[str, Any]) -> Any:
    details = body.get("incomplete_details")
    return details.get("reason") if isinstance(details, Mapping) else None


def _content_parts(items: list[Any]) -> Iterator[Mapping[str, Any]]:
    for item in items:
        if isinstance(item, Mapping) and item.get("type") == "message":
            content = item.get("content")
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            yield from (part for part in parts if isinstance(part, Mapping))


def _calls(items: list[Any]) -> Iterator[dict[str, Any]]:
    for item in items:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "function_call":
            call_id, name, arguments = (
                str(item.get(field) or "") for field in ("call_id", "name", "arguments")
            )
            yield tool_call(call_id, name, arguments)
        elif kind == "custom_tool_call":
            custom = {"name": item.get("name"), "input": item.get("input")}
            yield {"id": item.get("call_id"), "type": "custom", "custom": custom}


def usage_of(body: Mapping[str, Any]) -> TokenUsage:
    """Tokens of an answer, as billed: reasoning is part of the output."""
    usage = body.get("usage")
    if not isinstance(usage, Mapping):
        return TokenUsage()
    given, answered = count(usage, "input_tokens"), count(usage, "output_tokens")
    cached = count(usage.get("input_tokens_details"), "cached_tokens")
    return TokenUsage(
        input_tokens=given,
        output_tokens=answered,
        total_tokens=max(count(usage, "total_tokens"), given + answered),
        cached_input_tokens=min(cached, given),
    )


def _notes(body: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    note(metadata, "model", body.get("model"))
    note(metadata, "response_id", body.get("id"))
    note(metadata, "service_tier", body.get("service_tier"))
    usage = body.get("usage")
    if isinstance(usage, Mapping):
        notes: dict[str, Any] = {
            "reasoning_tokens": count(usage.get("output_tokens_details"), "reasoning_tokens"),
            "cache_write_tokens": count(usage.get("input_tokens_details"), "cache_write_tokens"),
            "usage_clamped": nonsense(usage, "input_tokens", "output_tokens", "total_tokens"),
        }
        metadata |= {name: value for name, value in notes.items() if value}
    return metadata


# -- writing an answer


def write_answer(
    completion: Completion[Any], *, model: str, answer_id: str, created: int = 0
) -> dict[str, Any]:
    """A response of what any provider answered. Of several answers to one request, each is a
    message.

    Args:
        completion: the answer; an output that is no text is written as JSON.
        model: PROVIDER:MODEL that answered.
        answer_id: the answer's id.
        created: seconds since 1970.
    """
    usage = completion.usage
    return {
        "id": completion.metadata.get("response_id") or answer_id,
        "object": "response",
        "created_at": created,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": model,
        "output": list(_write_output(completion, answer_id)),
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "usage": {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_input_tokens,
                "cache_write_tokens": completion.metadata.get("cache_write_tokens", 0),
            },
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {
                "reasoning_tokens": completion.metadata.get("reasoning_tokens", 0)
            },
            "total_tokens": usage.total_tokens,
        },
    }


def _write_output(completion: Completion[Any], answer_id: str) -> Iterator[dict[str, Any]]:
    for i, (text, calls) in enumerate(split_output(completion)):
        if text or not calls:
            part = {"type": "output_text", "text": text, "annotations": []}
            yield {
                "type": "message",
                "id": f"msg_{answer_id}_{i}",
                "role": "assistant",
                "status": "completed",
                "content": [part],
            }
        for call in calls:
            function = call.get("function") or {}
            yield {
                "type": "function_call",
                "call_id": call.get("id", ""),
                "name": function.get("name", ""),
                "arguments": function.get("arguments", ""),
                "status": "completed",
            }
