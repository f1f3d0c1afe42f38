"""Gemini's generateContent, of the Developer API and of Vertex.

Field names are read in camelCase and snake_case, mixed as both are in real files, and written in
camelCase.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
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
    combine,
    note,
    read_base64,
    split_output,
    text_only,
)
from batchllm_celery.dialects.refusals import Fields, Reader, Refusals
from batchllm_celery.dialects.writing import Writer, Written, as_object, json_text
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

_UNDERSCORE = re.compile(r"_([a-z0-9])")


def camel(name: str) -> str:
    """`top_p` and `topP` are one field."""
    return _UNDERSCORE.sub(lambda match: match.group(1).upper(), name)


def _fields(reader: Reader, value: Any, path: str) -> Fields:
    """An object's fields under their names in camelCase."""
    if not isinstance(value, Mapping):
        return reader.fields(value, path)
    names: dict[str, Any] = {}
    for name, inner in value.items():
        if camel(name) in names:
            reader.refuse(f"{path}.{name}", "is given twice")
        names[camel(name)] = inner
    return Fields(reader, names, path)


def _inner(fields: Fields, name: str) -> Fields | None:
    value = fields.take(name)
    return None if value is None else _fields(fields.reader, value, fields.at(name))


# -- reading a request


def read_request(body: Any) -> Request | Refusals:
    """A body of generateContent in words of no provider.

    Returns:
        `Refusals` where a field can't be carried to another provider, each by its path.
    """
    reader = Reader()
    with _fields(reader, body, "body") as fields:
        fields.text("model")
        messages = _read_system(reader, fields)
        calls = _CallIds()
        for path, content in fields.elements("contents"):
            messages += _read_content(reader, path, content, calls)
        config = _inner(fields, "generationConfig") or Fields(reader, {}, "body.generationConfig")
        with config:
            request: dict[str, Any] = {
                "messages": messages,
                "parameters": _read_parameters(config),
                "tools": [
                    t for found in fields.elements("tools") for t in _read_tool(reader, *found)
                ],
                "tool_choice": _read_tool_choice(fields),
                **_read_schema(config),
            }
            if request.pop("json_output"):
                request["parameters"]["json_output"] = True
        tier = fields.text("serviceTier")
        if tier is not None:
            request["parameters"]["service_tier"] = tier
    return build_request(reader, request)


def _read_system(reader: Reader, fields: Fields) -> list[dict[str, Any]]:
    system = fields.take("systemInstruction")
    if system is None:
        return []
    with _fields(reader, system, fields.at("systemInstruction")) as inner:
        inner.text("role")  # it is not read
        texts = [_read_text(reader, *found) for found in inner.elements("parts")]
    return [{"role": "system", "content": [{"type": "text", "text": text} for text in texts]}]


def _read_text(reader: Reader, path: str, value: Any) -> str:
    with _fields(reader, value, path) as part:
        return part.needed_text("text")


class _CallIds:
    """Gemini knows a call by its place and name; the others by an id, which is made up here."""

    def __init__(self) -> None:
        self._count = 0
        self._open: list[tuple[str, str]] = []

    def called(self, name: str, given: str | None) -> str:
        self._count += 1
        call_id = given or f"call_{self._count}"
        self._open.append((name, call_id))
        return call_id

    def answered(self, name: str, given: str | None) -> str | None:
        """The id of the oldest open call of this name."""
        for i, (called, call_id) in enumerate(self._open):
            if called == name and given in (None, call_id):
                del self._open[i]
                return call_id
        return given


def _read_content(
    reader: Reader, path: str, value: Any, calls: _CallIds
) -> Iterator[dict[str, Any]]:
    with _fields(reader, value, path) as content:
        role = content.text("role") or "user"
        if role not in ("user", "model", "function"):
            content.refuse("role", "must be user or model")
        parts = [_read_part(reader, *found, calls) for found in content.elements("parts")]
    results = [part for kind, part in parts if kind == "result"]
    made = [part for kind, part in parts if kind == "call"]
    others = [part for kind, part in parts if kind == "part"]
    if role == "model":
        if results:
            reader.refuse(path, "a model's turn can't answer calls")
        yield {"role": "assistant", "content": others or "", "tool_calls": made}
        return
    if made:
        reader.refuse(path, "a user's turn can't make calls")
    yield from results
    if others or not results:
        yield {"role": "user", "content": others}


def _read_part(
    reader: Reader, path: str, value: Any, calls: _CallIds
) -> tuple[str, dict[str, Any]]:
    with _fields(reader, value, path) as part:
        part.expect("thought", False)
        if part.has("text"):
            return "part", {"type": "text", "text": part.text("text") or ""}
        call, result = _inner(part, "functionCall"), _inner(part, "functionResponse")
        if call is not None:
            with call:
                name = call.needed_text("name")
                call_id = calls.called(name, call.text("id"))
                arguments = json_text(call.mapping("args") or {})
                return "call", tool_call(call_id, name, arguments)
        if result is not None:
            with result:
                return "result", _read_result(result, calls)
        return "part", _read_media(part)


def _read_result(result: Fields, calls: _CallIds) -> dict[str, Any]:
    name = result.needed_text("name")
    call_id = calls.answered(name, result.text("id"))
    if call_id is None:
        result.refuse("name", "answers no call that was made")
    response = result.mapping("response") or {}
    text = response.get("output") if response.keys() == {"output"} else None
    content = text if isinstance(text, str) else json_text(response)
    return {"role": "tool", "tool_call_id": call_id or "", "content": content}


def _read_media(part: Fields) -> dict[str, Any]:
    inline, file = _inner(part, "inlineData"), _inner(part, "fileData")
    if inline is not None:
        with inline:
            media_type = inline.needed_text("mimeType")
            source: dict[str, Any] = {"data": read_base64(inline, "data")}
            name = inline.text("displayName")
    elif file is not None:
        with file:
            media_type = file.needed_text("mimeType")
            source, name = {"url": file.needed_text("fileUri")}, file.text("displayName")
    else:
        part.refuse("text", "is missing, and so is any other content")
        return {"type": "text", "text": ""}
    if media_type.startswith("image/") and name is None:
        return {"type": "image", **source, "media_type": media_type}
    return {"type": "file", **source, "media_type": media_type, "name": name}


def _read_tool(reader: Reader, path: str, value: Any) -> Iterator[dict[str, Any]]:
    with _fields(reader, value, path) as tool:
        declared = tool.elements("functionDeclarations")
    for inner_path, declaration in declared:
        with _fields(reader, declaration, inner_path) as fields:
            schema = fields.mapping("parametersJsonSchema")
            plain = fields.mapping("parameters")
            if schema is None and plain is not None:
                schema = plain_schema(plain)
            yield {
                "name": fields.needed_text("name"),
                "description": fields.text("description"),
                "parameters": schema,
            }


def plain_schema(schema: Any) -> Any:
    """Gemini's own schemas as JSON Schema: types in lower case, `nullable` as a second type."""
    if isinstance(schema, list):
        return [plain_schema(element) for element in schema]
    if not isinstance(schema, Mapping):
        return schema
    plain: dict[str, Any] = {}
    for name, value in schema.items():
        key = camel(name)
        if key == "type" and isinstance(value, str):
            plain[key] = value.lower()
        elif key in ("properties", "defs") and isinstance(value, Mapping):
            plain[key] = {inner: plain_schema(entry) for inner, entry in value.items()}
        elif key in ("enum", "required", "default", "example", "propertyOrdering"):
            plain[key] = value
        else:
            plain[key] = plain_schema(value)
    if plain.pop("nullable", None) is True and isinstance(plain.get("type"), str):
        plain["type"] = [plain["type"], "null"]
    for number in ("minItems", "maxItems", "minLength", "maxLength", "minProperties"):
        if isinstance(plain.get(number), str) and plain[number].isdigit():
            plain[number] = int(plain[number])  # 64-bit integers are written as texts
    return plain


def _read_tool_choice(fields: Fields) -> Any:
    config = _inner(fields, "toolConfig")
    if config is None:
        return None
    with config:
        calling = _inner(config, "functionCallingConfig")
        if calling is None:
            return None
        with calling:
            mode = (calling.text("mode") or "AUTO").upper()
            names = [name for _, name in calling.elements("allowedFunctionNames")]
            choice = {"AUTO": "auto", "NONE": "none", "ANY": "required"}.get(mode)
            if choice is None:
                calling.refuse("mode")
            if not names:
                return choice
            if mode != "ANY" or len(names) > 1 or not isinstance(names[0], str):
                calling.refuse("allowedFunctionNames")
            return {"name": names[0]}


def _read_parameters(config: Fields) -> dict[str, Any]:
    asked, top = config.flag("responseLogprobs"), config.whole("logprobs")
    if top is not None and not asked:
        config.refuse("logprobs", "needs responseLogprobs: true")
    top_k = config.number("topK")
    stops = [text for _, text in config.elements("stopSequences")]
    found: dict[str, Any] = {
        "temperature": config.number("temperature"),
        "top_p": config.number("topP"),
        "top_k": int(top_k) if top_k is not None and top_k == int(top_k) else top_k,
        "seed": config.whole("seed"),
        "stop": stops or None,
        "max_output_tokens": config.whole("maxOutputTokens"),
        "presence_penalty": config.number("presencePenalty"),
        "frequency_penalty": config.number("frequencyPenalty"),
        "logprobs": (top or 0) if asked else None,
        "n": config.whole("candidateCount"),
    }
    thinking = _inner(config, "thinkingConfig")
    if thinking is not None:
        with thinking:
            thinking.expect("includeThoughts", False)
            level = thinking.text("thinkingLevel")
            found["reasoning_effort"] = level.lower() if level else None
            found["thinking_budget"] = thinking.whole("thinkingBudget")
    return {name: value for name, value in found.items() if value is not None}


def _read_schema(config: Fields) -> dict[str, Any]:
    kind = config.text("responseMimeType")
    schema, plain = config.mapping("responseJsonSchema"), config.mapping("responseSchema")
    if schema is None and plain is not None:
        schema = plain_schema(plain)
    elif plain is not None:
        config.refuse("responseSchema", "is given beside responseJsonSchema")
    if kind not in (None, "text/plain", "application/json"):
        config.refuse("responseMimeType")
    if schema is not None and kind != "application/json":
        config.refuse("responseMimeType", "must be application/json beside a schema")
    return {"schema": schema, "json_output": kind == "application/json" and schema is None}


# -- writing a request

_WORDS = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "seed": "seed",
    "stop": "stopSequences",
    "max_output_tokens": "maxOutputTokens",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
    "n": "candidateCount",
    "logprobs": "",
    "reasoning_effort": "",
    "thinking_budget": "",
    "service_tier": "",
    "json_output": "",
}
_EFFORTS = frozenset({"minimal", "low", "medium", "high", "xhigh"})


def write_request(
    request: Request, *, model: str = "", allow_dropping: Collection[str] = ()
) -> Written | Refusals:
    """A body of generateContent.

    Args:
        request: what to ask.
        model: the model's name: it stands in the request's path, not in its body.
        allow_dropping: parameters that may be left out where the provider has no word for them.
    """
    writer = Writer("Gemini", allow_dropping)
    body: dict[str, Any] = {}
    system, turns = split_system(writer, request)
    if system:
        body["systemInstruction"] = {"parts": [{"text": text} for text in system]}
    body["contents"] = _write_contents(writer, request, turns)
    config = writer.parameters(request, _WORDS) | _write_config(writer, request)
    if config:
        body["generationConfig"] = config
    if request.tools:
        tools = [_write_tool(writer, tool, f"tools[{i}]") for i, tool in enumerate(request.tools)]
        body["tools"] = [{"functionDeclarations": tools}]
    if request.tool_choice is not None:
        body["toolConfig"] = {"functionCallingConfig": _write_tool_choice(request.tool_choice)}
    if request.parameters.service_tier is not None:
        body["serviceTier"] = request.parameters.service_tier
    return writer.finish(body, request, camel)


def split_system(writer: Writer, request: Request) -> tuple[list[str], int]:
    """The texts of the system messages at the front, and where the turns begin. A later one has
    no place where the system's text stands beside the turns."""
    texts: list[str] = []
    start = 0
    for i, message in enumerate(request.messages):
        if not isinstance(message, SystemMessage):
            continue
        if i > start:
            writer.refuse(f"messages[{i}]", "unsupported: a system message after the first turn")
            continue
        start = i + 1
        content = message.content
        texts += [content] if isinstance(content, str) else [part.text for part in content]
    return texts, start


def _write_config(writer: Writer, request: Request) -> dict[str, Any]:
    parameters, config = request.parameters, dict[str, Any]()
    if parameters.logprobs is not None:
        config["responseLogprobs"] = True
        if parameters.logprobs:
            config["logprobs"] = parameters.logprobs
    thinking: dict[str, Any] = {}
    if parameters.thinking_budget is not None:
        thinking["thinkingBudget"] = parameters.thinking_budget
    if parameters.reasoning_effort in _EFFORTS:
        thinking["thinkingLevel"] = parameters.reasoning_effort
    elif parameters.reasoning_effort is not None:
        writer.unsupported("parameters.reasoning_effort")
    if thinking:
        config["thinkingConfig"] = thinking
    if request.schema is not None:
        config |= {"responseMimeType": "application/json", "responseJsonSchema": request.schema}
        if request.schema_strict is False:
            writer.unsupported("schema_strict")
    elif parameters.json_output:
        config["responseMimeType"] = "application/json"
    return config


def _write_contents(writer: Writer, request: Request, start: int) -> list[dict[str, Any]]:
    contents: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    answering = False
    for i, message in enumerate(request.messages[start:], start):
        path = f"messages[{i}]"
        if isinstance(message, ToolMessage):
            part = _write_result(writer, message, path, names)
            if answering:  # results of one turn's calls belong into one turn
                contents[-1]["parts"].append(part)
            else:
                contents.append({"role": "user", "parts": [part]})
            answering = True
            continue
        answering = False
        if isinstance(message, AssistantMessage):
            parts = _write_parts(writer, message.content, path) if message.content else []
            for j, call in enumerate(message.tool_calls):
                names[call.id] = call.function.name
                arguments = writer.arguments(call, f"{path}.tool_calls[{j}]")
                made = {"id": call.id, "name": call.function.name, "args": arguments}
                parts.append({"functionCall": made})
            contents.append({"role": "model", "parts": parts})
        elif not isinstance(message, SystemMessage):
            parts = _write_parts(writer, message.content, path)
            contents.append({"role": "user", "parts": parts})
    return contents


def _write_result(
    writer: Writer, message: ToolMessage, path: str, names: Mapping[str, str]
) -> dict[str, Any]:
    name = names.get(message.tool_call_id)
    if name is None:
        writer.refuse(f"{path}.tool_call_id", "answers no call that was made")
    text_only(writer, message.content, f"{path}.content")
    text = _joined(message.content)
    result = {"id": message.tool_call_id, "name": name, "response": {"output": text}}
    return {"functionResponse": result}


def _joined(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content if isinstance(part, TextPart))


def _write_parts(writer: Writer, content: Any, path: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"text": content}]
    path += ".content"
    return [_write_part(writer, part, f"{path}[{j}]") for j, part in enumerate(content)]


#: Addresses that Gemini reads itself.
_OWN_URLS = ("gs://", "https://generativelanguage.googleapis.com/", "https://www.youtube.com/")


def _write_part(writer: Writer, part: Any, path: str) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"text": part.text}
    if isinstance(part, ImagePart) and part.detail is not None:
        writer.unsupported(f"{path}.detail")
    name = {"displayName": part.name} if isinstance(part, FilePart) and part.name else {}
    found = writer.media(part, path)
    if found is not None:
        media_type, data = found
        return {"inlineData": {"mimeType": media_type, "data": data, **name}}
    url = part.url or ""
    if part.url is not None and not url.startswith(_OWN_URLS):
        writer.refuse(f"{path}.url", "unsupported: Gemini does not fetch it")
    if part.url is not None and part.media_type is None:
        writer.refuse(f"{path}.media_type", "is missing")
    return {"fileData": {"mimeType": part.media_type, "fileUri": url, **name}}


def _write_tool(writer: Writer, tool: Tool, path: str) -> dict[str, Any]:
    if tool.strict:
        writer.unsupported(f"{path}.strict")
    written: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        written["description"] = tool.description
    if tool.parameters is not None:
        written["parametersJsonSchema"] = tool.parameters
    return written


def _write_tool_choice(choice: Any) -> dict[str, Any]:
    if isinstance(choice, NamedTool):
        return {"mode": "ANY", "allowedFunctionNames": [choice.name]}
    return {"mode": {"auto": "AUTO", "none": "NONE", "required": "ANY"}[choice]}


# -- reading an answer

_BLOCKED = frozenset(
    {
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
)


def read_answer(
    status: int, headers: Mapping[str, str] | None, body: bytes
) -> Answer | FailedAnswer:
    """A reply of generateContent; never raises, whatever the body is.

    The output is the text without thoughts; `{"tool_calls", "text"}` where the model called
    tools, and then `metadata.finish_reason` is `tool_calls`; a list where several candidates were
    asked. `metadata.safety_ratings` are the first candidate's.
    """
    return read(status, headers, body, _read_response, usage_of)


def _get(value: Any, name: str) -> Any:
    """A field by its name in camelCase, or in snake_case."""
    if not isinstance(value, dict):
        return None
    found = value.get(name)
    return value.get(_snake(name)) if found is None else found


@cache
def _snake(name: str) -> str:
    return re.sub(r"([A-Z])", r"_\1", name).lower()


def _read_response(body: Mapping[str, Any]) -> Read:
    usage, metadata = usage_of(body), _notes(body)
    feedback = _get(body, "promptFeedback")
    reason = _get(feedback, "blockReason")
    if reason:
        ratings = _ratings(feedback)
        metadata |= {"safety_ratings": ratings} if ratings else {}
        message = f"the prompt was blocked: {short(reason)}"
        return Read(None, usage, metadata, FailureKind.CONTENT_BLOCKED, message)
    candidates = body.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise BadAnswerError("the answer has no candidates")
    found = [_read_candidate(candidate) for candidate in sorted(candidates, key=_place)]
    return combine(found, usage, metadata)


def _place(candidate: Any) -> float:
    index = candidate.get("index") if isinstance(candidate, Mapping) else None
    return index if isinstance(index, int) else 0


def _read_candidate(candidate: Any) -> Read:
    if not isinstance(candidate, Mapping):
        raise BadAnswerError("a candidate of the answer is no object")
    parts = _get(candidate.get("content"), "parts")
    parts = [part for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
    text, calls = _text(parts), list(_calls(parts))
    output = output_of(text, calls)
    finish = _get(candidate, "finishReason")
    metadata: dict[str, Any] = {"finish_reason": "tool_calls" if calls else finish}
    ratings = _ratings(candidate)
    if ratings:
        metadata["safety_ratings"] = ratings
    logprobs = _get(candidate, "logprobsResult")
    if logprobs is not None:
        metadata["logprobs"] = logprobs
    failed = _failure(candidate, parts, output)
    if failed is None:
        return Read(output, metadata=metadata)
    metadata["finish_reason"] = finish if isinstance(finish, str) else None
    return Read(output, metadata=metadata, failed=failed[0], message=failed[1])


def _failure(
    candidate: Mapping[str, Any], parts: Sequence[Any], output: Any
) -> tuple[FailureKind, str] | None:
    finish = _get(candidate, "finishReason")
    end = finish.strip().upper() if isinstance(finish, str) else ""
    if end == "MAX_TOKENS":
        return FailureKind.TRUNCATED, CUT
    if end in _BLOCKED:
        return FailureKind.CONTENT_BLOCKED, f"the answer was blocked: {end}"
    if end != "STOP":
        # Malformed calls too: the model's answer was not seen, so there is nothing to feed back.
        return FailureKind.UNKNOWN, f"the answer ended with {short(finish)}"
    if not output or (isinstance(output, str) and not output.strip()):
        kinds = sorted({name for part in parts for name in part if name != "text"})
        return FailureKind.UNKNOWN, f"the answer is empty ({', '.join(kinds) or finish})"[:200]
    return None


def _text(parts: Sequence[Mapping[str, Any]]) -> str:
    texts = (part.get("text") for part in parts if not part.get("thought"))
    return "".join(text for text in texts if isinstance(text, str))


def _calls(parts: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for part in parts:
        call = _get(part, "functionCall")
        if isinstance(call, Mapping):
            call_id = call.get("id")
            name, arguments = str(call.get("name") or ""), json_text(call.get("args") or {})
            yield tool_call(str(call_id) if call_id else "", name, arguments)


def _ratings(source: Any) -> dict[str, str]:
    ratings = _get(source, "safetyRatings")
    return {
        str(rating.get("category", "")): str(rating.get("probability", ""))
        for rating in (ratings if isinstance(ratings, list) else ())
        if isinstance(rating, Mapping)
    }


def usage_of(body: Mapping[str, Any]) -> TokenUsage:
    """Tokens of an answer: thoughts are billed as output, and count as such; cached tokens are
    part of the input."""
    usage = _get(body, "usageMetadata")

    def tokens(name: str) -> int:
        return count({"": _get(usage, name)}, "")

    given = tokens("promptTokenCount") + tokens("toolUsePromptTokenCount")
    answered = tokens("candidatesTokenCount") + tokens("thoughtsTokenCount")
    return TokenUsage(
        input_tokens=given,
        output_tokens=answered,
        total_tokens=max(tokens("totalTokenCount"), given + answered),
        cached_input_tokens=min(tokens("cachedContentTokenCount"), given),
    )


def _notes(body: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    note(metadata, "model", _get(body, "modelVersion"))
    note(metadata, "response_id", _get(body, "responseId"))
    usage = _get(body, "usageMetadata")
    thoughts = count({"": _get(usage, "thoughtsTokenCount")}, "")
    if thoughts:
        metadata["reasoning_tokens"] = thoughts
    names = ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount", "totalTokenCount")
    if nonsense({name: _get(usage, name) for name in names}, *names):
        metadata["usage_clamped"] = True
    return metadata


# -- writing an answer


def write_answer(completion: Completion[Any], *, model: str, answer_id: str) -> dict[str, Any]:
    """A response of generateContent of what any provider answered.

    Args:
        completion: the answer; an output that is no text is written as JSON.
        model: PROVIDER:MODEL that answered.
        answer_id: the answer's id.
    """
    usage = completion.usage
    thoughts = min(completion.metadata.get("reasoning_tokens", 0), usage.output_tokens)
    counts = {
        "promptTokenCount": usage.input_tokens,
        "candidatesTokenCount": usage.output_tokens - thoughts,
        "thoughtsTokenCount": thoughts,
        "cachedContentTokenCount": usage.cached_input_tokens,
        "totalTokenCount": usage.total_tokens,
    }
    return {
        "candidates": [_write_candidate(i, *o) for i, o in enumerate(split_output(completion))],
        "modelVersion": model,
        "responseId": completion.metadata.get("response_id") or answer_id,
        "usageMetadata": {name: value for name, value in counts.items() if value},
    }


def _write_candidate(index: int, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"text": text}] if text or not calls else []
    parts += [{"functionCall": call_object(call, "args")} for call in calls]
    return {
        "index": index,
        "content": {"role": "model", "parts": parts},
        "finishReason": "STOP",
    }


def call_object(call: Mapping[str, Any], arguments: str) -> dict[str, Any]:
    """A call of the chat form with its arguments as an object, under this name."""
    function = call.get("function") or {}
    written = {"name": function.get("name", ""), arguments: as_object(function.get("arguments"))}
    return {"id": call["id"], **written} if call.get("id") else written
