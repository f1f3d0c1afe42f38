"""Large parts of a request, lifted out of it by content and put back unchanged.

A payload stays small, and bytes that many rows share are stored once. Nothing in the body marks a
place: the places stand beside it, so no text of a user's can be taken for one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from batchllm_celery.models.request import Request

#: Bytes of JSON that a payload may have.
MOST_PAYLOAD_BYTES = 64 * 1024
#: A text of this many characters is lifted, whatever it is.
LONG_TEXT = 4096

Encoding: TypeAlias = Literal["base64", "base64url", "text", "bytes", "lifted"]

_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w.+=-]+){0,4};base64,")
#: Fields that hold base64 beside a media type or a format, in any dialect.
_DATA_FIELDS = frozenset({"data", "file_data"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a blob belongs.

    Args:
        path: keys and indexes from the body's root.
        sha: hex SHA-256 of the blob.
        encoding: how its bytes become the value: base64 text, text, the bytes themselves (of a
            `Request`'s part), or a lifted body of its own.
        prefix: what stands before them (`data:image/png;base64,`).
    """

    path: tuple[str | int, ...]
    sha: str
    encoding: Encoding
    prefix: str = ""

    def to_json(self) -> list[Any]:
        """As a list, for a payload."""
        return [list(self.path), self.sha, self.encoding, self.prefix]

    @classmethod
    def of(cls, value: Any) -> Place:
        """Read `to_json`'s list."""
        path, sha, encoding, prefix = value
        return cls(tuple(path), sha, encoding, prefix)


@dataclass(frozen=True, slots=True)
class Lifted:
    """A body whose large values are null, the places of these, and their bytes by SHA-256."""

    body: Any
    places: tuple[Place, ...]
    blobs: Mapping[str, bytes]


class BlobMissingError(LookupError):
    """A blob that a body needs is not there; its argument is the SHA-256."""


def lift(body: Any, *, most_bytes: int = MOST_PAYLOAD_BYTES, long_text: int = LONG_TEXT) -> Lifted:
    """Take data: URLs, base64 sources and long texts out of a body of any dialect.

    The body itself is not changed. Base64 is stored as the bytes that it stands for where it is
    the only way to write them, else as the text that it is.

    Args:
        body: JSON values.
        most_bytes: what is left, with its places, is lifted as a whole where its JSON is longer.
        long_text: characters from which on any text is lifted.
    """
    blobs: dict[str, bytes] = {}
    places: list[Place] = []
    rest = _lift(body, (), long_text, places, blobs)
    whole = json.dumps([rest, [place.to_json() for place in places]], ensure_ascii=False)
    data = whole.encode("utf-8", "surrogatepass")
    if len(data) <= most_bytes:
        return Lifted(rest, tuple(places), blobs)
    return Lifted(None, (Place((), _store(blobs, data), "lifted"),), blobs)


def lift_request(
    request: Request, *, most_bytes: int = MOST_PAYLOAD_BYTES, long_text: int = LONG_TEXT
) -> Lifted:
    """The same of a request's JSON, without encoding its parts on the way."""
    blobs: dict[str, bytes] = {}
    places: list[Place] = []
    messages = []
    for i, message in enumerate(request.messages):
        content = message.content
        if not isinstance(content, str):
            parts = list(content)
            for j, part in enumerate(parts):
                data = getattr(part, "data", None)
                if data is not None:
                    path = ("messages", i, "content", j, "data")
                    places.append(Place(path, _store(blobs, data), "bytes"))
                    parts[j] = part.model_copy(update={"data": None})
            message = message.model_copy(update={"content": tuple(parts)})
        messages.append(message)
    bare = request.model_copy(update={"messages": tuple(messages)})
    lifted = lift(bare.to_json(), most_bytes=most_bytes, long_text=long_text)
    return Lifted(lifted.body, (*lifted.places, *places), {**lifted.blobs, **blobs})


def restore(body: Any, places: tuple[Place, ...], blobs: Mapping[str, bytes]) -> Any:
    """The body as it was. What has no places is not copied; `body` is not changed.

    Raises:
        BlobMissingError: naming the first blob that is not among `blobs`.
    """
    for place in places:
        try:
            data = blobs[place.sha]
        except KeyError:
            raise BlobMissingError(place.sha) from None
        if place.encoding == "lifted":
            inner, listed = json.loads(data.decode("utf-8", "surrogatepass"))
            body = restore(inner, tuple(Place.of(entry) for entry in listed), blobs)
        else:
            body = _put(body, place.path, _value(place, data))
    return body


def _lift(
    value: Any,
    path: tuple[str | int, ...],
    long_text: int,
    places: list[Place],
    blobs: dict[str, bytes],
) -> Any:
    if isinstance(value, str):
        found = _split(value, path, long_text)
        if found is None:
            return value
        encoding, prefix, data = found
        places.append(Place(path, _store(blobs, data), encoding, prefix))
        return None
    if isinstance(value, dict):
        return {
            name: _lift(inner, (*path, name), long_text, places, blobs)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_lift(inner, (*path, i), long_text, places, blobs) for i, inner in enumerate(value)]
    return value


def _split(
    text: str, path: tuple[str | int, ...], long_text: int
) -> tuple[Encoding, str, bytes] | None:
    """How a text is stored; None where it stays."""
    match = _DATA_URL.match(text)
    prefix = match.group() if match else ""
    if match or len(text) >= long_text or (path and path[-1] in _DATA_FIELDS):
        found = next(_decoded(text[len(prefix) :]), None)
        if found is not None:
            return found[0], prefix, found[1]
    if len(text) >= long_text:
        return "text", "", text.encode("utf-8", "surrogatepass")
    return None


def _decoded(text: str) -> Iterator[tuple[Encoding, bytes]]:
    """The bytes of base64, where they can be written in no other way."""
    if not text or len(text) % 4:
        return
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = None
    if data is not None and base64.b64encode(data).decode("ascii") == text:
        yield "base64", data
    if "-" in text or "_" in text:
        try:
            data = base64.urlsafe_b64decode(text)
        except (binascii.Error, ValueError):
            return
        if base64.urlsafe_b64encode(data).decode("ascii") == text:
            yield "base64url", data


def _store(blobs: dict[str, bytes], data: bytes) -> str:
    sha = _sha(data)
    blobs[sha] = data
    return sha


@lru_cache(maxsize=4)  # many rows may share one object of many megabytes
def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _value(place: Place, data: bytes) -> Any:
    if place.encoding == "bytes":
        return data
    if place.encoding == "base64":
        return place.prefix + base64.b64encode(data).decode("ascii")
    if place.encoding == "base64url":
        return place.prefix + base64.urlsafe_b64encode(data).decode("ascii")
    return place.prefix + data.decode("utf-8", "surrogatepass")


def _put(body: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy of the body along the path, with the value at its end."""
    if not path:
        return value
    first, rest = path[0], path[1:]
    copy = dict(body) if isinstance(body, dict) else list(body)
    copy[first] = _put(body[first], rest, value) if rest else value  # type: ignore[index]
    return copy
