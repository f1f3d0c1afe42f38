"""What recognises a row when its input is read again: its own id, else what stands in it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

#: Bytes of a key's or a question's hash: millions of rows are kept in memory.
HASH_BYTES = 8


def key_of_id(item_id: str) -> bytes:
    """The key of a row that has an id of its own."""
    return b"i" + hashed(item_id)


def key_of_fields(fields: Any) -> bytes:
    """The key of a row without an id: its source fields, before a template. Equal rows have the
    same key, and are told apart by their order."""
    return b"c" + hashed(canonical(fields))


def key_of_line(line: str) -> bytes:
    """The key of a row that no item can be made of."""
    return b"b" + hashed(line)


def canonical(value: Any) -> str:
    """JSON that is equal for equal values; what has no JSON form as its text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def hashed(text: str, options: bytes = b"") -> bytes:
    """8 bytes of a text, under the bytes that it shares with others."""
    data = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=HASH_BYTES, key=options).digest()
