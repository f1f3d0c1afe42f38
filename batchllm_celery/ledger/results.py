"""Outcomes as they stand in the stream, turned into result lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pydantic_core

from batchllm_celery.errors import FailureKind
from batchllm_celery.ledger.claims import Tries
from batchllm_celery.ledger.payload import decode_head
from batchllm_celery.models import WorkItemResult

#: The words of outcomes that no worker wrote.
MESSAGES = {
    FailureKind.CANCELLED: "Cancelled: the batch was cancelled before it was answered",
    FailureKind.DEADLINE: "DeadlineExceeded: the batch's deadline passed before it was answered",
    FailureKind.BUDGET: "BudgetSpent: the batch's budget was spent before it was answered",
    FailureKind.ABORTED: "Aborted: a failure of another item aborted the batch (fail-fast)",
    FailureKind.WORKER_LOST: "WorkerLost: its worker process died in mid-call, {losses} times",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One entry of a batch's stream."""

    stream_id: str
    line: bytes
    """The result line (JSON, without a newline); see `WorkItemResult.from_json`."""
    index: int


def encode_result(result: WorkItemResult[Any, Any]) -> bytes:
    """The result line. An output that is no JSON is kept as its text: it is paid for."""
    try:
        line = result.to_json()
    except (ValueError, TypeError):
        line = result.model_copy(update={"output": str(result.output)}).to_json()
    try:
        return pydantic_core.to_json(line, inf_nan_mode="null", fallback=str)
    except ValueError:  # a lone surrogate, which UTF-8 can't say but JSON can
        return json.dumps(line, default=str).encode()


def decode_entry(entry: tuple[bytes, dict[bytes, bytes]]) -> Outcome:
    """Read a stream entry."""
    stream_id, fields = entry
    index = int(fields[b"i"])
    line = fields.get(b"r") or encode_result(_unanswered(index, fields))
    return Outcome(stream_id.decode(), line, index)


def _unanswered(index: int, fields: dict[bytes, bytes]) -> WorkItemResult[Any, Any]:
    head = decode_head(fields[b"h"])
    losses, _, rest = fields[b"t"].partition(b" ")
    tries = Tries.decode(rest.partition(b" ")[2])
    kind = FailureKind(fields[b"k"].decode())
    return WorkItemResult(
        item_id=head["id"],
        index=index,
        success=False,
        error=MESSAGES[kind].format(losses=int(losses or 0)),
        error_kind=kind,
        context=head.get("c"),
        token_usage=tries.usage,
        attempts=tries.attempts,
    )
