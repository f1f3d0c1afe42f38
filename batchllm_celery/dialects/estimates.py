"""About how many input tokens a prompt of any form has, its images and files included."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from batchllm_celery.dialects.blobs import lift
from batchllm_celery.dialects.media import BYTES_PER_TOKEN, tokens_of_part
from batchllm_celery.models.request import (
    TEXT_FIELDS,
    DialectName,
    ImagePart,
    NativeRequest,
    Prompt,
    Request,
    text_of,
)

_LINKS = frozenset({"url", "image_url", "file_url", "fileUri", "file_uri"})


def tokens_of_prompt(prompt: Prompt, dialect: DialectName, *, model: str = "") -> int:
    """Text by its bytes, parts by the provider's published rules, at least 1.

    A part that is only linked counts as an image of usual size.

    Args:
        prompt: of any form; a native body counts by `dialect` too.
        dialect: whose rules.
        model: the model's name: OpenAI's rules differ by it.
    """
    tokens = math.ceil(len(text_of(prompt).encode("utf-8", "replace")) / BYTES_PER_TOKEN)
    for data, media_type, detail in _parts(prompt):
        tokens += tokens_of_part(data, dialect, model=model, media_type=media_type, detail=detail)
    return max(tokens, 1)


def _parts(prompt: Prompt) -> Iterator[tuple[bytes, str | None, Any]]:
    """Bytes, media type and detail of each part; b"" for one that is linked."""
    if isinstance(prompt, Request):
        for _, part in prompt.media():
            detail = part.detail if isinstance(part, ImagePart) else None
            yield part.data or b"", part.media_type or _LINKED, detail
    elif isinstance(prompt, NativeRequest):
        yield from _native_parts(prompt.body)


_LINKED = "image/*"


def _native_parts(body: dict[str, Any]) -> Iterator[tuple[bytes, str | None, Any]]:
    lifted = lift(body)
    for place in lifted.places:
        if place.encoding in ("text", "json") or place.path[-1] in TEXT_FIELDS:
            continue  # a text, which counts as such, also where it could be base64
        holder = _holder(body, place.path)
        named = (holder.get(name) for name in ("mimeType", "mime_type", "media_type"))
        declared = place.prefix[5:].partition(";")[0] or next(filter(None, named), None)
        yield lifted.blobs[place.sha], declared, holder.get("detail")
    for holder in _links(body, {}):
        yield b"", _LINKED, holder.get("detail")


def _holder(body: Any, path: tuple[str | int, ...]) -> dict[str, Any]:
    """The object that a value stands in."""
    holder = body
    for step in path[:-1]:
        holder = holder[step]
    return holder if isinstance(holder, dict) else {}


def _links(value: Any, holder: dict[str, Any], name: str = "") -> Iterator[dict[str, Any]]:
    """The object around each link."""
    if isinstance(value, str):
        if name in _LINKS and value.startswith(("http://", "https://", "gs://")):
            yield holder
    elif isinstance(value, dict):
        for field, inner in value.items():
            yield from _links(inner, value, field)
    elif isinstance(value, list):
        for inner in value:
            yield from _links(inner, holder, name)
