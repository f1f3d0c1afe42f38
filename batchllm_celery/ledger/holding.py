"""What a worker process holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from batchllm_celery.ledger.codec import Payload
from batchllm_celery.models import NO_TOKENS, BatchSpec, BatchState, RetryState, TokenUsage


@dataclass(slots=True, eq=False)
class Claim:
    """One item that this process may run.

    `token` and `round` are its fence, `version` the fingerprint of its content. `attempts`,
    `refusals` (429s), `overloads`, `state`, `usage` and `last_error` come from earlier attempts,
    here or elsewhere; `losses` counts the processes that died in the middle of a call for it.
    """

    batch_id: str
    index: int
    token: str
    round: int
    version: bytes
    payload: Payload
    attempts: int = 0
    refusals: int = 0
    overloads: int = 0
    losses: int = 0
    state: RetryState = field(default_factory=RetryState)
    usage: TokenUsage = NO_TOKENS
    last_error: str = ""
    handed_back_at: float = 0.0
    """Server time at which a process that could not run it first handed it back; 0: none has."""
    queued_seconds: float = 0.0
    fed_at: float = 0.0
    claimed_at: float = field(default_factory=time.monotonic)
    """Monotonic time of the claim in this process; `queued_seconds` ends there."""
    given_up: int = 0
    """Calls that a time limit of ours ended without an answer; Redis does not count them yet."""
    calling: bool = False
    """Whether a provider call is under way: being lost now counts."""
    unused: bool = False
    """Whether `begin` may have admitted a call that was not made: then it is not counted."""
    cut_by: str = "a_cancellation"
    """What cuts its call off if the item is released during one; without spaces."""
    settled: bool = False
    """Whether its outcome is on its way to the ledger: it can't be released any more."""

    @property
    def server_now(self) -> float:
        """The server's time at this moment, in seconds since 1970."""
        return self.fed_at + self.queued_seconds + time.monotonic() - self.claimed_at


@dataclass(slots=True)
class ClaimReply:
    """What came of claiming the items of one message.

    `held`: a living process holds them, or the batch does not start items now (see `state`), or
    they are poison candidates of which this process holds enough. `gone`: they have their outcome.
    Either way the message has done its work.
    """

    spec: BatchSpec
    state: BatchState
    claims: list[Claim] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)


class Holding:
    """The claims of this process. Written on the loop; the heartbeat thread reads `batches`."""

    def __init__(self) -> None:
        self._claims: dict[str, dict[int, Claim]] = {}

    def add(self, claim: Claim) -> None:
        self._claims.setdefault(claim.batch_id, {})[claim.index] = claim

    def discard(self, claim: Claim) -> None:
        """Forget `claim`; idempotent, and a newer claim of the same item stays."""
        claims = self._claims.get(claim.batch_id)
        if claims is None or claims.get(claim.index) is not claim:
            return
        del claims[claim.index]
        if not claims:
            del self._claims[claim.batch_id]

    def has(self, batch_id: str, index: int) -> bool:
        return index in self._claims.get(batch_id, ())

    def batches(self) -> list[str]:
        """Batches of which this process holds items; safe from any thread."""
        return list(self._claims)

    def of(self, batch_id: str) -> list[Claim]:
        return list(self._claims.get(batch_id, {}).values())

    def poison_candidates(self) -> tuple[int, int]:
        """How many held items lost a process before, and the most losses among them."""
        count = worst = 0
        for claims in self._claims.values():
            for claim in claims.values():
                if claim.losses:
                    count, worst = count + 1, max(worst, claim.losses)
        return count, worst

    def __iter__(self) -> Iterator[Claim]:
        return (claim for claims in self._claims.values() for claim in claims.values())

    def __len__(self) -> int:
        return sum(map(len, self._claims.values()))
