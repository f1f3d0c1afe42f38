"""Every error of this package, and the kinds of failures of items.

BatchLLMError
├── UsageError (ValueError)            a person asked for something that can't be done; exit 2
│   ├── InputError                     the rows
│   ├── StrategyNotFoundError          a name that no module registered
│   ├── StrategyParametersError        parameters that its factory does not take
│   ├── BatchNotFoundError             an id that Redis does not know
│   ├── BatchConflictError             the same id, another job
│   └── QuotaConflictError             the same quota, other limits
├── QuotaUnavailableError              the day's quota is used up
├── RedisUnavailableError (ConnectionError)
│   └── RedisDeniedError               a right that is missing, or the password
├── EmbeddedServerError
├── LedgerFullError                    as many bytes wait in Redis as may
├── ItemFailedError                    the outcome of a single item that somebody waited for
├── ProviderError                      a provider call failed; strategies raise it
└── TokenTrackingError                 carries the tokens of an exception that can't
FrameworkTimeoutError (TimeoutError)   our own time limit for an attempt or an item
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

from batchllm_celery.redaction import printable, without_secrets

#: How much of an exception's text an error message keeps, everywhere.
ERROR_MESSAGE_MAX_LENGTH = 200
#: And of the name of its type, which some libraries make of what a server said.
MOST_TYPE_CHARACTERS = 100


class FailureKind(StrEnum):
    """Why an item (or one attempt at it) failed. What follows from each: `models.failure`."""

    RATE_LIMITED = "rate_limited"
    QUOTA_EXHAUSTED = "quota_exhausted"
    OVERLOADED = "overloaded"
    FRAMEWORK_TIMEOUT = "framework_timeout"
    PROVIDER_TIMEOUT = "provider_timeout"
    CONNECTION = "connection"
    AUTHENTICATION = "authentication"
    BILLING = "billing"
    INVALID_REQUEST = "invalid_request"
    CONTENT_BLOCKED = "content_blocked"
    TRUNCATED = "truncated"
    VALIDATION = "validation"
    LOGIC_ERROR = "logic_error"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    BUDGET = "budget"
    ABORTED = "aborted"
    WORKER_LOST = "worker_lost"
    CUT_OFF = "cut_off"
    EXHAUSTED = "exhausted"
    UNRUNNABLE = "unrunnable"
    INVALID_INPUT = "invalid_input"
    SKIPPED = "skipped"
    UNKNOWN = "unknown"

    @classmethod
    def read(cls, name: str) -> FailureKind:
        """The kind that a result names; one of a newer version of this package is `unknown`."""
        try:
            return cls(name)
        except ValueError:
            return cls.UNKNOWN


def text_of(error: BaseException) -> str:
    """`str(error)`, also of an exception whose own `__str__` fails."""
    try:
        return str(error)
    except BaseException as raised:
        return f"its text can't be read ({type(raised).__name__})"


def describe(error: BaseException) -> str:
    """`Type: message`, with secrets blanked and the message cut to `ERROR_MESSAGE_MAX_LENGTH`."""
    name = shown_message(type(error).__name__)[:MOST_TYPE_CHARACTERS]
    return f"{name}: {shown_message(text_of(error))}"


def shown_message(message: str) -> str:
    """A foreign message as a result, a log or a terminal may hold it: without secrets and control
    characters, cut to `ERROR_MESSAGE_MAX_LENGTH`."""
    # Blanked before the cut, which could leave half a key; a megabyte of it needs no look.
    return printable(without_secrets(message[:10_000]))[:ERROR_MESSAGE_MAX_LENGTH]


def causes_of(error: BaseException, *, contexts: bool = False) -> Iterator[BaseException]:
    """`error` and its causes, each once and ten at most: `raise error from error` makes a circle.

    Args:
        error: where to begin.
        contexts: whether what was being handled counts as the cause where none is named.
    """
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and len(seen) < 10 and not any(current is one for one in seen):
        seen.append(current)
        yield current
        current = current.__cause__ or (current.__context__ if contexts else None)


def stack_of(error: BaseException, frames: int = 20) -> str:
    """Where `error` and its causes were raised, for a log: types, files and source lines, but no
    message, because that may quote a prompt or an answer."""
    lines: list[str] = []
    for current in causes_of(error, contexts=True):
        lines.append(f"{type(current).__name__}, raised at:\n")
        lines += traceback.format_tb(current.__traceback__, limit=-frames)
    return "".join(lines).rstrip()


class BatchLLMError(Exception):
    """Base of this package's errors."""


class UsageError(BatchLLMError, ValueError):
    """Something was asked for that can't be done; the message says what to do instead."""


class InputError(UsageError):
    """The input can't be read, or a row of it is wrong under `--strict`."""


class StrategyNotFoundError(UsageError):
    """No strategy is registered under this name in this process."""


class StrategyParametersError(UsageError):
    """The strategy's factory in this process does not take these parameters."""


class BatchNotFoundError(UsageError):
    """Redis holds no batch of this id (or its keys have expired)."""


class BatchUnreadableError(UsageError):
    """What Redis holds of the batch can't be read here: corrupted, or of a newer version."""


class BatchConflictError(UsageError):
    """The batch id exists with another strategy or other settings."""


class QuotaConflictError(UsageError):
    """The quota exists with other limits or another policy."""


class QuotaUnavailableError(BatchLLMError):
    """The day's quota is used up: no call will be allowed before the reset.

    Args:
        quota: its name.
        resets_at: Redis' clock, seconds since 1970, when it is worth asking again.
    """

    def __init__(self, quota: str, resets_at: float) -> None:
        super().__init__(f"the day's requests of quota {quota!r} are used up")
        self.quota = quota
        self.resets_at = resets_at

    @property
    def until(self) -> float:
        """The same as `resets_at`."""
        return self.resets_at


class RedisUnavailableError(BatchLLMError, ConnectionError):
    """Redis can't be reached."""


class RedisDeniedError(RedisUnavailableError):
    """Redis denies a right that is needed, or does not accept user and password."""


class EmbeddedServerError(BatchLLMError):
    """The embedded Valkey did not start."""


class ProviderError(BatchLLMError):
    """A provider call failed, translated from the SDK's own exception by the strategy.

    Args:
        message: what the provider said; never the prompt, the answer or a key.
        kind: the failure kind, or its name; decides what happens next.
        status: HTTP status, where there was one.
        retry_after: seconds the provider asked us to wait, where it did.
        usage: tokens this call consumed all the same (`TokenUsage` names).
        error_type: the name to show as `Type` in `Type: message`; default the cause's.
        metadata: what else is worth keeping with the item's result (`partial_output`).
        limits: what the reply's headers say about the provider's limits (a `RateLimits`).
        reply: the reply as it came (a `RawReply`).
    """

    def __init__(
        self,
        message: str,
        *,
        kind: FailureKind | str = FailureKind.UNKNOWN,
        status: int | None = None,
        retry_after: float | None = None,
        usage: Mapping[str, int] | None = None,
        error_type: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        limits: Any = None,
        reply: Any = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.retry_after = retry_after
        self.usage = usage
        self.error_type = error_type
        self.metadata = metadata or {}
        self.limits = limits
        self.reply = reply


class LedgerFullError(BatchLLMError):
    """Payloads that wait in Redis hold as many bytes as they may: workers are behind, or away."""


class ItemFailedError(BatchLLMError):
    """A single item's outcome is a failure.

    Its text and its `repr` are the kind alone, because Flower and logs show them; a provider's
    message may quote the prompt.

    Args:
        kind: why; a `FailureKind` or its name.
        message: `Type: message`, as a result has it.
        item_id: the item.
    """

    def __init__(self, kind: str, message: str = "", item_id: str = "") -> None:
        # As arguments: Celery's result backends keep those, and build the error again from them.
        super().__init__(str(kind), message, item_id)
        self.kind = FailureKind.read(str(kind))
        self.message = message
        self.item_id = item_id

    def __str__(self) -> str:
        return self.kind.value

    def __repr__(self) -> str:
        return f"ItemFailedError({self.kind.value!r})"


class TokenTrackingError(BatchLLMError):
    """Stands in for an exception that has no `__dict__` to carry its tokens; see its cause."""

    def __init__(self, message: str, usage: Mapping[str, int]) -> None:
        super().__init__(message)
        self.usage = usage


class FrameworkTimeoutError(TimeoutError):
    """Our own time limit was exceeded (not the provider's).

    Args:
        message: `Framework timeout after 1.0s (limit: 1.0s)`.
        item_id: the item.
        elapsed: seconds since the limit's clock started.
        timeout_limit: the limit in seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        item_id: str | None = None,
        elapsed: float | None = None,
        timeout_limit: float | None = None,
    ) -> None:
        super().__init__(message)
        self.item_id = item_id
        self.elapsed = elapsed
        self.timeout_limit = timeout_limit
