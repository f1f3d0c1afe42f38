"""What this process can't run, through no fault of the item: not registered, a package or a key
missing, no memory.

Such items go back for other workers. The process tries a strategy again after a delay that doubles
up to a minute; meanwhile it requeues no batch of it, and takes hardly any message where nothing
else came of the last ones.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from batchllm_celery.errors import FailureKind, StrategyNotFoundError, UsageError, describe
from batchllm_celery.models import Failure, StrategySpec
from batchllm_celery.strategies.failures import status_of

logger = logging.getLogger("batchllm_celery")

#: Seconds at most until the next try.
MOST_DELAY = 60.0
#: So many items in a row that could not be run, and the process takes one message for each delay.
LAST_TRIES = 10
#: Times that one process hands an item back within so many seconds.
MOST_HAND_BACKS, HAND_BACK_SECONDS = 16, 600.0
#: Times of those after a provider call, which may have been paid for.
MOST_AFTER_CALLS = 2
#: Faults, and items handed back, that are remembered.
MOST_FAULTS, MOST_ITEMS = 200, 20_000
#: What the provider itself said of the job when it was prepared: another process hears the same.
_OF_THE_JOB = frozenset(
    {FailureKind.INVALID_REQUEST, FailureKind.CONTENT_BLOCKED, FailureKind.BILLING}
)


@dataclass(slots=True)
class Fault:
    """Why this process can't run one strategy."""

    name: str
    reason: str
    called: bool
    """Whether a provider call showed it: then only one that succeeds ends it."""
    since: float
    """Unix time."""
    rounds: int = 0
    """Tries in a row that failed."""
    retry_at: float = -math.inf
    """When the strategy is tried again, by the monotonic clock."""
    hopeless: bool = False
    """Whether no live worker can run it: its items end here as fast as they come."""
    parameters: bool = False
    """Whether its factory does not take the parameters."""
    batches: set[str] = field(default_factory=set)


class Faults:
    """The strategies that this process can't run; used on its event loop.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.found: dict[str, Fault] = {}
        """By `StrategySpec.key`; usually empty, so look here before any other question."""
        self._tries: deque[bool] = deque(maxlen=LAST_TRIES)
        self._handed_back: dict[tuple[str, int], list[float]] = {}

    def waiting(self, spec: StrategySpec) -> Fault | None:
        """What is wrong with `spec` here, until it is to be tried again."""
        fault = self.found.get(spec.key)
        return fault if fault is not None and self._clock() < fault.retry_at else None

    def add(self, spec: StrategySpec, reason: str, batch_id: str, *, called: bool) -> Fault:
        """Note that an item of `spec` could not be run."""
        now, fault = self._clock(), self.found.get(spec.key)
        if fault is None:
            if len(self.found) >= MOST_FAULTS:
                self.found.pop(next(iter(self.found)))
            fault = self.found[spec.key] = Fault(spec.name, reason, called, time.time())
            logger.warning(
                "strategy.unrunnable strategy=%s reason=%s: its items go back, for other workers",
                spec.name,
                reason,
            )
        if now >= fault.retry_at:  # items that came together are one try
            fault.reason, fault.called = reason, called
            fault.rounds += 1
            fault.retry_at = now + min(MOST_DELAY, 2.0 ** min(fault.rounds, 10))
        fault.batches.add(batch_id)
        self._tries.append(fault.hopeless)
        return fault

    def delay(self, fault: Fault, batch_id: str, index: int) -> float:
        """Seconds until an item that goes back now may be requeued."""
        now = self._clock()
        times = self._times(batch_id, index)
        times.append(now)
        wait = max(1.0, fault.retry_at - now)
        full = len(times) >= MOST_HAND_BACKS
        return max(wait, times[0] + HAND_BACK_SECONDS - now) if full else wait

    def may_hand_back(self, batch_id: str, index: int) -> bool:
        """Whether an item that has been called may go back once more."""
        return len(self._times(batch_id, index)) < MOST_AFTER_CALLS

    def _times(self, batch_id: str, index: int) -> list[float]:
        since = self._clock() - HAND_BACK_SECONDS
        times = [at for at in self._handed_back.pop((batch_id, index), ()) if at > since]
        if len(self._handed_back) >= MOST_ITEMS:
            self._handed_back.pop(next(iter(self._handed_back)))
        self._handed_back[batch_id, index] = times
        return times

    def ran(self, spec: StrategySpec) -> None:
        """An item of `spec` has been run here."""
        self._tries.append(True)
        self._end(spec)

    def was_prepared(self, spec: StrategySpec) -> None:
        """`spec` is prepared: that ends a fault which came before any call."""
        fault = self.found.get(spec.key)
        if fault is not None and not fault.called:
            self._end(spec)

    def _end(self, spec: StrategySpec) -> None:
        fault = self.found.pop(spec.key, None)
        if fault is not None:
            self._tries.clear()
            logger.info("strategy.runnable strategy=%s", spec.name)

    def blocks(self, batch_id: str) -> bool:
        """Whether this process requeues nothing of a batch now, because it can't run it."""
        now = self._clock()
        return any(
            batch_id in fault.batches and now < fault.retry_at and not fault.hopeless
            for fault in self.found.values()
        )

    def messages(self) -> int | None:
        """How many messages to take: None for as many as usual."""
        if not self.found or len(self._tries) < LAST_TRIES or any(self._tries):
            return None
        return int(self._clock() >= min(fault.retry_at for fault in self.found.values()))

    def all(self) -> list[Fault]:
        """Safe from any thread."""
        return list(self.found.values())

    def keys(self) -> list[str]:
        """Keys of the strategies (`StrategySpec.key`); safe from any thread."""
        return list(self.found)


def reason_of(error: Exception) -> str:
    """What is wrong, as `status` and the log say it."""
    return "not registered" if isinstance(error, StrategyNotFoundError) else describe(error)


def is_missing(error: BaseException) -> bool:
    """Whether a package or memory is missing here, which says nothing about an item."""
    current: BaseException | None = error
    for _ in range(5):
        if isinstance(current, ImportError | MemoryError):
            return True
        current = current.__cause__ if current is not None else None
    return False


def is_of_the_process(failure: Failure, error: Exception) -> bool:
    """Whether what a strategy raised before any call is a matter of this process."""
    if isinstance(error, UsageError) and not isinstance(error, StrategyNotFoundError):
        return is_missing(error) or error.__cause__ is not None
    return not (failure.kind in _OF_THE_JOB and status_of(error) is not None)
