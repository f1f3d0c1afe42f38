"""One failure, and the table of what follows from each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from batchllm_celery.errors import FailureKind
from batchllm_celery.models.reply import RawReply
from batchllm_celery.models.usage import NO_TOKENS, TokenUsage


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one attempt failed, as data: no exception travels past the item runner."""

    kind: FailureKind
    message: str
    """`Type: message`, as a result shows it."""
    retry_after: float | None = None
    """Seconds the provider asked us to wait."""
    usage: TokenUsage = NO_TOKENS
    """Tokens that the failed attempt consumed."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else the provider said, for the item's result: a text that was cut (`partial_output`),
    the finish reason; JSON-serialisable."""
    reply: RawReply | None = None
    """The provider's reply as it came, for batches that keep it."""


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What a failure kind means for the item, the fleet and the batch."""

    retried: bool
    uses_attempt: bool = True
    stops_batch: bool = False
    waits: bool = True
    """Whether backoff comes before the retry (validation errors are retried at once)."""


_CALL = FailurePolicy(retried=True)
_FINAL = FailurePolicy(retried=False)
_STOP = FailurePolicy(retried=False, uses_attempt=False)

#: docs/failures.md shows this table; a test keeps the two the same.
FAILURE_POLICIES: dict[FailureKind, FailurePolicy] = {
    FailureKind.RATE_LIMITED: FailurePolicy(retried=True, uses_attempt=False),
    # The day's quota: the batch is parked until the reset (or fails it, by choice).
    FailureKind.QUOTA_EXHAUSTED: FailurePolicy(retried=True, uses_attempt=False),
    FailureKind.OVERLOADED: _CALL,
    FailureKind.FRAMEWORK_TIMEOUT: _CALL,
    FailureKind.PROVIDER_TIMEOUT: _CALL,
    FailureKind.CONNECTION: _CALL,
    FailureKind.AUTHENTICATION: FailurePolicy(retried=False, stops_batch=True),
    FailureKind.BILLING: FailurePolicy(retried=False, stops_batch=True),
    FailureKind.INVALID_REQUEST: _FINAL,
    FailureKind.CONTENT_BLOCKED: _FINAL,
    FailureKind.TRUNCATED: _FINAL,
    FailureKind.VALIDATION: FailurePolicy(retried=True, waits=False),
    FailureKind.LOGIC_ERROR: _FINAL,
    FailureKind.CANCELLED: _STOP,
    FailureKind.DEADLINE: _STOP,
    FailureKind.BUDGET: _STOP,
    FailureKind.ABORTED: _STOP,
    FailureKind.WORKER_LOST: _STOP,
    FailureKind.CUT_OFF: _STOP,
    FailureKind.EXHAUSTED: _STOP,
    FailureKind.UNRUNNABLE: _STOP,
    FailureKind.INVALID_INPUT: _STOP,
    FailureKind.SKIPPED: _STOP,
    FailureKind.UNKNOWN: _CALL,
}

#: What we alone say of an item: no call ends so, whatever a strategy raises.
OUR_KINDS = frozenset(kind for kind, policy in FAILURE_POLICIES.items() if policy is _STOP)
