"""OpenAI's chat completions and embeddings, and every server that speaks them."""

from __future__ import annotations

import array
import base64
import binascii
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    TextPart,
    Tool,
)

# -- reading a request


def read_request(body: Any) -> Request | Refusals:
    """A body of chat/completions in words of no provider; its model is left to the caller.

    Returns:
        `Refusals` where a field can't be carried to another provider (or is wrong), each by its
        path: `body.messages[2].audio`.
    """
    reader = Reader()
    with reader.fields(body, "body") as fields:
        fields.text("model")
        fields.expect("stream", False)
        request: dict[str, Any] = {
            "messages": [_read_message(reader, *found) for found in fields.elements("messages")],
            "tools": [read_tool(reader, *found) for found in fields.elements("tools")],
            "tool_choice": _read_tool_choice(fields),
            **_read_format(fields),
        }
        request["parameters"] = _read_parameters(fields) | request.get("parameters", {})
    return build_request(reader, request)


def build_request(reader: Reader, request: Mapping[str, Any]) -> Request | Refusals:
    """The request, or what was refused; what its own checks refuse is a fault of the body too."""
    refused = reader.result()
    if refused is not None:
        return refused
    try:
        return Request.of(request)
    except ValueError as error:
        reader.refuse("body", str(error))
        return reader.result() or Refusals(())


def _read_message(reader: Reader, path: str, value: Any) -> dict[str, Any]:
    with reader.fields(value, path) as fields:
        role = fields.needed_text("role")
        if role in ("system", "developer"):
            return {"role": "system", "content": _read_content(reader, fields, ("text",))}
        if role == "user":
            return {"role": role, "content": _read_content(reader, fields, _USER_PARTS)}
        if role == "tool":
            answered = fields.needed_text("tool_call_id")
            content = _read_content(reader, fields, ("text",))
            return {"role": role, "tool_call_id": answered, "content": content}
        if role == "assistant":
            calls = [_read_call(reader, *found) for found in fields.elements("tool_calls")]
            content = _read_content(reader, fields, ("text",)) if fields.has("content") else ""
            return {"role": role, "content": content, "tool_calls": calls}
        fields.refuse("role", "must be system, developer, user, assistant or tool")
        return {}


_USER_PARTS = ("text", "image_url", "input_audio", "file")


def _read_content(reader: Reader, fields: Fields, allowed: Collection[str]) -> Any:
    value = fields.take("content")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        fields.refuse("content", "must be a text or a list of parts")
        return ""
    path = fields.at("content")
    return [_read_part(reader, f"{path}[{i}]", part, allowed) for i, part in enumerate(value)]


def _read_part(reader: Reader, path: str, value: Any, allowed: Collection[str]) -> dict[str, Any]:
    with reader.fields(value, path) as fields:
        kind = fields.needed_text("type")
        if kind not in allowed:
            fields.refuse("type")
        elif kind == "text":
            return {"type": "text", "text": fields.needed_text("text")}
        elif kind == "image_url":
            with fields.needed_inner("image_url") as image:
                source = read_url(image, "url")
                return {"type": "image", **source, "detail": image.text("detail")}
        elif kind == "input_audio":
            with fields.needed_inner("input_audio") as audio:
                return {
                    "type": "file",
                    "data": read_base64(audio, "data"),
                    "media_type": _AUDIO_TYPES.get(audio.needed_text("format")),
                }
        elif kind == "file":
            with fields.needed_inner("file") as file:
                name = file.text("filename")
                return {"type": "file", **read_url(file, "file_data"), "name": name}
    return {"type": "text", "text": ""}


_AUDIO_TYPES = {"wav": "audio/wav", "mp3": "audio/mpeg"}
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+);base64,")


def read_url(fields: Fields, name: str) -> dict[str, Any]:
    """A URL, or the bytes of a data: URL."""
    text = fields.needed_text(name)
    if not text.startswith("data:"):
        return {"url": text}
    match = _DATA_URL.match(text)
    if match is None:
        fields.refuse(name, "a data: URL must begin with data:TYPE;base64,")
        return {"data": b""}
    return {"data": _decode(fields, name, text[match.end() :]), "media_type": match.group(1)}


def read_base64(fields: Fields, name: str) -> bytes:
    """Bytes in base64."""
    return _decode(fields, name, fields.needed_text(name))


def _decode(fields: Fields, name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        fields.refuse(name, "must be in base64")
        return b""


def _read_call(reader: Reader, path: str, value: Any) -> dict[str, Any]:
    with reader.fields(value, path) as fields:
        fields.expect("type", "function")
        call_id = fields.needed_text("id")
        with fields.needed_inner("function") as function:
            name, arguments = function.needed_text("name"), function.needed_text("arguments")
        return {"id": call_id, "function": {"name": name, "arguments": arguments}}


def read_tool(reader: Reader, path: str, value: Any) -> dict[str, Any]:
    """`{"type": "function", "function": {..}}`."""
    with reader.fields(value, path) as fields:
        kind = fields.needed_text("type")
        if kind != "function":
            fields.refuse("type")
            return {}
        with fields.needed_inner("function") as function:
            return read_function(function)


def read_function(fields: Fields) -> dict[str, Any]:
    """A function's declaration."""
    return {
        "name": fields.needed_text("name"),
        "description": fields.text("description"),
        "parameters": fields.mapping("parameters"),
        "strict": fields.flag("strict"),
    }


def _read_tool_choice(fields: Fields) -> Any:
    choice = fields.take("tool_choice")
    if not isinstance(choice, Mapping):
        return choice
    with fields.reader.fields(choice, fields.at("tool_choice")) as inner:
        inner.expect("type", "function")
        with inner.needed_inner("function") as function:
            return {"name": function.needed_text("name")}


def _read_parameters(fields: Fields) -> dict[str, Any]:
    limits = [fields.whole("max_completion_tokens"), fields.whole("max_tokens")]
    given = {limit for limit in limits if limit is not None}
    if len(given) > 1:
        fields.refuse("max_tokens", "differs from max_completion_tokens")
    found = {
        "temperature": fields.number("temperature"),
        "top_p": fields.number("top_p"),
        "seed": fields.whole("seed"),
        "stop": read_stop(fields, "stop"),
        "max_output_tokens": next(iter(given), None),
        "presence_penalty": fields.number("presence_penalty"),
        "frequency_penalty": fields.number("frequency_penalty"),
        "logprobs": _read_logprobs(fields),
        "reasoning_effort": fields.text("reasoning_effort"),
        "service_tier": fields.text("service_tier"),
        "n": fields.whole("n"),
    }
    return {name: value for name, value in found.items() if value is not None}


def read_stop(fields: Fields, name: str) -> Any:
    """A text or a list of texts."""
    value = fields.take(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    fields.refuse(name, "must be a text or a list of texts")
    return None


def _read_logprobs(fields: Fields) -> int | None:
    asked, top = fields.flag("logprobs"), fields.whole("top_logprobs")
    if top is not None and not asked:
        fields.refuse("top_logprobs", "needs logprobs: true")
    return (top or 0) if asked else None


def _read_format(fields: Fields) -> dict[str, Any]:
    form = fields.inner("response_format")
    if form is None:
        return {}
    with form:
        kind = form.needed_text("type")
        if kind == "json_schema":
            with form.needed_inner("json_schema") as described:
                return read_schema(described)
        if kind == "json_object":
            return {"parameters": {"json_output": True}}
        if kind != "text":
            form.refuse("type")
    return {}


def read_schema(fields: Fields) -> dict[str, Any]:
    """`name`, `schema`, `strict` of a format; its description can't be carried."""
    schema = fields.mapping("schema")
    if schema is None:
        fields.refuse("schema", "is missing")
        return {}
    name, strict = fields.needed_text("name"), fields.flag("strict")
    label = None if name == schema_label(schema) else name
    return {"schema": schema, "schema_name": label, "schema_strict": strict}


def schema_label(schema: Mapping[str, Any]) -> str:
    """The label of a schema that was given none: its title."""
    title = schema.get("title")
    return re.sub(r"[^\w-]", "_", title)[:64] if isinstance(title, str) and title else "answer"


# -- writing a request

_WORDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "reasoning_effort": "reasoning_effort",
    "service_tier": "service_tier",
    "n": "n",
    "max_output_tokens": "",
    "logprobs": "",
    "json_output": "",
}


def write_request(
    request: Request,
    *,
    model: str,
    allow_dropping: Collection[str] = (),
    limit_field: str = "max_completion_tokens",
) -> Written | Refusals:
    """A body of chat/completions.

    Args:
        request: what to ask.
        model: the model's name.
        allow_dropping: parameters that may be left out where the provider has no word for them.
        limit_field: OpenAI's newer models refuse `max_tokens`, the default takes their
            `max_completion_tokens`; many other servers know `max_tokens` alone.
    """
    writer = Writer("OpenAI's chat completions", allow_dropping)
    body: dict[str, Any] = {"model": model, "messages": list(_write_messages(writer, request))}
    body |= writer.parameters(request, _WORDS)
    parameters = request.parameters
    if parameters.max_output_tokens is not None:
        body[limit_field] = parameters.max_output_tokens
    if parameters.logprobs is not None:
        body |= {"logprobs": True}
        if parameters.logprobs:
            body["top_logprobs"] = parameters.logprobs
    if request.tools:
        body["tools"] = [_write_tool(tool) for tool in request.tools]
    if request.tool_choice is not None:
        body["tool_choice"] = _write_tool_choice(request.tool_choice)
    if request.schema is not None:
        described = {"type": "json_schema", "json_schema": write_schema(request)}
        body["response_format"] = described
    elif parameters.json_output:
        body["response_format"] = {"type": "json_object"}
    return writer.finish(body, request)


def _write_messages(writer: Writer, request: Request) -> Iterator[dict[str, Any]]:
    for i, message in enumerate(request.messages):
        path = f"messages[{i}].content"
        written: dict[str, Any] = {"role": message.role}
        if not isinstance(message, AssistantMessage) or message.content:
            written["content"] = _write_content(writer, message.content, path)
        if isinstance(message, AssistantMessage) and message.tool_calls:
            written["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        if message.role == "tool":
            text_only(writer, message.content, path)
            written["tool_call_id"] = message.tool_call_id
        yield written


def text_only(writer: Writer, content: Any, path: str) -> None:
    """Refuse images and files where the provider takes text alone."""
    for j, part in enumerate(() if isinstance(content, str) else content):
        if not isinstance(part, TextPart):
            writer.refuse(f"{path}[{j}]", f"unsupported: {writer.provider} takes text here")


def _write_content(writer: Writer, content: Any, path: str) -> Any:
    if isinstance(content, str):
        return content
    return [_write_part(writer, part, f"{path}[{j}]") for j, part in enumerate(content)]


def _write_part(writer: Writer, part: Any, path: str) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, ImagePart):
        image = {"url": url_of(writer, part, path)}
        if part.detail is not None:
            image["detail"] = part.detail
        return {"type": "image_url", "image_url": image}
    return _write_file(writer, part, path)


def url_of(writer: Writer, part: ImagePart | FilePart, path: str) -> str:
    """A part's URL, or its bytes as a data: URL."""
    found = writer.media(part, path)
    return f"data:{found[0]};base64,{found[1]}" if found else part.url or ""


def _write_file(writer: Writer, part: FilePart, path: str) -> dict[str, Any]:
    if part.url is not None:
        writer.refuse(f"{path}.url", "unsupported: a file must be data here")
    media_type, data = writer.media(part, path) or ("", "")
    audio = {kind: name for name, kind in _AUDIO_TYPES.items()}.get(media_type)
    if audio is not None:
        if part.name is not None:
            writer.unsupported(f"{path}.name")
        return {"type": "input_audio", "input_audio": {"data": data, "format": audio}}
    if media_type.startswith(("audio/", "video/")):
        writer.refuse(path, f"unsupported: {media_type}")
    file = {"file_data": f"data:{media_type};base64,{data}"}
    if part.name is not None:
        file["filename"] = part.name
    return {"type": "file", "file": file}


def _write_tool(tool: Tool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude_none=True)}


def _write_tool_choice(choice: Any) -> Any:
    if isinstance(choice, NamedTool):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def write_schema(request: Request) -> dict[str, Any]:
    """Name, schema and strictness of the answer's format."""
    schema = request.schema or {}
    described: dict[str, Any] = {
        "name": request.schema_name or schema_label(schema),
        "schema": schema,
    }
    if request.schema_strict is not None:
        described["strict"] = request.schema_strict
    return described


# -- reading an answer

#: Ends by their words in lower case. Servers other than OpenAI's have words of their own.
_GOOD_ENDS = frozenset(
    {
        "stop",
        "tool_calls",
        "function_call",
        "end_turn",
        "stop_sequence",
        "eos",
        "eos_token",
        "complete",
    }
)
_CALL_ENDS = frozenset({"tool_calls", "function_call"})
_CUT_ENDS = frozenset({"length", "max_tokens", "max_output_tokens", "model_length"})
_BLOCKED_ENDS = frozenset({"content_filter", "safety", "refusal", "recitation"})


def read_answer(
    status: int, headers: Mapping[str, str] | None, body: bytes
) -> Answer | FailedAnswer:
    """A reply of chat/completions; never raises, whatever the body is.

    The output is the text; `{"tool_calls", "text"}` where the model called tools, and then
    `metadata.finish_reason` is `tool_calls`; a list of these where several answers were asked.
    """
    return read(status, headers, body, _read_chat, usage_of)


def _read_chat(body: Mapping[str, Any]) -> Read:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise BadAnswerError("the answer has no choices")
    found = [_read_choice(choice) for choice in sorted(choices, key=_place)]
    metadata: dict[str, Any] = {}
    note(metadata, "model", body.get("model"))
    note(metadata, "response_id", body.get("id"))
    note(metadata, "service_tier", body.get("service_tier"))
    note(metadata, "system_fingerprint", body.get("system_fingerprint"))
    return combine(found, usage_of(body), metadata | _usage_notes(body))


def _place(choice: Any) -> float:
    index = choice.get("index") if isinstance(choice, Mapping) else None
    return index if isinstance(index, int) else 0


def note(metadata: dict[str, Any], name: str, value: Any) -> None:
    """Keep a text of the answer, where it is one."""
    if isinstance(value, str) and value:
        metadata[name] = value[:500]


def combine(found: Sequence[Read], usage: TokenUsage, metadata: Mapping[str, Any]) -> Read:
    """One reading of an answer's choices: of several, the outputs in a list. One bad choice fails
    the whole, which keeps all texts."""
    finishes = [choice.metadata.get("finish_reason") for choice in found]
    calls = any(finish == "tool_calls" for finish in finishes)
    together = "tool_calls" if calls else next((f for f in finishes if f is not None), None)
    notes = {**metadata, **({"finish_reason": together} if together is not None else {})}
    logprobs = [choice.metadata.get("logprobs") for choice in found]
    if any(entry is not None for entry in logprobs):
        notes["logprobs"] = logprobs if len(found) > 1 else logprobs[0]
    for name in ("safety_ratings", "citations"):
        if name in found[0].metadata:
            notes[name] = found[0].metadata[name]
    outputs = [choice.output for choice in found]
    output = outputs if len(found) > 1 else outputs[0]
    if len(found) > 1:
        notes["n"] = len(found)
    bad = next((choice for choice in found if choice.failed is not None), None)
    if bad is None:
        return Read(output, usage, notes)
    notes["finish_reason"] = bad.metadata.get("finish_reason", together)
    if any(outputs):
        notes["partial_output"] = output
    return Read(None, usage, notes, bad.failed, bad.message)


def _read_choice(choice: Any) -> Read:
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(message, Mapping):
        raise BadAnswerError("a choice of the answer has no message")
    text, calls = content_text(message.get("content")), list(_calls(message))
    output = output_of(text, calls)
    finish = choice.get("finish_reason")
    metadata: dict[str, Any] = {"finish_reason": "tool_calls" if calls else finish}
    if choice.get("logprobs") is not None:
        metadata["logprobs"] = choice["logprobs"]
    # Servers of one's own leave the field out; one that says null has not come to its end.
    failed = _failure(finish if "finish_reason" in choice else "stop", message, text, calls)
    if failed is None:
        return Read(output, metadata=metadata)
    metadata["finish_reason"] = finish if isinstance(finish, str) else None
    return Read(output, metadata=metadata, failed=failed[0], message=failed[1])


def _failure(
    finish: Any, message: Mapping[str, Any], text: str, calls: list[Any]
) -> tuple[FailureKind, str] | None:
    end = finish.strip().lower() if isinstance(finish, str) else ""
    if end in _CUT_ENDS:
        return FailureKind.TRUNCATED, CUT
    if end in _BLOCKED_ENDS:
        return FailureKind.CONTENT_BLOCKED, f"the answer was blocked: {end}"
    if message.get("refusal") or _refused(message.get("content")):
        return FailureKind.CONTENT_BLOCKED, "the model refused"
    if end not in _GOOD_ENDS or (end in _CALL_ENDS and not calls):
        return FailureKind.UNKNOWN, f"the answer ended with {short(finish)}"
    if not text.strip() and not calls:
        return FailureKind.UNKNOWN, f"the answer is empty ({finish})"
    return None


def _refused(content: Any) -> bool:
    parts = content if isinstance(content, list) else ()
    return any(isinstance(part, Mapping) and part.get("type") == "refusal" for part in parts)


CUT = "the answer was cut at the output limit: raise max_output_tokens"


def content_text(content: Any) -> str:
    """A message's text; of a list of parts its text parts, without thoughts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return "".join(part if isinstance(part, str) else _part_text(part) for part in parts)


def _part_text(part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type", "text") not in ("text", "output_text"):
        return ""
    text = part.get("text")
    return text if isinstance(text, str) else ""


def _calls(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if not isinstance(call, Mapping):
            raise BadAnswerError("a tool call of the answer is no object")
        if isinstance(call.get("custom"), Mapping):
            name, given = (_text(call["custom"].get(field)) for field in ("name", "input"))
            custom = {"name": name, "input": given}
            yield {"id": _text(call.get("id")), "type": "custom", "custom": custom}
        else:
            yield _function_call(call.get("id"), call.get("function"))
    if message.get("function_call"):
        yield _function_call("", message["function_call"])


def _function_call(call_id: Any, function: Any) -> dict[str, Any]:
    if not isinstance(function, Mapping):
        raise BadAnswerError("a tool call of the answer has no function")
    name, arguments = function.get("name"), function.get("arguments")
    return tool_call(_text(call_id), _text(name), _text(arguments))


def _text(value: Any) -> str:
    """A text; some servers write arguments as an object."""
    if isinstance(value, str):
        return value
    return "" if value is None else json_text(value)


# -- tokens


def usage_of(body: Mapping[str, Any]) -> TokenUsage:
    """Tokens of an answer, as billed. Some servers count reasoning beside the completion, some
    inside it; the total tells which."""
    usage = body.get("usage")
    if not isinstance(usage, Mapping):
        return TokenUsage()
    prompt, total = count(usage, "prompt_tokens"), count(usage, "total_tokens")
    output, _ = _output_tokens(usage)
    return TokenUsage(
        input_tokens=prompt,
        output_tokens=output,
        total_tokens=max(total, prompt + output),
        cached_input_tokens=min(_cached(usage), prompt),
    )


def _output_tokens(usage: Mapping[str, Any]) -> tuple[int, bool]:
    """Billed output tokens, and whether they are a guess."""
    prompt, completion = count(usage, "prompt_tokens"), count(usage, "completion_tokens")
    reasoning, total = _reasoning(usage), count(usage, "total_tokens")
    if prompt + completion + reasoning == total:
        return completion + reasoning, False
    if prompt + completion == total or not total:
        return completion, False
    return max(completion, total - prompt), True


def _reasoning(usage: Mapping[str, Any]) -> int:
    return count(usage.get("completion_tokens_details"), "reasoning_tokens") or count(
        usage, "reasoning_tokens"
    )


def _cached(usage: Mapping[str, Any]) -> int:
    return (
        count(usage.get("prompt_tokens_details"), "cached_tokens")
        or count(usage, "prompt_cache_hit_tokens")  # DeepSeek
        or count(usage, "cached_tokens")  # Moonshot
    )


def _usage_notes(body: Mapping[str, Any]) -> dict[str, Any]:
    usage = body.get("usage")
    if not isinstance(usage, Mapping):
        return {}
    notes: dict[str, Any] = {
        "reasoning_tokens": _reasoning(usage),
        "cache_write_tokens": count(usage.get("prompt_tokens_details"), "cache_write_tokens"),
        "usage_guessed": _output_tokens(usage)[1],
        "usage_clamped": nonsense(usage, "prompt_tokens", "completion_tokens", "total_tokens"),
    }
    return {name: value for name, value in notes.items() if value}


# -- embeddings


def read_embeddings(
    status: int, headers: Mapping[str, str] | None, body: bytes
) -> Answer | FailedAnswer:
    """A reply of embeddings: the output is the list of vectors in the inputs' order, as numbers
    (base64 is decoded)."""
    return read(status, headers, body, _read_vectors, usage_of)


def _read_vectors(body: Mapping[str, Any]) -> Read:
    data = body.get("data")
    if not isinstance(data, list) or not data:
        raise BadAnswerError("the answer has no embeddings")
    metadata: dict[str, Any] = {}
    note(metadata, "model", body.get("model"))
    return Read([_vector(entry) for entry in sorted(data, key=_place)], usage_of(body), metadata)


def _vector(entry: Any) -> list[float]:
    value = entry.get("embedding") if isinstance(entry, Mapping) else None
    if isinstance(value, str):
        value = _floats(value)
    if not isinstance(value, list) or not value or not all(map(_finite, value)):
        raise BadAnswerError("an embedding of the answer is no list of numbers")
    return value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _floats(text: str) -> list[float]:
    numbers = array.array("f")
    try:
        numbers.frombytes(base64.b64decode(text, validate=True))
    except ValueError:
        raise BadAnswerError("an embedding of the answer is no base64 of floats") from None
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


# -- writing an answer


def write_answer(
    completion: Completion[Any], *, model: str, answer_id: str, created: int = 0
) -> dict[str, Any]:
    """A chat.completion of what any provider answered.

    Args:
        completion: the answer; an output that is no text is written as JSON.
        model: PROVIDER:MODEL that answered.
        answer_id: the answer's id.
        created: seconds since 1970.
    """
    usage = completion.usage
    outputs = split_output(completion)
    return {
        "id": completion.metadata.get("response_id") or answer_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [_write_choice(i, *output) for i, output in enumerate(outputs)],
        "usage": {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens},
            "completion_tokens_details": {
                "reasoning_tokens": completion.metadata.get("reasoning_tokens", 0)
            },
        },
    }


def split_output(completion: Completion[Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Text and tool calls of each answer in a completion."""
    called = completion.metadata.get("finish_reason") == "tool_calls"
    several = completion.metadata.get("n", 1) > 1 and isinstance(completion.output, list)
    outputs = completion.output if several else [completion.output]
    return [_text_and_calls(output, called) for output in outputs]


def _has_calls(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("tool_calls"), list)


def _text_and_calls(output: Any, called: bool) -> tuple[str, list[dict[str, Any]]]:
    if called and _has_calls(output):
        return output.get("text") or "", list(output["tool_calls"])
    return output if isinstance(output, str) else json_text(output), []


def _write_choice(index: int, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text or None, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "finish_reason": "tool_calls" if calls else "stop",
        "logprobs": None,
    }


def write_embeddings(completion: Completion[Any], *, model: str) -> dict[str, Any]:
    """A list of embeddings of what any provider answered.

    Args:
        completion: its output is a list of vectors.
        model: PROVIDER:MODEL that answered.
    """
    usage = completion.usage
    data = [
        {"object": "embedding", "index": i, "embedding": vector}
        for i, vector in enumerate(completion.output)
    ]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": usage.input_tokens, "total_tokens": usage.total_tokens},
    }
