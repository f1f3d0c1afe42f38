"""The job of the item runner, the gate that it asks, and the answers that are no result."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from batchllm_celery.errors import FailureKind
from batchllm_celery.execution.pricing import ModelPrices
from batchllm_celery.models import (
    NO_TOKENS,
    BatchState,
    Failure,
    ProcessorConfig,
    Prompt,
    RetryState,
    TokenUsage,
)
from batchllm_celery.strategies.base import LLMCallStrategy


class Gate(Protocol):
    """Asked before each call whether it may start; told what to remember before each wait."""

    async def begin(self) -> FailureKind | BatchState | None:
        """None: go on. A kind: the item ends with it. A state: the item goes back, no outcome."""

    async def save(
        self,
        attempts: int,
        refusals: int,
        state: RetryState,
        usage: TokenUsage,
        *,
        overloads: int,
        last_error: str,
    ) -> None:
        """Keep what another process needs to go on from here.

        Raises:
            TypeError, ValueError, RecursionError: for a state that can't be kept.
        """

    def gave_up(self) -> None:
        """A call ran into a time limit of ours: the provider may bill it all the same."""

    def calls(self, under_way: bool) -> None:
        """A call starts now; or not yet, although `begin` let it in: it waits for a permit."""

    async def hands_back(self, failure: Failure, error: Exception, *, called: bool) -> bool:
        """Whether this process is at fault, not the item, and another process may run it.

        Args:
            failure: what `error` was translated to.
            error: what the strategy raised.
            called: whether by a provider call; else before any.
        """


@dataclass(slots=True)
class OpenGate:
    """A gate for one item in a process without a ledger: open until its calls are used up."""

    most_calls: float = math.inf
    made: int = 0

    async def begin(self) -> FailureKind | BatchState | None:
        """Go on, unless it was called too often."""
        return FailureKind.EXHAUSTED if self.made >= self.most_calls else None

    async def save(
        self,
        attempts: int,
        refusals: int,
        state: RetryState,
        usage: TokenUsage,
        *,
        overloads: int,
        last_error: str,
    ) -> None:
        """Nothing to keep: the item can't move."""

    def gave_up(self) -> None:
        """Nobody counts."""

    def calls(self, under_way: bool) -> None:
        """Count."""
        self.made += under_way

    async def hands_back(self, failure: Failure, error: Exception, *, called: bool) -> bool:
        """There is no other process."""
        return False


@dataclass(slots=True)
class ItemJob:
    """One item as the runner gets it; the counters go on from where another process left off.

    Args:
        prepare: brings the strategy into service, once per process (`Registry.prepare`).
        quota: name of the quota that its calls draw on.
        priority: 0 for usual; higher ones get this process' permits first.
        queued_seconds: from the submission to this moment.
        prices: model -> prices that the batch was given; "" for any model that is not named.
        needs_prices: whether a model without a known price is not called (the batch's money is
            bounded, and nobody could count it).
        estimate_usage: whether calls that tell no tokens count as estimated, for a token budget.
        keep_raw: whether the provider's whole reply stays with the result.
        parks: whether the day's exhausted quota sends the item back (else it fails); a function is
            asked when that happens, because the quota's setting may change in mid-run.
    """

    batch_id: str
    item_id: str
    index: int
    prompt: Prompt
    context: Any
    strategy: LLMCallStrategy[Any]
    prepare: Callable[[], Awaitable[None]]
    quota: str
    config: ProcessorConfig
    gate: Gate
    state: RetryState = field(default_factory=RetryState)
    attempts: int = 0
    refusals: int = 0
    overloads: int = 0
    last_error: str = ""
    usage: TokenUsage = NO_TOKENS
    queued_seconds: float = 0.0
    priority: int = 0
    prices: Mapping[str, ModelPrices] = field(default_factory=dict)
    needs_prices: bool = False
    estimate_usage: bool = False
    keep_raw: bool = False
    parks: bool | Callable[[], Awaitable[bool]] = True
    error: Exception | None = None
    """The last exception of the strategy, for whoever runs in the same process."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The item has no outcome: it goes back to where it came from.

    Args:
        reason: the batch's state that stopped it (paused, parked).
        until: Unix time when the quota is there again, where it is known.
    """

    reason: BatchState
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Unrunnable:
    """The item has no outcome: this process can't run it, and hands it back.

    Args:
        reason: what is wrong with the process.
        called: whether a provider call showed it.
        parameters: whether its factory does not take the parameters.
    """

    reason: str
    called: bool = False
    parameters: bool = False
