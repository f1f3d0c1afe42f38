"""What goes in, what a strategy answers, what comes out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic

from pydantic import Field, field_validator
from typing_extensions import TypeVar

from batchllm_celery.errors import FailureKind
from batchllm_celery.models.base import Model
from batchllm_celery.models.names import check_label
from batchllm_celery.models.rate_limits import RateLimits
from batchllm_celery.models.reply import RawReply
from batchllm_celery.models.usage import NO_TOKENS, TokenUsage

logger = logging.getLogger("batchllm_celery")

# Defaults, so that `LLMWorkItem(...)` needs no annotation in typed code.
TInput = TypeVar("TInput", default=Any)
TOutput = TypeVar("TOutput", default=Any)
TContext = TypeVar("TContext", default=Any)

#: The output of a failure, and the context where none was given, whatever their types say.
NOTHING: Any = None

LARGE_PROMPT_CHARACTERS = 1_000_000


class StrategySpec(Model):
    """A registered strategy and its parameters: all that a message may name. Never an import
    path, never code."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return check_label(name, "strategy name")

    @property
    def key(self) -> str:
        """Equal for equal strategies."""
        return json.dumps([self.name, self.params], sort_keys=True, default=str)


@dataclass(slots=True)
class LLMWorkItem(Generic[TInput, TOutput, TContext]):
    """One prompt to answer.

    Args:
        item_id: unique within the batch.
        strategy: a registered name, a `StrategySpec`, or (in-process API only) an instance.
        prompt: the text to send; a `Request` or a `NativeRequest` where the strategy takes one.
        context: any JSON value; comes back with the result.
        key: recognises a row without an id of its own when its input is run again (a file's reader
            sets it); None: the id does.

    Raises:
        ValueError: for an empty or non-string id, or no strategy.
    """

    item_id: str
    strategy: Any
    prompt: Any = ""  # a `Prompt`; code that knows texts only goes on to type-check
    context: TContext = NOTHING
    key: bytes | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.item_id, str) or not self.item_id.strip():
            raise ValueError(
                f"item_id must be a non-empty string "
                f"(got {type(self.item_id).__name__}: {self.item_id!r}). "
                f"Provide a unique string identifier for this work item."
            )
        if self.strategy is None:
            raise ValueError(
                f"strategy must not be None for {self.item_id}. "
                f"Provide an LLMCallStrategy instance."
            )
        if isinstance(self.prompt, str) and len(self.prompt) > LARGE_PROMPT_CHARACTERS:
            logger.warning(
                f"Very large prompt for {self.item_id}: {len(self.prompt)} chars. "
                f"May exceed model context limits."
            )


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row of an input that no item can be made of; it gets its outcome without a call.

    Args:
        item_id: the row's own, or `line-N`.
        line: where it stands in the input, from 1.
        message: what is wrong, beginning with `line N: `; never the row's content.
        key: recognises it when its input is run again.
    """

    item_id: str
    line: int
    message: str
    key: bytes = field(default=b"", compare=False)


@dataclass(frozen=True, slots=True)
class Completion(Generic[TOutput]):
    """What a strategy's `execute` answers; a bare `(output, usage)` pair is turned into one.

    Args:
        output: the answer; a pydantic model, or anything JSON-serialisable.
        usage: tokens of this call.
        metadata: what else is worth keeping (safety ratings, finish reason); JSON-serialisable.
        limits: what the reply's headers say about the provider's limits.
        priced_as: PROVIDER:MODEL whose price the call has; None: the strategy's `model_name`.
        reply: the provider's reply as it came, for batches that keep it.
    """

    output: TOutput
    usage: TokenUsage = NO_TOKENS
    metadata: Mapping[str, Any] = field(default_factory=dict)
    limits: RateLimits | None = None
    priced_as: str | None = None
    reply: RawReply | None = None


class Timing(Model):
    """Where an item's time went, in seconds (to the millisecond); each sums over its attempts.

    `queued`: from submission until a worker had a slot and the strategy ready for it.
    `executed`: in provider calls. `waited`: everything else: for the quota, in backoff, for Redis.
    `total`: from submission to the outcome; the sum of the other three.
    """

    queued: float = 0.0
    waited: float = 0.0
    executed: float = 0.0
    total: float = 0.0


class WorkItemResult(Model, Generic[TOutput, TContext]):
    """The one outcome of one item.

    `error` is `Type: message`, `error_kind` what kind of failure that is; both None on success.
    `cost` is in US dollars, None where the model's price is unknown. `output` is the strategy's
    own object in process, and where the batch was submitted to a typed strategy; else its JSON form
    when read back from Redis or a file. It is None on a failure, whatever its type says.
    """

    item_id: str
    index: int = 0
    success: bool
    output: TOutput = NOTHING
    error: str | None = None
    error_kind: FailureKind | None = None
    context: TContext = NOTHING
    token_usage: TokenUsage = Field(default_factory=TokenUsage)
    attempts: int = 0
    cost: float | None = None
    timing: Timing = Timing()
    metadata: dict[str, Any] = Field(default_factory=dict)

    @property
    def gemini_safety_ratings(self) -> Any:
        """batch-llm's name for `metadata["safety_ratings"]`."""
        return self.metadata.get("safety_ratings")

    def to_json(self) -> dict[str, Any]:
        """The object of one result line (SURFACE: `error` nests kind and message)."""
        line = self.model_dump(mode="json", exclude={"error_kind"})
        kind = self.error_kind or FailureKind.UNKNOWN
        line["error"] = None if self.success else {"kind": kind.value, "message": self.error}
        return line

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> WorkItemResult[Any, Any]:
        """Read `to_json`'s object back.

        Raises:
            ValueError: if it is not a result line.
        """
        error = line.get("error")
        flat = {**line, "error": None, "error_kind": None}
        if error is not None:
            flat |= {"error": error["message"], "error_kind": FailureKind.read(error["kind"])}
        return cls.model_validate(flat)


@dataclass(slots=True)
class BatchResult(Generic[TOutput, TContext]):
    """All results of a batch in completion order, and their sums."""

    results: list[WorkItemResult[TOutput, TContext]]
    total_items: int = 0
    succeeded: int = 0
    failed: int = 0
    total_input_tokens: int = 0
    total_output_tokens: int = 0
    total_cached_tokens: int = 0
    total_cost: float | None = None
    """US dollars; None where no result has a price."""

    def __post_init__(self) -> None:
        usages = [result.token_usage for result in self.results]
        self.total_items = len(self.results)
        self.succeeded = sum(result.success for result in self.results)
        self.failed = self.total_items - self.succeeded
        self.total_input_tokens = sum(usage.input_tokens for usage in usages)
        self.total_output_tokens = sum(usage.output_tokens for usage in usages)
        self.total_cached_tokens = sum(usage.cached_input_tokens for usage in usages)
        costs = [result.cost for result in self.results if result.cost is not None]
        self.total_cost = sum(costs) if costs else None

    def cache_hit_rate(self) -> float:
        """Cached input tokens per cent of all input tokens."""
        if not self.total_input_tokens:
            return 0.0
        return self.total_cached_tokens / self.total_input_tokens * 100

    def effective_input_tokens(self) -> int:
        """Input tokens with the cached ones at a tenth, as Gemini bills them."""
        return self.total_input_tokens - int(self.total_cached_tokens * 0.9)
