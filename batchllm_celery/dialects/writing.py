"""What the writers of all dialects share: what a provider has no word for, parts, `extra`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from batchllm_celery.dialects.media import media_type_of
from batchllm_celery.dialects.refusals import Refusal, Refusals
from batchllm_celery.models.request import (
    NEVER_EXTRA,
    FilePart,
    ImagePart,
    Request,
    ToolCall,
    too_deep,
)


@dataclass(frozen=True, slots=True)
class Written:
    """A body to send, and the parameters that were left out of it by permission."""

    body: dict[str, Any]
    dropped: tuple[str, ...] = ()


@dataclass(slots=True)
class Writer:
    """Collects what the provider has no word for while a body is written."""

    provider: str
    allow_dropping: Collection[str] = ()
    refusals: list[Refusal] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def refuse(self, path: str, message: str) -> None:
        """Note what can't be sent."""
        self.refusals.append(Refusal(path, message))

    def unsupported(self, path: str) -> None:
        """The provider has no word for this: refused by name, or dropped where that is allowed.
        A parameter may be allowed by its bare name (`seed`)."""
        name = path.removeprefix("parameters.")
        if name in self.allow_dropping or path in self.allow_dropping:
            self.dropped.append(name)
        else:
            self.refuse(path, f"unsupported: {self.provider} has no word for it")

    def parameters(self, request: Request, words: Mapping[str, str]) -> dict[str, Any]:
        """The parameters that have a word of their own here, under it; the rest is unsupported.
        A word of "" means that the caller writes it himself."""
        written: dict[str, Any] = {}
        for name, value in request.parameters.given().items():
            word = words.get(name)
            if word is None:
                self.unsupported(f"parameters.{name}")
            elif word:
                written[word] = list(value) if isinstance(value, tuple) else value
        return written

    def media(self, part: ImagePart | FilePart, path: str) -> tuple[str, str] | None:
        """A part's media type and base64 text; None for a url, and where it was refused."""
        if part.path is not None:
            self.refuse(f"{path}.path", "the file has not been read")
        if part.data is None:
            return None
        found = media_type_of(part.data)
        given = _plain(part.media_type)
        if _contradict(given, found):
            self.refuse(f"{path}.media_type", f"the content is {found or 'something else'}")
        media_type = given or found
        if media_type is None:
            self.refuse(f"{path}.media_type", "is missing, and the content does not tell")
            return None
        if isinstance(part, ImagePart) and not media_type.startswith("image/"):
            self.refuse(path, f"is no image, but {media_type}")
        return media_type, _base64(part.data)

    def arguments(self, call: ToolCall, path: str) -> dict[str, Any]:
        """A tool call's arguments as an object, for providers that want one."""
        value = _object_in(call.function.arguments)
        if value is not None:
            return value
        self.refuse(f"{path}.function.arguments", "must be a JSON object in text")
        return {}

    def finish(
        self, body: dict[str, Any], request: Request, same_field: Callable[[str], str] = str
    ) -> Written | Refusals:
        """The body with `extra` merged in, or what was refused.

        `same_field` maps a field's spellings to one, where a provider reads several.
        """
        self._merge(body, request.extra, "extra", same_field)
        if self.refusals:
            return Refusals(tuple(self.refusals))
        return Written(body, tuple(dict.fromkeys(self.dropped)))

    def _merge(
        self, body: dict[str, Any], extra: Mapping[str, Any], path: str, same: Callable[[str], str]
    ) -> None:
        for name, value in extra.items():
            key = same(name)
            if path == "extra" and (name in NEVER_EXTRA or key in NEVER_EXTRA):
                self.refuse(f"{path}.{name}", "is never taken from extra")
            elif key not in body:
                body[key] = value
            elif isinstance(body[key], dict) and isinstance(value, Mapping):
                body[key] = dict(body[key])
                self._merge(body[key], value, f"{path}.{name}", same)
            else:
                self.refuse(f"{path}.{name}", "the request itself writes this field")


#: Bytes of data whose base64 text is kept for the next row: several may share one file.
_KEPT_BYTES = 64 * 1024


def _base64(data: bytes) -> str:
    return _kept_base64(data) if len(data) >= _KEPT_BYTES else _encoded(data)


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


_kept_base64 = lru_cache(maxsize=2)(_encoded)

_SPELLINGS = {
    "image/jpg": "image/jpeg",
    "audio/mp3": "audio/mpeg",
    "audio/x-wav": "audio/wav",
    "audio/wave": "audio/wav",
    "audio/vnd.wave": "audio/wav",
    "application/x-pdf": "application/pdf",
}


def _plain(media_type: str | None) -> str | None:
    if media_type is None:
        return None
    return _SPELLINGS.get(media_type.lower(), media_type.lower())


#: What the content tells with certainty.
_CERTAIN = frozenset(
    {
        "image/png",
        "image/jpeg",
        "image/gif",
        "image/webp",
        "application/pdf",
        "audio/wav",
        "audio/mpeg",
    }
)


def _contradict(given: str | None, found: str | None) -> bool:
    """Whether the content can't be what its media type says.

    Text may be CSV, JSON or SVG; audio may begin with what no player minds.
    """
    if given is None or given == found:
        return False
    return found in _CERTAIN or (given in _CERTAIN and not given.startswith("audio/"))


def json_text(value: Any) -> str:
    """JSON text, as tool arguments and results are written."""
    return json.dumps(value, ensure_ascii=False)


def as_object(text: Any) -> dict[str, Any]:
    """Tool arguments as an object; what is none is kept under `arguments`."""
    value = _object_in(text)
    return {"arguments": text} if value is None else value


def _object_in(text: Any) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and not too_deep(value) else None
