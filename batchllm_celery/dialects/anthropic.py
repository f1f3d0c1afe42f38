"""Anthropic's Messages."""

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
from batchllm_celery.dialects.gemini import call_object, split_system
from batchllm_celery.dialects.openai import (
    CUT,
    build_request,
    note,
    read_base64,
    read_stop,
    split_output,
)
from batchllm_celery.dialects.refusals import Fields, Reader, Refusals
from batchllm_celery.dialects.writing import Writer, Written, json_text
from batchllm_celery.errors import FailureKind
from batchllm_celery.models import Completion, TokenUsage
from batchllm_celery.models.request import (
    AssistantMessage,
    FilePart,
    ImagePart,
    NamedTool,
    Request,
    SystemMessage,
    TextPart,
    Tool,
    ToolMessage,
)

#: `max_tokens` of a request that names no limit: the API needs one, and each of its models can
#: answer that much. Beside a thinking budget it comes on top.
DEFAULT_MAX_TOKENS = 4096

# -- reading a request


def read_request(body: Any) -> Request | Refusals:
    """A body of messages in words of no provider; its model is left to the caller.

    Returns:
        `Refusals` where a field can't be carried to another provider, each by its path.
    """
    reader = Reader()
    with reader.fields(body, "body") as fields:
        fields.text("model")
        fields.expect("stream", False)
        messages = _read_system(reader, fields)
        for path, message in fields.elements("messages"):
            messages += _read_message(reader, path, message)
        request: dict[str, Any] = {
            "messages": messages,
            "parameters": _read_parameters(fields),
            "tools": [_read_tool(reader, *found) for found in fields.elements("tools")],
            "tool_choice": _read_tool_choice(fields),
        }
        config = fields.inner("output_config")
        if config is not None:
            _read_output_config(config, request)
    return build_request(reader, request)


def _read_system(reader: Reader, fields: Fields) -> list[dict[str, Any]]:
    system = fields.take("system")
    if system is None:
        return []
    if isinstance(system, str):
        return [{"role": "system", "content": system}]
    if not isinstance(system, list):
        fields.refuse("system", "must be a text or a list of blocks")
        return []
    path = fields.at("system")
    texts = [_read_text(reader, f"{path}[{i}]", block) for i, block in enumerate(system)]
    return [{"role": "system", "content": texts}]


def _read_text(reader: Reader, path: str, value: Any) -> dict[str, Any]:
    with reader.fields(value, path) as block:
        if block.needed_text("type") != "text":
            block.refuse("type")
        return {"type": "text", "text": block.needed_text("text")}


def _read_message(reader: Reader, path: str, value: Any) -> Iterator[dict[str, Any]]:
    with reader.fields(value, path) as message:
        role, content = message.needed_text("role"), message.take("content")
        if role not in ("user", "assistant"):
            message.refuse("role", "must be user or assistant")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list):
        reader.refuse(f"{path}.content", "must be a text or a list of blocks")
        return
    blocks = [_read_block(reader, f"{path}.content[{i}]", b) for i, b in enumerate(content)]
    parts = [block for kind, block in blocks if kind == "part"]
    calls = [block for kind, block in blocks if kind == "call"]
    results = [block for kind, block in blocks if kind == "result"]
    if calls if role == "user" else results:
        reader.refuse(path, "calls are an assistant's, their results a user's")
    if role == "assistant":
        yield {"role": role, "content": parts or "", "tool_calls": calls}
        return
    yield from results
    if parts or not results:
        yield {"role": role, "content": parts}


def _read_block(reader: Reader, path: str, value: Any) -> tuple[str, dict[str, Any]]:
    with reader.fields(value, path) as block:
        kind = block.needed_text("type")
        if kind == "text":
            return "part", {"type": "text", "text": block.needed_text("text")}
        if kind == "image":
            return "part", {"type": "image", **_read_source(block)}
        if kind == "document":
            source = _read_source(block)
            return "part", {"type": "file", **source, "name": block.text("title")}
        if kind == "tool_use":
            call_id, name = block.needed_text("id"), block.needed_text("name")
            return "call", tool_call(call_id, name, json_text(block.mapping("input") or {}))
        if kind == "tool_result":
            return "result", _read_result(reader, block)
        block.refuse("type")
    return "part", {"type": "text", "text": ""}


def _read_source(block: Fields) -> dict[str, Any]:
    with block.needed_inner("source") as source:
        kind = source.needed_text("type")
        if kind == "url":
            return {"url": source.needed_text("url")}
        if kind == "base64":
            media_type = source.needed_text("media_type")
            return {"data": read_base64(source, "data"), "media_type": media_type}
        if kind == "text":
            source.expect("media_type", "text/plain")
            return {"data": source.needed_text("data").encode(), "media_type": "text/plain"}
        source.refuse("type")
    return {"data": b""}


def _read_result(reader: Reader, block: Fields) -> dict[str, Any]:
    block.expect("is_error", False)
    answered = block.needed_text("tool_use_id")
    content = block.take("content")
    if isinstance(content, list):
        path = block.at("content")
        blocks = [_read_block(reader, f"{path}[{i}]", b) for i, b in enumerate(content)]
        content = [part for _, part in blocks]
    elif not isinstance(content, str | None):
        block.refuse("content", "must be a text or a list of blocks")
    return {"role": "tool", "tool_call_id": answered, "content": content or ""}


def _read_tool(reader: Reader, path: str, value: Any) -> dict[str, Any]:
    with reader.fields(value, path) as tool:
        tool.expect("type", "custom")
        schema = tool.mapping("input_schema")
        return {
            "name": tool.needed_text("name"),
            "description": tool.text("description"),
            "parameters": None if schema == NO_ARGUMENTS else schema,
            "strict": tool.flag("strict"),
        }


#: The API needs a schema, also of a tool without arguments.
NO_ARGUMENTS = {"type": "object", "properties": {}}


def _read_tool_choice(fields: Fields) -> Any:
    choice = fields.inner("tool_choice")
    if choice is None:
        return None
    with choice:
        kind = choice.needed_text("type")
        choice.expect("disable_parallel_tool_use", False)
        if kind == "tool":
            return {"name": choice.needed_text("name")}
        plain = {"auto": "auto", "none": "none", "any": "required"}.get(kind)
        if plain is None:
            choice.refuse("type")
        return plain


def _read_parameters(fields: Fields) -> dict[str, Any]:
    found = {
        "temperature": fields.number("temperature"),
        "top_p": fields.number("top_p"),
        "top_k": fields.whole("top_k"),
        "stop": read_stop(fields, "stop_sequences"),
        "max_output_tokens": fields.whole("max_tokens"),
        "service_tier": fields.text("service_tier"),
    }
    thinking = fields.inner("thinking")
    if thinking is not None:
        with thinking:
            kind = thinking.needed_text("type")
            if kind == "enabled":
                found["thinking_budget"] = thinking.whole("budget_tokens")
            elif kind == "disabled":
                found["thinking_budget"] = 0
            else:
                thinking.refuse("type")
    return {name: value for name, value in found.items() if value is not None}


def _read_output_config(config: Fields, request: dict[str, Any]) -> None:
    with config:
        effort = config.text("effort")
        if effort is not None:
            request["parameters"]["reasoning_effort"] = effort
        form = config.inner("format")
        if form is None:
            return
        with form:
            if form.needed_text("type") != "json_schema":
                form.refuse("type")
            request["schema"] = form.mapping("schema")


# -- writing a request

_WORDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "stop": "stop_sequences",
    "service_tier": "service_tier",
    "max_output_tokens": "",
    "thinking_budget": "",
    "reasoning_effort": "",
}
_TIERS = frozenset({"auto", "standard_only"})
_EFFORTS = frozenset({"low", "medium", "high", "xhigh", "max"})


def write_request(
    request: Request,
    *,
    model: str,
    allow_dropping: Collection[str] = (),
    cache: bool = False,
    default_max_tokens: int = DEFAULT_MAX_TOKENS,
) -> Written | Refusals:
    """A body of messages.

    Args:
        request: what to ask.
        model: the model's name.
        allow_dropping: parameters that may be left out where the provider has no word for them.
        cache: mark what requests share (the tools and the system's text, in the order in which
            the API reads them) with `cache_control`, so that it is cached. A request that has
            neither is not marked.
        default_max_tokens: `max_tokens` where the request sets no `max_output_tokens`.
    """
    writer = Writer("Anthropic", allow_dropping)
    parameters = request.parameters
    budget = parameters.thinking_budget or 0
    limit = parameters.max_output_tokens or default_max_tokens + max(budget, 0)
    body: dict[str, Any] = {"model": model, "max_tokens": limit}
    system, start = split_system(writer, request)
    if system:
        body["system"] = [{"type": "text", "text": text} for text in system]
        if len(system) == 1:
            body["system"] = system[0]
    body["messages"] = _write_messages(writer, request, start)
    body |= writer.parameters(request, _WORDS)
    if parameters.service_tier is not None and parameters.service_tier not in _TIERS:
        del body["service_tier"]
        writer.unsupported("parameters.service_tier")
    body |= _write_thinking(writer, request, limit)
    if request.tools:
        body["tools"] = [_write_tool(tool) for tool in request.tools]
    if request.tool_choice is not None:
        body["tool_choice"] = _write_tool_choice(request.tool_choice)
    if cache:
        _mark_prefix(body)
    return writer.finish(body, request)


def _write_thinking(writer: Writer, request: Request, limit: int) -> dict[str, Any]:
    parameters, config, written = request.parameters, dict[str, Any](), dict[str, Any]()
    budget = parameters.thinking_budget
    if budget is not None and budget < 0:
        writer.refuse("parameters.thinking_budget", "must not be negative here")
    elif budget == 0:
        written["thinking"] = {"type": "disabled"}
    elif budget is not None:
        written["thinking"] = {"type": "enabled", "budget_tokens": budget}
        if budget >= limit:
            writer.refuse("parameters.thinking_budget", "must be below max_output_tokens")
    if parameters.reasoning_effort in _EFFORTS:
        config["effort"] = parameters.reasoning_effort
    elif parameters.reasoning_effort is not None:
        writer.unsupported("parameters.reasoning_effort")
    if request.schema is not None:
        config["format"] = {"type": "json_schema", "schema": request.schema}
        if request.schema_strict is False:
            writer.unsupported("schema_strict")
    return {**written, "output_config": config} if config else written


def _mark_prefix(body: dict[str, Any]) -> None:
    """A mark covers all that stands before it, and tools stand before the system's text."""
    if isinstance(body.get("system"), str):
        body["system"] = [{"type": "text", "text": body["system"]}]
    shared = body.get("system") or body.get("tools")
    if shared:
        shared[-1] = {**shared[-1], "cache_control": {"type": "ephemeral"}}


def _write_messages(writer: Writer, request: Request, start: int) -> list[dict[str, Any]]:
    written: list[dict[str, Any]] = []
    answering = False
    for i, message in enumerate(request.messages[start:], start):
        path = f"messages[{i}]"
        if isinstance(message, ToolMessage):
            result = {
                "type": "tool_result",
                "tool_use_id": message.tool_call_id,
                "content": _write_content(writer, message.content, path),
            }
            if answering:  # the API wants the results of one turn's calls in one turn
                written[-1]["content"].append(result)
            else:
                written.append({"role": "user", "content": [result]})
            answering = True
            continue
        answering = False
        if isinstance(message, AssistantMessage):
            written.append({"role": "assistant", "content": _write_turn(writer, message, path)})
        elif not isinstance(message, SystemMessage):
            content = _write_content(writer, message.content, path)
            written.append({"role": "user", "content": content})
    return written


def _write_turn(writer: Writer, message: AssistantMessage, path: str) -> Any:
    content = _write_content(writer, message.content, path)
    if not message.tool_calls:
        return content
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    for j, call in enumerate(message.tool_calls):
        arguments = writer.arguments(call, f"{path}.tool_calls[{j}]")
        content.append(
            {"type": "tool_use", "id": call.id, "name": call.function.name, "input": arguments}
        )
    return content


def _write_content(writer: Writer, content: Any, path: str) -> Any:
    if isinstance(content, str):
        return content
    path += ".content"
    return [_write_part(writer, part, f"{path}[{j}]") for j, part in enumerate(content)]


_IMAGES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})


def _write_part(writer: Writer, part: Any, path: str) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    source = _write_source(writer, part, path)
    if isinstance(part, ImagePart):
        if part.detail is not None:
            writer.unsupported(f"{path}.detail")
        return {"type": "image", "source": source}
    title = {} if part.name is None else {"title": part.name}
    return {"type": "document", "source": source, **title}


def _write_source(writer: Writer, part: ImagePart | FilePart, path: str) -> dict[str, Any]:
    if part.url is not None:
        return {"type": "url", "url": part.url}
    media_type, data = writer.media(part, path) or ("", "")
    allowed = _IMAGES if isinstance(part, ImagePart) else {"application/pdf"}
    if isinstance(part, FilePart) and media_type == "text/plain" and part.data is not None:
        try:
            text = part.data.decode("utf-8")
        except UnicodeDecodeError:
            writer.refuse(path, "a text must be UTF-8")
            text = ""
        return {"type": "text", "media_type": "text/plain", "data": text}
    if media_type and media_type not in allowed:
        writer.refuse(path, f"unsupported: {media_type}")
    return {"type": "base64", "media_type": media_type, "data": data}


def _write_tool(tool: Tool) -> dict[str, Any]:
    written = tool.model_dump(exclude_none=True, exclude={"parameters"})
    schema = NO_ARGUMENTS if tool.parameters is None else tool.parameters
    return {**written, "input_schema": schema}


def _write_tool_choice(choice: Any) -> dict[str, Any]:
    if isinstance(choice, NamedTool):
        return {"type": "tool", "name": choice.name}
    return {"type": {"auto": "auto", "none": "none", "required": "any"}[choice]}


# -- reading an answer

_GOOD_ENDS = frozenset({"end_turn", "stop_sequence", "tool_use"})
_CUT_ENDS = frozenset({"max_tokens", "model_context_window_exceeded"})


def read_answer(
    status: int, headers: Mapping[str, str] | None, body: bytes
) -> Answer | FailedAnswer:
    """A reply of messages; never raises, whatever the body is.

    The output is the text without thoughts, or `{"tool_calls", "text"}` where the model called
    tools, and then `metadata.finish_reason` is `tool_calls`. Input tokens include those read
    from the cache (`cached_input_tokens`) and written to it (`metadata.cache_write_tokens`);
    the former do not count towards the provider's limit of input tokens.
    """
    return read(status, headers, body, _read_message_body, usage_of)


def _read_message_body(body: Mapping[str, Any]) -> Read:
    content = body.get("content")
    if not isinstance(content, list):
        raise BadAnswerError("the answer has no content")
    blocks = [block for block in content if isinstance(block, Mapping)]
    texts = (block.get("text") for block in blocks if block.get("type") == "text")
    text = "".join(text for text in texts if isinstance(text, str))
    calls = list(_calls(blocks))
    output = output_of(text, calls)
    usage, metadata, finish = usage_of(body), _notes(body), body.get("stop_reason")
    if isinstance(finish, str):
        metadata["finish_reason"] = finish
    failed = _failure(finish, output)
    if failed is None:
        if calls:
            metadata["finish_reason"] = "tool_calls"
        return Read(output, usage, metadata)
    if output:
        metadata["partial_output"] = output
    return Read(None, usage, metadata, *failed)


def _failure(finish: Any, output: Any) -> tuple[FailureKind, str] | None:
    if isinstance(finish, str) and finish in _CUT_ENDS:
        return FailureKind.TRUNCATED, CUT
    if finish == "refusal":
        return FailureKind.CONTENT_BLOCKED, "the model refused"
    if not isinstance(finish, str) or finish not in _GOOD_ENDS:
        return FailureKind.UNKNOWN, f"the answer ended with {short(finish)}"
    if not output or (isinstance(output, str) and not output.strip()):
        return FailureKind.UNKNOWN, f"the answer is empty ({finish})"
    return None


def _calls(blocks: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for block in blocks:
        if block.get("type") == "tool_use":
            arguments = json_text(block.get("input") or {})
            yield tool_call(str(block.get("id") or ""), str(block.get("name") or ""), arguments)


def usage_of(body: Mapping[str, Any]) -> TokenUsage:
    """Tokens of an answer. The API counts cached input beside the input; here it is part of it."""
    usage = body.get("usage")
    cached, written = count(usage, "cache_read_input_tokens"), _written(usage)
    given = count(usage, "input_tokens") + cached + written
    answered = count(usage, "output_tokens")
    return TokenUsage(
        input_tokens=given,
        output_tokens=answered,
        total_tokens=given + answered,
        cached_input_tokens=cached,
    )


def _written(usage: Any) -> int:
    return count(usage, "cache_creation_input_tokens")


def _notes(body: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    note(metadata, "model", body.get("model"))
    note(metadata, "response_id", body.get("id"))
    usage = body.get("usage")
    if isinstance(usage, Mapping):
        note(metadata, "service_tier", usage.get("service_tier"))
        creation = usage.get("cache_creation")
        notes: dict[str, Any] = {
            "cache_write_tokens": _written(usage),
            "cache_write_tokens_1h": count(creation, "ephemeral_1h_input_tokens"),
            "reasoning_tokens": count(usage.get("output_tokens_details"), "thinking_tokens"),
            "usage_clamped": nonsense(
                usage, "input_tokens", "output_tokens", "cache_read_input_tokens"
            ),
        }
        metadata |= {name: value for name, value in notes.items() if value}
    return metadata


# -- writing an answer


def write_answer(completion: Completion[Any], *, model: str, answer_id: str) -> dict[str, Any]:
    """A message of what any provider answered. Of several answers to one request, each is a text
    block.

    Args:
        completion: the answer; an output that is no text is written as JSON.
        model: PROVIDER:MODEL that answered.
        answer_id: the answer's id.
    """
    usage = completion.usage
    written = min(completion.metadata.get("cache_write_tokens", 0), usage.input_tokens)
    fresh = max(usage.input_tokens - usage.cached_input_tokens - written, 0)
    content: list[dict[str, Any]] = []
    called = False
    for text, calls in split_output(completion):
        if text or not calls:
            content.append({"type": "text", "text": text, "citations": None})
        for call in calls:
            content.append({"type": "tool_use", **call_object(call, "input")})
            called = True
    return {
        "id": completion.metadata.get("response_id") or answer_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": "tool_use" if called else "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": fresh,
            "cache_read_input_tokens": usage.cached_input_tokens,
            "cache_creation_input_tokens": written,
            "output_tokens": usage.output_tokens,
        },
    }
