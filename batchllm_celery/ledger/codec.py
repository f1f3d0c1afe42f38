"""Rows as Redis holds them, and the fingerprints that tell whether a row has changed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from batchllm_celery.errors import UsageError
from batchllm_celery.models import SCHEMA_VERSION, BatchSpec, StrategySpec

FINGERPRINT_BYTES = 8
#: Levels of a row's context that are carried; see `too_deep`.
DEEPEST = 500
STAMP_BYTES = 13
"""Digits of the feeding time (milliseconds) that `feed.lua` puts before a payload."""


@dataclass(slots=True)
class Payload:
    """One row. `strategy` None: the batch's. `context` is any JSON value."""

    item_id: str
    prompt: str
    context: Any = None
    strategy: StrategySpec | None = None
    problem: str | None = None
    """Why this row can't be run, where that was found out when it was read; never stored."""

    def encode(self) -> bytes:
        """A line of JSON, then the prompt as it is: scripts cut the line off for outcomes that
        they write themselves, and never parse it.

        Raises:
            TypeError: if the context or the parameters are no JSON.
        """
        head: dict[str, Any] = {"v": SCHEMA_VERSION, "id": self.item_id}
        if self.context is not None:
            head["c"] = self.context
        if self.strategy is not None:
            head["s"] = {"name": self.strategy.name, "params": self.strategy.params}
        line = json.dumps(head, separators=(",", ":"))
        return line.encode("ascii") + b"\n" + self.prompt.encode("utf-8", "surrogatepass")

    @classmethod
    def decode(cls, data: bytes) -> Payload:
        """Read `encode`'s bytes back.

        Raises:
            UsageError: for the bytes of a newer version of this package.
        """
        line, _, prompt = data.partition(b"\n")
        head = decode_head(line)
        strategy = head.get("s")
        return cls(
            head["id"],
            prompt.decode("utf-8", "surrogatepass"),
            head.get("c"),
            None if strategy is None else StrategySpec(**strategy),
            head.get("problem"),
        )


def decode_head(line: bytes) -> dict[str, Any]:
    """The payload's first line as an object.

    Raises:
        UsageError: for the bytes of a newer version of this package.
    """
    if too_deep(line):
        return _outline(line)
    head: dict[str, Any] = json.loads(line)
    if head["v"] > SCHEMA_VERSION:
        raise UsageError(
            f"a row was written by a newer batchllm-celery (format {head['v']}, "
            f"this one reads {SCHEMA_VERSION}): update this process"
        )
    return head


def too_deep(data: bytes) -> bool:
    """Whether JSON is nested deeper than `DEEPEST` levels: readers of JSON give up at about 1,000,
    less what their callers take of Python's stack."""
    if data.count(b"[") + data.count(b"{") <= DEEPEST:
        return False
    depth, in_string, escaped = 0, False, False
    for character in data.decode("latin-1"):
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            if depth > DEEPEST:
                return True
        elif character in "]}":
            depth -= 1
    return False


def _outline(line: bytes) -> dict[str, Any]:
    """What can be told of a head that is nested too deep: its id comes before its context."""
    identity, _ = json.JSONDecoder().raw_decode(line.decode(), line.index(b'"id":') + 5)
    return {
        "v": SCHEMA_VERSION,
        "id": identity,
        "problem": f"its context or parameters are nested deeper than {DEEPEST} levels",
    }


def strategy_identity(spec: BatchSpec) -> bytes:
    """What makes two runs of the same row the same call; a dry run is none of a real one."""
    identity: dict[str, Any] = {"name": spec.strategy.name, "params": spec.strategy.params}
    if spec.config.dry_run:
        identity["dry_run"] = True
    return json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()


def fingerprint(content: bytes, identity: bytes) -> bytes:
    """8 bytes that change with the row or with the strategy that answers it."""
    digest = hashlib.blake2b(content, digest_size=FINGERPRINT_BYTES)
    digest.update(b"\0" + identity)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Stored:
    """What `feed.lua` stored for a row: when it was fed, its fingerprint, the row."""

    fed_at: float
    """Unix time of the Redis server."""
    version: bytes
    payload: Payload

    @classmethod
    def decode(cls, data: bytes) -> Stored:
        body = STAMP_BYTES + FINGERPRINT_BYTES
        return cls(
            int(data[:STAMP_BYTES]) / 1000, data[STAMP_BYTES:body], Payload.decode(data[body:])
        )
