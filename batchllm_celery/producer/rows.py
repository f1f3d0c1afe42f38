"""What people hand to a producer, turned into rows of one shape."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from batchllm_celery.errors import InputError, UsageError
from batchllm_celery.ledger import Payload
from batchllm_celery.models import (
    BadRow,
    LLMWorkItem,
    NativeRequest,
    Prompt,
    Request,
    StrategySpec,
)

Row = LLMWorkItem[Any, Any, Any] | BadRow | Mapping[str, Any] | Prompt
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
    if not isinstance(rows, Iterable):
        raise UsageError(f"rows must be an iterable of rows, as a list, not {name}")


_KEYS = frozenset({"prompt", "item_id", "context"})


def as_payload(row: Row, index: int, default: StrategySpec) -> Payload | BadRow:
    """The row as the ledger stores it; a row that was bad when it was read stays so.

    Raises:
        InputError: for a row that is none of the accepted forms, or has more than is taken.
    """
    if isinstance(row, BadRow):
        return row
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


def default_strategy(rows: Iterable[Row], chosen: Any) -> tuple[StrategySpec, Iterable[Row]]:
    """The batch's strategy: the one asked for, else the first row's own.

    Raises:
        UsageError: if there is neither.
    """
    refuse_single(rows)
    if chosen is not None:
        return spec_of(chosen), rows
    remaining: Iterator[Row] = iter(rows)
    first = next(remaining, None)
    if not isinstance(first, LLMWorkItem):
        raise UsageError("name a strategy: submit(items, strategy='...')")
    return spec_of(first.strategy), _chain(first, remaining)


def _chain(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest
