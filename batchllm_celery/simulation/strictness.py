"""What the real providers refuse with a 400: unknown fields, wrong roles, wrong media types.

Written from the providers' references, apart from the package's own dialects: a fault of these must
not be believed by both sides.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any

from batchllm_celery.simulation.wire import WireError

_NAMES = {
    "openai": """audio frequency_penalty function_call functions logit_bias logprobs
        max_completion_tokens max_tokens messages metadata modalities model moderation n
        parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_options
        prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier
        stop store stream stream_options temperature tool_choice tools top_logprobs top_p user
        verbosity web_search_options""",
    "responses": """access_programs background background_options context_management conversation
        image include input instructions max_output_tokens max_tool_calls metadata model moderation
        parallel_tool_calls previous_response_id prompt prompt_cache_key prompt_cache_options
        prompt_cache_retention reasoning safety_identifier service_tier store stream stream_options
        temperature text tool_choice tools top_logprobs top_p truncation user""",
    "embeddings": "dimensions encoding_format input model user",
    "gemini": """contents systemInstruction tools toolConfig safetySettings generationConfig
        cachedContent labels model store serviceTier modelArmorConfig""",
    "anthropic": """cache_control container context_management diagnostics inference_geo max_tokens
        mcp_servers messages metadata model output_config service_tier speed stop_sequences stream
        system temperature thinking tool_choice tools top_k top_p user_profile_id workspace_id""",
}
_FIELDS = {wire: frozenset(names.split()) for wire, names in _NAMES.items()}
_NEEDED = {
    "openai": ("model", "messages"),
    "responses": ("model",),
    "embeddings": ("model", "input"),
    "gemini": ("contents",),
    "anthropic": ("model", "messages", "max_tokens"),
}
_CHAT_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_IMAGES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
_GEMINI_TYPES = re.compile(
    r"image/(png|jpeg|webp|heic|heif|gif)|application/(pdf|json)|text/[\w.+-]+|"
    r"audio/[\w.+-]+|video/[\w.+-]+"
)


def camel(name: str) -> str:
    """Gemini reads both spellings of a field."""
    return re.sub(r"_([a-z])", lambda match: match.group(1).upper(), name)


def check(wire: str, body: Mapping[str, Any]) -> None:
    """Refuse a body that the real provider would refuse.

    Raises:
        WireError: 400, naming the field.
    """
    known = _FIELDS[wire]
    for name in body:
        if (camel(name) if wire == "gemini" else name) not in known:
            raise WireError(400, f"Unknown field {name!r}.", code="unknown_parameter")
    for name in _NEEDED[wire]:
        if body.get(name) is None:
            raise WireError(400, f"Missing field {name!r}.", code="missing_required_parameter")
    _CHECKS[wire](body)


def _chat(body: Mapping[str, Any]) -> None:
    waiting: set[str] = set()
    for i, message in enumerate(_objects(body, "messages")):
        role = message.get("role")
        if role not in _CHAT_ROLES:
            raise WireError(400, f"messages[{i}].role is {role!r}.", code="invalid_value")
        if role == "tool":
            if message.get("tool_call_id") not in waiting:
                raise WireError(400, f"messages[{i}]: a tool message must follow its call.")
            waiting.discard(str(message.get("tool_call_id")))
        elif waiting:
            raise WireError(400, f"messages[{i}]: tool calls must be followed by tool messages.")
        for call in message.get("tool_calls") or ():
            waiting.add(str(call.get("id")))
        for part in _parts(message.get("content")):
            url = (
                (part.get("image_url") or {}).get("url") if part.get("type") == "image_url" else ""
            )
            _check_data_url(url, f"messages[{i}]")
    if waiting:
        raise WireError(400, "tool calls must be followed by tool messages.")


def _responses(body: Mapping[str, Any]) -> None:
    items = body.get("input")
    for i, item in enumerate(items if isinstance(items, list) else ()):
        for part in _parts(item.get("content") if isinstance(item, Mapping) else None):
            _check_data_url(part.get("image_url"), f"input[{i}]")


def _gemini(body: Mapping[str, Any]) -> None:
    contents = body["contents"]
    for i, content in enumerate(contents if isinstance(contents, list) else [contents]):
        if not isinstance(content, Mapping):
            continue
        role = content.get("role", "user")
        if role not in ("user", "model", "function"):
            raise WireError(400, "Please use a valid role: user, model.")
        for part in content.get("parts") or ():
            inline = part.get("inlineData") or part.get("inline_data")
            if inline is None:
                continue
            media_type = inline.get("mimeType") or inline.get("mime_type") or ""
            if not _GEMINI_TYPES.fullmatch(media_type):
                raise WireError(400, f"contents[{i}]: Unsupported MIME type: {media_type}")
            _check_base64(inline.get("data"), f"contents[{i}]")


def _anthropic(body: Mapping[str, Any]) -> None:
    messages = _objects(body, "messages")
    if messages and messages[0].get("role") != "user":
        raise WireError(400, "messages: first message must use the 'user' role")
    for i, message in enumerate(messages):
        if message.get("role") not in ("user", "assistant"):
            raise WireError(400, f"messages.{i}.role: Input should be 'user' or 'assistant'")
        for part in _parts(message.get("content")):
            source = part.get("source") or {}
            if source.get("type") != "base64":
                continue
            allowed = _IMAGES if part.get("type") == "image" else {"application/pdf"}
            if source.get("media_type") not in allowed:
                raise WireError(400, f"messages.{i}: media_type {source.get('media_type')!r}")
            _check_base64(source.get("data"), f"messages.{i}")


def _nothing(body: Mapping[str, Any]) -> None:
    """There is no more to check."""


_CHECKS = {
    "openai": _chat,
    "responses": _responses,
    "embeddings": _nothing,
    "gemini": _gemini,
    "anthropic": _anthropic,
}


def _objects(body: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = body.get(name)
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise WireError(400, f"{name} must be a list of objects.", code="invalid_type")
    return found


def _parts(content: Any) -> Iterator[Mapping[str, Any]]:
    for part in content if isinstance(content, list) else ():
        if isinstance(part, Mapping):
            yield part


def _check_data_url(url: Any, place: str) -> None:
    if not isinstance(url, str) or not url.startswith("data:"):
        return
    head, _, data = url.partition(",")
    if head.removeprefix("data:").partition(";")[0] not in _IMAGES:
        raise WireError(400, f"{place}: unsupported image", code="invalid_image_format")
    _check_base64(data, place)


def _check_base64(data: Any, place: str) -> None:
    try:
        base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError):
        try:
            base64.b64decode(data, altchars=b"-_", validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise WireError(400, f"{place}: data is no base64") from None
