"""What the ledger stores, as bytes: rows, what attempts left, results; and fingerprints of rows."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pydantic_core

from batchllm_celery.dialects.blobs import Place, lift, lift_request, restore
from batchllm_celery.errors import FailureKind, UsageError
from batchllm_celery.models import (
    NO_TOKENS,
    SCHEMA_VERSION,
    BatchSpec,
    NativeRequest,
    Prompt,
    Request,
    RetryState,
    StrategySpec,
    TokenUsage,
    WorkItemResult,
)

logger = logging.getLogger("batchllm_celery")

#: Version of a payload that holds no plain text: a process that knows texts only would send the
#: JSON of a request as a prompt.
REQUEST_PAYLOAD = 2
#: Bytes of a row's fingerprint.
FINGERPRINT_BYTES = 8
#: Most levels of nesting in a row's context; see `too_deep`.
DEEPEST = 500
#: Digits of the time of feeding, in milliseconds, that `feed.lua` puts before a payload.
STAMP_BYTES = 13
#: Most bytes of what a strategy remembers of one item between its attempts; they are written after
#: each attempt.
MOST_STATE_BYTES = 500_000
#: Error texts of outcomes that a script wrote.
MESSAGES = {
    FailureKind.CANCELLED: "Cancelled: the batch was cancelled before it was answered",
    FailureKind.DEADLINE: "DeadlineExceeded: the batch's deadline passed before it was answered",
    FailureKind.BUDGET: "BudgetSpent: the batch's budget was spent before it was answered",
    FailureKind.ABORTED: "Aborted: a failure of another item aborted the batch (fail-fast)",
    FailureKind.WORKER_LOST: "WorkerLost: its worker process died in mid-call, {losses} times",
    FailureKind.CUT_OFF: (
        "CutOff: its calls were cut off {cut} times, at last by {why}, and its worker process died "
        "in mid-call {losses} times: give calls more time than that"
    ),
}


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A `Request` or `NativeRequest` as a payload holds it; `build` makes it again."""

    form: str
    """`request` or `native`."""
    data: bytes
    """JSON: what is left of it, and the places of the values that stand elsewhere."""
    shas: tuple[str, ...] = ()
    """Hex SHA-256 of each blob that it needs."""

    def build(self, blobs: Mapping[str, bytes]) -> Request | NativeRequest:
        """The prompt as it was submitted.

        Raises:
            BlobMissingError: `blobs` lacks one of `shas`.
            UsageError: it is of a newer version of this package.
        """
        body, places = json.loads(self.data.decode("utf-8", "surrogatepass"))
        value = restore(body, tuple(Place.of(place) for place in places), blobs)
        return Request.of(value) if self.form == Request.FORM else NativeRequest.of(value)


@dataclass(slots=True)
class Payload:
    """One row. `strategy` None: the batch's. `context` is any JSON value.

    `prompt` is a `StoredRequest` where a payload was read that holds no text.
    """

    item_id: str
    prompt: Prompt | StoredRequest
    context: Any = None
    strategy: StrategySpec | None = None
    expires_at: float | None = None
    """Unix time of the Redis server after which no call of it starts; None: never."""
    problem: str | None = None
    """Why this row can't be run, where that was found out when it was read; never stored."""
    identity: str = ""
    """Which row this is and what it asks (`producer.plan.identity_of`)."""

    def encode(self) -> bytes:
        """What `pack` gives, without the blobs."""
        return self.pack()[0]

    def pack(self) -> tuple[bytes, Mapping[str, bytes]]:
        """A line of JSON, then the prompt as it is: scripts cut the line off for outcomes that
        they write themselves, and never parse it. Beside it the large values of a request, which
        are stored once by content: bytes by their hex SHA-256.

        Raises:
            TypeError: if the context, the parameters or a native body are no JSON.
        """
        prompt = self.prompt
        head: dict[str, Any] = {"v": SCHEMA_VERSION, "id": self.item_id}
        content, blobs = b"", dict[str, bytes]()
        if isinstance(prompt, str):
            content = prompt.encode("utf-8", "surrogatepass")
        elif isinstance(prompt, StoredRequest):
            head |= {"v": REQUEST_PAYLOAD, "f": prompt.form, "b": list(prompt.shas)}
            content = prompt.data
        else:
            native = prompt if isinstance(prompt, NativeRequest) else None
            lifted = lift(native.to_json()) if native else lift_request(cast(Request, prompt))
            blobs = dict(lifted.blobs)
            head |= {"v": REQUEST_PAYLOAD, "f": prompt.FORM, "b": list(blobs)}
            places = [place.to_json() for place in lifted.places]
            whole = json.dumps([lifted.body, places], ensure_ascii=False, separators=(",", ":"))
            content = whole.encode("utf-8", "surrogatepass")
        if self.context is not None:
            head["c"] = self.context
        if self.strategy is not None:
            head["s"] = {"name": self.strategy.name, "params": self.strategy.params}
        if self.identity:
            head["r"] = self.identity
        if self.expires_at is not None:
            head["x"] = self.expires_at
        line = json.dumps(head, separators=(",", ":"))
        return line.encode("ascii") + b"\n" + content, blobs

    @classmethod
    def decode(cls, data: bytes) -> Payload:
        """Read `encode`'s bytes back.

        Raises:
            UsageError: for the bytes of a newer version of this package.
        """
        line, _, prompt = data.partition(b"\n")
        head = decode_head(line)
        strategy, form = head.get("s"), head.get("f")
        return cls(
            head["id"],
            prompt.decode("utf-8", "surrogatepass")
            if form is None
            else StoredRequest(form, prompt, tuple(head["b"])),
            head.get("c"),
            None if strategy is None else StrategySpec(**strategy),
            head.get("x"),
            head.get("problem"),
            head.get("r", ""),
        )

    def signed(self, result: WorkItemResult[Any, Any]) -> WorkItemResult[Any, Any]:
        """The result with the question that it answers, and the row that it belongs to."""
        if not self.identity:
            return result
        metadata = {**result.metadata, **answers(self.identity)}
        return result.model_copy(update={"metadata": metadata})


def answers(identity: str) -> dict[str, str]:
    """What the metadata of a result says of its question: `version` is the question that it
    answers, `row` recognises the row when the input is run again."""
    return {"version": identity.rpartition(".")[2][:8], "row": identity}


@dataclass(frozen=True, slots=True)
class Known:
    """A row whose outcome is known already; `line` is delivered to the consumer, unless empty."""

    identity: str
    success: bool
    line: bytes = b""


def decode_head(line: bytes) -> dict[str, Any]:
    """The payload's first line as an object.

    Raises:
        UsageError: for the bytes of a newer version of this package.
    """
    if too_deep(line):
        return _outline(line)
    head: dict[str, Any] = json.loads(line)
    if head["v"] > REQUEST_PAYLOAD:
        raise UsageError(
            f"a row was written by a newer batchllm-celery (format {head['v']}, "
            f"this one reads {REQUEST_PAYLOAD}): update this process"
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
    """What can be read of a head that is nested too deep: its id comes before its context."""
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


@dataclass(frozen=True, slots=True)
class Attempts:
    """What earlier attempts left, as `save.lua` stores it."""

    attempts: int = 0
    refusals: int = 0
    state: RetryState = field(default_factory=RetryState)
    usage: TokenUsage = NO_TOKENS
    overloads: int = 0
    last_error: str = ""
    handed_back_at: float = 0.0

    def encode(self) -> bytes:
        """JSON.

        Raises:
            TypeError: if the retry state holds something that is no JSON.
            ValueError: if it is larger than `MOST_STATE_BYTES`, or refers to itself.
            RecursionError: if it is nested too deep.
        """
        entry = {"a": self.attempts, "r": self.refusals, "s": self.state.data}
        if self.usage:
            entry["u"] = dict(self.usage.items())
        if self.overloads:
            entry["o"] = self.overloads
        if self.last_error:
            entry["e"] = self.last_error
        if self.handed_back_at:
            entry["h"] = self.handed_back_at
        data = json.dumps(entry, separators=(",", ":")).encode()
        if len(data) > MOST_STATE_BYTES:
            raise ValueError(f"{len(data):,} bytes; at most {MOST_STATE_BYTES:,} are kept")
        return data

    @classmethod
    def decode(cls, data: bytes) -> Attempts:
        if not data:
            return cls()
        entry = json.loads(data)
        return cls(
            entry["a"],
            entry["r"],
            RetryState(entry["s"]),
            TokenUsage.of(entry.get("u")),
            entry.get("o", 0),
            entry.get("e", ""),
            entry.get("h", 0.0),
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """One entry of a batch's stream."""

    stream_id: str
    line: bytes
    """The result line (JSON, without a newline); see `WorkItemResult.from_json`."""
    index: int


def encode_result(result: WorkItemResult[Any, Any]) -> bytes:
    """The result line. What can't be written is left out, part by part, and the line says so: the
    call is paid for."""
    try:
        return pydantic_core.to_json(result.to_json(), inf_nan_mode="null", fallback=str)
    except Exception:  # one part can't be written as it is
        return _part_by_part(result)


def _part_by_part(result: WorkItemResult[Any, Any]) -> bytes:
    parts = {"output": result.output, "context": result.context, "metadata": result.metadata}
    bare: dict[str, Any] = {"output": None, "context": None, "metadata": {}}
    line = result.model_copy(update=bare).to_json()
    dropped = []
    for name, value in parts.items():
        try:
            line[name] = _plain(value)
        except Exception as error:
            dropped.append(name)
            logger.error(
                "result.part_dropped item_id=%s part=%s error=%s",
                result.item_id,
                name,
                type(error).__name__,
            )
    if dropped:
        line["metadata"] = {**line["metadata"], "dropped": dropped}
    return json.dumps(line, default=str).encode()


def _plain(value: Any) -> Any:
    """`value` in types that Python's JSON reads back, or its text where it has no such form."""
    try:
        return json.loads(pydantic_core.to_json(value, inf_nan_mode="null", fallback=str))
    except ValueError:  # half a surrogate pair (no UTF-8), or nested too deep for that writer
        text = json.dumps(value, default=str)
        if too_deep(text.encode()):
            raise
        return json.loads(text)


def decode_entry(entry: tuple[bytes, dict[bytes, bytes]]) -> Outcome:
    """Read a stream entry."""
    stream_id, fields = entry
    index = int(fields[b"i"])
    line = fields.get(b"r") or encode_result(_unanswered(index, fields))
    return Outcome(stream_id.decode(), line, index)


def _unanswered(index: int, fields: dict[bytes, bytes]) -> WorkItemResult[Any, Any]:
    head = decode_head(fields[b"h"])
    losses, _, rest = fields[b"t"].partition(b" ")
    attempts = Attempts.decode(rest.partition(b" ")[2])
    _, cut, why = (fields.get(b"c") or b"0 0 -").decode().split(" ")
    kind = FailureKind.read(fields[b"k"].decode())
    message = MESSAGES.get(kind, "Unknown: ended in a way that this version does not know")
    return WorkItemResult(
        item_id=head["id"],
        index=index,
        success=False,
        error=message.format(losses=int(losses or 0), cut=cut, why=why.replace("_", " ")),
        error_kind=kind,
        context=head.get("c"),
        token_usage=attempts.usage,
        attempts=attempts.attempts,
        metadata=answers(head["r"]) if head.get("r") else {},
    )
