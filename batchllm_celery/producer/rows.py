"""What people hand to a producer, turned into rows of one shape."""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from batchllm_celery.errors import InputError, UsageError
from batchllm_celery.ledger import Payload
from batchllm_celery.models import (
    BadRow,
    LLMWorkItem,
    NativeRequest,
    Prompt,
    Request,
    StrategySpec,
    TContext,
)
from batchllm_celery.producer.steps import NextRows

RowWith: TypeAlias = LLMWorkItem[Any, Any, TContext] | BadRow | Mapping[str, Any] | Prompt
"""What a batch is made of; the items' contexts have one type."""
Row: TypeAlias = RowWith[Any]
_PROMPTS = (str, Request, NativeRequest)


def spec_of(strategy: Any) -> StrategySpec:
    """The registered strategy that a name or a spec means.

    Raises:
        UsageError: for an instance, which can't travel to another process.
    """
    if isinstance(strategy, StrategySpec):
        return strategy
    if isinstance(strategy, str):
        return StrategySpec(name=strategy)
    spec = getattr(strategy, "spec", None)
    if isinstance(spec, StrategySpec):  # what `@strategy` made; strategies are not imported here
        return spec
    raise UsageError(
        f"a {type(strategy).__name__} instance can't travel to a worker: register a factory with "
        f'@strategy("name") in a module that the workers import (--app), and name it; '
        f"instances are for ParallelBatchProcessor"
    )


def refuse_single(rows: object) -> None:
    """Refuse what Python can iterate over, but nobody means so: the characters of a text, the keys
    of a mapping, the column names of a table.

    Raises:
        UsageError: with what to write instead.
    """
    name = type(rows).__name__
    if isinstance(rows, str | bytes | bytearray | memoryview | Mapping | LLMWorkItem | BadRow):
        raise UsageError(f"a single {name} is not a list of rows: wrap it in a list, [row]")
    if isinstance(rows, os.PathLike):
        raise UsageError(
            f"a {name} is not a list of rows: read the file, or give it to `batchllm run`"
        )
    if hasattr(rows, "columns") and (hasattr(rows, "to_dict") or hasattr(rows, "to_dicts")):
        way = "to_dicts()" if hasattr(rows, "to_dicts") else "to_dict('records')"
        raise UsageError(
            f"a {name} iterates over its column names: make rows of it, "
            f"[{{'prompt': row['TEXT']}} for row in table.{way}]"
        )
    if not isinstance(rows, Iterable | AsyncIterable):
        raise UsageError(f"rows must be an iterable of rows, as a list, not {name}")


_KEYS = frozenset({"prompt", "item_id", "context"})


def as_payload(row: Row, index: int, default: StrategySpec) -> Payload | BadRow:
    """The row as the ledger stores it; a row that was bad when it was read stays so.

    Raises:
        InputError: for a row that is none of the accepted forms, or has more than is taken.
    """
    if isinstance(row, BadRow):
        return row
    payload = _payload(row, index, default)
    if isinstance(payload.prompt, str) and not _is_text(payload.prompt):
        raise InputError(f"item {index}: half a surrogate pair in its prompt is not text")
    return payload


def _is_text(prompt: str) -> bool:
    """Whether it can be sent: half a surrogate pair, as half an emoji is, has no encoding."""
    try:
        return prompt.isascii() or bool(prompt.encode())
    except UnicodeEncodeError:
        return False


def _payload(row: Any, index: int, default: StrategySpec) -> Payload:
    if isinstance(row, _PROMPTS):
        return Payload(item_id=str(index), prompt=row, context=None, strategy=None)
    if isinstance(row, LLMWorkItem):
        if not isinstance(row.prompt, _PROMPTS):
            kind = type(row.prompt).__name__
            raise InputError(
                f"item {index} ({row.item_id}): its prompt is no text, Request or NativeRequest, "
                f"but {kind}"
            )
        chosen = spec_of(row.strategy)
        return Payload(
            item_id=row.item_id,
            prompt=row.prompt,
            context=row.context,
            strategy=None if chosen == default else chosen,
        )
    if isinstance(row, Mapping) and isinstance(row.get("prompt"), _PROMPTS):
        if unknown := [str(key) for key in row if key not in _KEYS]:
            raise InputError(
                f"item {index}: unknown key {', '.join(map(repr, unknown[:5]))}; a mapping has "
                f"'prompt', 'item_id' and 'context' (put what comes back with the result there)"
            )
        given = row.get("item_id")
        item_id = str(index) if given is None else str(given)
        if not item_id.strip():
            raise InputError(f"item {index}: its item_id is empty")
        return Payload(
            item_id=item_id, prompt=row["prompt"], context=row.get("context"), strategy=None
        )
    raise InputError(
        f"item {index}: a row is a string, a Request, a NativeRequest, an LLMWorkItem or a mapping "
        f"with one of these as its 'prompt', not {type(row).__name__}"
    )


def output_type_of(strategy: Any) -> Any:
    """What outputs are made again in this process: a typed strategy's type, else their JSON."""
    return getattr(strategy, "output_type", Any) if hasattr(strategy, "spec") else Any


def with_params(strategy: StrategySpec, params: Mapping[str, Any] | None) -> StrategySpec:
    """The strategy with `params` in place of its own, where there are any."""
    return StrategySpec(name=strategy.name, params=dict(params)) if params else strategy


async def default_strategy(
    rows: Iterable[Row] | AsyncIterable[Row], chosen: Any
) -> tuple[StrategySpec, Iterable[Row] | AsyncIterable[Row]]:
    """The batch's strategy: the one asked for, else the first row's own. A coroutine of steps.

    Raises:
        UsageError: if there is neither.
    """
    refuse_single(rows)
    if chosen is not None:
        return spec_of(chosen), rows
    remaining = rows.__aiter__() if isinstance(rows, AsyncIterable) else iter(rows)
    head: list[Row] = await NextRows(remaining, 1, 0.0)
    first = head[0] if head else None
    if not isinstance(first, LLMWorkItem):
        raise UsageError("name a strategy: submit(items, strategy='...')")
    if isinstance(remaining, AsyncIterator):
        return spec_of(first.strategy), _achain(first, remaining)
    return spec_of(first.strategy), _chain(first, remaining)


def _chain(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


async def _achain(first: Row, rest: AsyncIterator[Row]) -> AsyncIterator[Row]:
    yield first
    async for row in rest:
        yield row
