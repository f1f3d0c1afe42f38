"""What a whole batch runs with, and how far it is."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, field_validator

from batchllm_celery.errors import FailureKind
from batchllm_celery.models.base import MOST, MOST_DOLLARS, MOST_SECONDS, SCHEMA_VERSION, Model
from batchllm_celery.models.config import ProcessorConfig
from batchllm_celery.models.item import StrategySpec
from batchllm_celery.models.names import check_batch_id, check_label, check_queue


class BatchState(StrEnum):
    """`feeding` and `running` differ only in whether the producer has sealed the total.
    The last four are ends: every item has its outcome, or gets it from the sweep."""

    FEEDING = "feeding"
    RUNNING = "running"
    PAUSED = "paused"
    PARKED = "parked"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    BUDGET = "budget"
    ABORTED = "aborted"
    FINISHED = "finished"

    @property
    def stopped(self) -> bool:
        """Whether a control decision ended the batch before its items did."""
        return self in _STOPPED


_STOPPED = frozenset(
    {BatchState.CANCELLED, BatchState.DEADLINE, BatchState.BUDGET, BatchState.ABORTED}
)


Price = Annotated[float, Field(ge=0, le=MOST_DOLLARS)]


class BatchSpec(Model):
    """What a batch's items are run with; written once, read by every worker.

    Args:
        batch_id: 1 to 100 letters, digits, `.`, `_`, `-`; no dot or dash first.
        strategy: for every item that names none of its own.
        quota: name of the quota to draw on; None: the strategy's own.
        config: attempts, time limits, dry run.
        queue: the queue of the fleet that runs it.
        priority: 0 (usual) to 9 (urgent).
        items_per_task: item indexes that one Celery message carries; None: 1 for the first
            hundreds of items (each shows in Flower), then 10, then 100.
        deadline: seconds from the submission after which no call starts; None for none.
        max_cost: US dollars; no call starts once it is spent.
        token_budget: tokens (input + output); no call starts once they are spent.
        fail_fast: failure kinds that abort the batch at the first occurrence.
        keep_results: whether results stay readable until the batch's TTL (`submit`), or leave
            Redis when the consumer has them (`run`, `stream`).
        prices: US dollars per million tokens, in and out, of `PROVIDER:NAME`, before all other
            prices; under "" of every model that is not named.
        model: `PROVIDER:NAME`, the key of its price, if it is known.
        generation: of its input: 1 for the first, one more whenever a changed input was taken over.
        on_finished: the Celery task that is called, with the batch's id, when every item has its
            outcome: `{"task": "app.task", ...}`, a signature as Celery writes it.
        standing: items are added one by one, and it is never fed to an end (`ledger/standing.py`).
    """

    version: int = Field(default=SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    batch_id: str
    strategy: StrategySpec
    quota: str | None = None
    config: ProcessorConfig = ProcessorConfig()
    queue: str = "default"
    priority: int = Field(default=0, ge=0, le=9)
    items_per_task: int | None = Field(default=None, ge=1, le=1000)
    deadline: float | None = Field(default=None, gt=0, le=MOST_SECONDS)
    max_cost: float | None = Field(default=None, gt=0, le=MOST)
    token_budget: int | None = Field(default=None, gt=0, le=MOST)
    fail_fast: tuple[FailureKind, ...] = ()
    keep_raw: bool = False
    keep_results: bool = True
    prices: dict[str, tuple[Price, Price]] = Field(default_factory=dict)
    model: str | None = None
    generation: int = Field(default=1, ge=1)
    standing: bool = False
    on_finished: dict[str, Any] | None = None

    @field_validator("batch_id")
    @classmethod
    def _check_batch_id(cls, batch_id: str) -> str:
        return check_batch_id(batch_id)

    @field_validator("queue")
    @classmethod
    def _check_queue(cls, queue: str) -> str:
        return check_queue(queue)

    @field_validator("on_finished", mode="before")
    @classmethod
    def _check_on_finished(cls, value: Any) -> Any:
        value = {"task": value} if isinstance(value, str) else value
        if value is None:
            return None
        if (
            not isinstance(value, dict)
            or not isinstance(value.get("task"), str)
            or not value["task"]
        ):
            raise ValueError("must be the name of a Celery task, or a signature")
        # A signature is a dict that knows its app.
        return {str(key): part for key, part in value.items()}

    @field_validator("quota")
    @classmethod
    def _check_quota(cls, quota: str | None) -> str | None:
        return None if quota is None else check_label(quota, "quota name")


class BatchProgress(Model):
    """Counters of a batch at one moment."""

    batch_id: str
    state: BatchState
    total: int | None = None
    """Items in all; None until the producer has sealed the batch."""
    fed: int = 0
    succeeded: int = 0
    failed: int = 0
    in_flight: int = 0
    """Items that a worker holds."""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cost: float | None = None
    maybe_billed: int = 0
    """Calls that may have been billed although their answer was lost: an upper bound."""
    submitted_at: float = 0.0
    """Unix time of the Redis server."""
    parked_until: float | None = None
    unread: int | None = None
    """Results in Redis that the consumer has not acknowledged; None if they were not counted."""

    @property
    def finished(self) -> int:
        return self.succeeded + self.failed

    @property
    def is_over(self) -> bool:
        """Whether every item has its outcome."""
        return self.total is not None and self.finished >= self.total
