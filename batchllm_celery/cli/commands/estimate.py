"""`batchllm estimate`: tokens, cost and duration of a batch, without a call."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchllm_celery.cli import exit_codes, options
from batchllm_celery.cli.display.console import print_json, to_stderr, to_stdout
from batchllm_celery.cli.display.wording import count, duration, money, plural
from batchllm_celery.cli.request import (
    CommandRequest,
    given_strategy,
    limits_of,
    model_name,
    rows_of,
    settings_of,
)
from batchllm_celery.dialects.estimates import tokens_of_prompt
from batchllm_celery.dialects.media import BYTES_PER_TOKEN
from batchllm_celery.errors import InputError
from batchllm_celery.files.rows import InputRow
from batchllm_celery.models import BadRow, LLMWorkItem, QuotaLimits, TokenUsage
from batchllm_celery.settings import Settings

#: Tokens of an answer, if no option limits them.
DEFAULT_OUTPUT_TOKENS = 300
DEFAULT_SECONDS_PER_CALL = 2.0


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a batch. Tokens are the sums of all items."""

    items: int = 0
    bad_rows: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BatchEstimate:
    """Size, cost in US dollars (None: no price is known) and duration in seconds."""

    size: Size
    model: str | None
    cost: float | None
    cost_without_cache: float | None
    seconds: float
    bound_by: str
    """The limit that decides the duration."""


@click.command()
@options.inputs
@options.model
@options.rows
@options.limits
@options.option("--output-tokens", type=click.IntRange(min=0),
                help=f"Tokens of one answer.  [default: {DEFAULT_OUTPUT_TOKENS}]")  # fmt: skip
@options.option("--cached-tokens", type=click.IntRange(min=0), default=0,
                help="Tokens of a context that all items share through a cache.")  # fmt: skip
@options.option("--seconds-per-call", type=options.Number(min=0, min_open=True),
                default=DEFAULT_SECONDS_PER_CALL, show_default=True)  # fmt: skip
@options.option("--workers", type=click.IntRange(min=1), default=2, show_default=True)
@options.option(
    "--slots", type=click.IntRange(min=1), help="Items in flight per worker.  [default: 100]"
)
@options.option("--show", type=click.IntRange(min=1), help="Print so many rows as they are sent.")
@options.option("--price-model", metavar="PROVIDER:NAME", help="Whose prices, for --strategy.")
@options.as_json
def estimate(
    sources: tuple[str, ...],
    output_tokens: int | None,
    cached_tokens: int,
    seconds_per_call: float,
    workers: int,
    price_model: str | None,
    show: int | None,
    **shared: Any,
) -> int:
    """Estimate items, tokens, cost and duration of INPUT under the given quota, without a call.

    Tokens are estimated as bytes / 3. While a batch runs, its first calls correct that.
    """
    request = CommandRequest(**shared)
    given = given_strategy(request)
    settings = settings_of(request)
    rows = rows_of(request, sources, given)
    strategy = rows.strategy
    system = len((request.system or "").encode()) // BYTES_PER_TOKEN
    per_answer = output_tokens or request.max_output_tokens or DEFAULT_OUTPUT_TOKENS
    shown: list[InputRow] = []
    size = measure(_kept(rows, shown, show or 1), system, per_answer, cached_tokens)
    if not size.items:
        first = shown[0].message if shown and isinstance(shown[0], BadRow) else "it has no rows"
        raise InputError(f"{rows.name}: none of its {size.bad_rows:,} rows can be used: {first}")
    if show:
        show_rows(to_stderr() if request.as_json else to_stdout(), shown)
    model = price_model or model_name(strategy)
    seconds, bound_by = duration_of(
        size, limits_of(request), workers * settings.slots, seconds_per_call
    )
    cost, without_cache = costs(size, model, settings)
    result = BatchEstimate(size, model, cost, without_cache, seconds, bound_by)
    if request.as_json:
        print_json(asdict(result))
    else:
        show_estimate(to_stdout(), result, rows.words)
    return exit_codes.OK


def measure(rows: Iterable[InputRow], system: int, per_answer: int, cached: int) -> Size:
    """Count items and tokens; `system` and `cached` tokens go with every item."""
    items = bad = tokens = written = 0
    for row in rows:
        if isinstance(row, BadRow):
            bad += 1
            continue
        items += 1
        tokens += input_tokens(row)
        written += row.strategy.params.get("max_output_tokens") or per_answer
    shared = system + cached
    return Size(items, bad, tokens + items * shared, written, items * cached)


def input_tokens(item: LLMWorkItem[Any, Any, Any]) -> int:
    """Estimated tokens of one prompt."""
    return tokens_of_prompt(item.prompt, "openai")


def duration_of(
    size: Size, limits: QuotaLimits, in_flight: int, seconds_per_call: float
) -> tuple[float, str]:
    """The duration in seconds and the limit that decides it: quota, slots or a single call."""
    total = size.input_tokens + size.output_tokens
    demand = {
        "requests_per_minute": size.items,
        "tokens_per_minute": total,
        "input_tokens_per_minute": size.input_tokens,
        "output_tokens_per_minute": size.output_tokens,
    }
    bounds = {"the time of one call": seconds_per_call if size.items else 0.0}
    finite = limits.finite()
    for name, limit in finite.items():
        if name in demand:
            bounds[name.replace("_", " ")] = demand[name] / limit * 60 + seconds_per_call
    at_once = min(in_flight, int(finite.get("max_concurrency", in_flight)))
    bounds[f"{count(at_once)} calls in flight"] = math.ceil(size.items / at_once) * seconds_per_call
    if per_day := finite.get("requests_per_day"):
        days = (max(size.items, 1) - 1) // per_day
        bounds["requests per day"] = days * 86_400.0
    bound_by = max(bounds, key=lambda name: bounds[name])
    return bounds[bound_by], bound_by


def costs(size: Size, model: str | None, settings: Settings) -> tuple[float | None, float | None]:
    """US dollars with the cache, and without it."""
    from batchllm_celery.execution.pricing import Prices

    prices = Prices(settings.prices_file)
    items = max(size.items, 1)
    # Prices depend on the size of one request, so one average request is priced.
    usage = TokenUsage(
        input_tokens=round(size.input_tokens / items),
        output_tokens=round(size.output_tokens / items),
        cached_input_tokens=round(size.cached_input_tokens / items),
    )
    cached = prices.cost(model, usage)
    uncached = prices.cost(model, usage.model_copy(update={"cached_input_tokens": 0}))
    return (
        None if cached is None else cached * size.items,
        None if uncached is None else uncached * size.items,
    )


def _kept(rows: Iterable[InputRow], shown: list[InputRow], count: int) -> Iterator[InputRow]:
    """The rows, of which the first ones are kept."""
    for row in rows:
        if len(shown) < count:
            shown.append(row)
        yield row


def show_rows(console: Console, rows: Iterable[InputRow]) -> None:
    """Print rows exactly as they will be sent."""
    for row in rows:
        if isinstance(row, BadRow):
            console.print(f"{row.item_id}  {row.message}", markup=False, highlight=False)
            continue
        text = Text.assemble((row.item_id, "bold"), "\n")
        params = row.strategy.params
        for name in sorted(params):
            value = params[name]
            text.append(f"{name}: ", style="dim")
            text.append(f"{value if isinstance(value, str) else json.dumps(value)}\n")
        text.append(f"{row.prompt}\n")
        console.print(text, soft_wrap=True, highlight=False)


def show_estimate(console: Console, result: BatchEstimate, words: str) -> None:
    """Print an estimate."""
    size = result.size
    table = Table.grid(padding=(0, 2))
    table.add_row("input", Text(words))
    bad = f" and {plural(size.bad_rows, 'bad row')}" if size.bad_rows else ""
    table.add_row("items", f"{count(size.items)}{bad}")
    cached = f" ({count(size.cached_input_tokens)} cached)" if size.cached_input_tokens else ""
    table.add_row(
        "tokens", f"{count(size.input_tokens)} in{cached}, {count(size.output_tokens)} out"
    )
    table.add_row("cost", _cost_words(result))
    table.add_row("duration", f"{duration(result.seconds)}, bound by {result.bound_by}")
    console.print(table, highlight=False)


def _cost_words(result: BatchEstimate) -> str:
    if result.cost is None:
        return f"no price is known for {result.model or 'this strategy'}"
    text = money(result.cost)
    if result.size.cached_input_tokens and result.cost_without_cache:
        saved = 1 - result.cost / result.cost_without_cache
        text += f" with the cache, {money(result.cost_without_cache)} without: {saved:.0%} saved"
    return text
