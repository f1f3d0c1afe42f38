"""Outcomes as they stand in the stream, turned into result lines."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import pydantic_core

from batchllm_celery.errors import FailureKind
from batchllm_celery.ledger.codec import decode_head, too_deep
from batchllm_celery.ledger.holding import Tries
from batchllm_celery.models import WorkItemResult

#: The words of outcomes that no worker wrote.
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


logger = logging.getLogger("batchllm_celery")


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
    tries = Tries.decode(rest.partition(b" ")[2])
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
        token_usage=tries.usage,
        attempts=tries.attempts,
    )
