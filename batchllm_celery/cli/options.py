"""Options that several commands share; each reads `BATCHLLM_<ITS NAME>` from the environment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from batchllm_celery.files.out_formats import OUT_FORMATS
from batchllm_celery.files.readers import FORMATS

F = TypeVar("F", bound=Callable[..., Any])


def option(*names: str, **settings: Any) -> Callable[[F], F]:
    """`click.option` whose environment variable is named after the option, not the command:
    BATCHLLM_RPM, not BATCHLLM_RUN_RPM."""
    longest = max(names, key=len).split("/")[0].lstrip("-")
    settings.setdefault("envvar", "BATCHLLM_" + longest.replace("-", "_").upper())
    return click.option(*names, **settings)


def group(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in this order."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


class Number(click.FloatRange):
    """A number in a range; NaN and infinity are in none, though comparisons would let NaN pass."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class _OrUnlimited(click.ParamType[Any]):
    """A number, or the word `unlimited`, which stands for infinity."""

    def __init__(self, number: click.ParamType[Any]) -> None:
        self._number = number
        self.name = "number|unlimited"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.strip().lower() == "unlimited":
            return math.inf
        if value == math.inf:
            return value
        return self._number.convert(value, param, ctx)


_POSITIVE = Number(min=0, min_open=True)
_COUNT = click.IntRange(min=1)

connection = group(
    option("--redis-url", metavar="URL", help="Redis; default: an embedded Valkey."),
    option("--namespace", help="Prefix of all keys and queues of a fleet.  [default: batchllm]"),
    option(
        "--state-dir",
        type=click.Path(file_okay=False),
        help="Where the embedded Valkey keeps its data.",
    ),
)

_RATE_LIMIT, _COUNT_LIMIT = _OrUnlimited(_POSITIVE), _OrUnlimited(_COUNT)

limits = group(
    option("--rpm", type=_RATE_LIMIT, help="Requests a minute, for the whole fleet; or unlimited."),
    option("--tpm", type=_RATE_LIMIT, help="Tokens a minute, input + output; or unlimited."),
    option("--input-tpm", type=_RATE_LIMIT, help="Input tokens a minute; or unlimited."),
    option("--output-tpm", type=_RATE_LIMIT, help="Output tokens a minute; or unlimited."),
    option("--rpd", type=_COUNT_LIMIT, help="Requests a day; or unlimited."),
    option(
        "--max-concurrency",
        type=_COUNT_LIMIT,
        help="Calls in flight, of the whole fleet; or unlimited.",
    ),
)

after_429 = option(
    "--after-429",
    type=click.Choice(["adaptive", "slow-start"]),
    help="After a refusal: adapt the rate (default), or cool down and start slowly.",
)

adaptive_concurrency = option(
    "--adaptive-concurrency/--no-adaptive-concurrency",
    default=None,
    help="Find out how many calls in flight a server has room for, from its throughput.",
)

quota = group(
    limits,
    adaptive_concurrency,
    option("--quota", metavar="NAME", help="Runs of one name share it.  [default: PROVIDER:MODEL]"),
    option("--quota-update", is_flag=True, help="Change the limits of a quota that exists."),
    after_429,
)

rows = group(
    option("--prompt", metavar="TEMPLATE", help="As 'Summarise: {text}', with fields of the row."),
    option(
        "--format",
        type=click.Choice(FORMATS),
        default="auto",
        help="Format of the input; auto: by its name, then by its first bytes.",
    ),
    option("--limit", type=click.IntRange(min=1), help="Only the first so many rows."),
    option("--sample", type=click.IntRange(min=1), help="Only so many rows, chosen at random."),
    option("--sample-seed", type=int, default=0, help="Another one chooses other rows."),
    option("--id-column", metavar="FIELD", help="Holds the row's id.  [default: item_id]"),
    option("--text-column", metavar="FIELD", help="Is the prompt, as it stands."),
    option("--delimiter", metavar="CHAR", help="Of CSV; default: found by the first lines."),
    option("--encoding", metavar="NAME", help="Of text, as cp1252.  [default: UTF-8]"),
    option(
        "--files-root",
        metavar="FOLDER",
        type=click.Path(file_okay=False),
        help="Where files that rows name must lie.  [default: the folder of INPUT]",
    ),
    option(
        "--override",
        metavar="NAME,...",
        help="Options that beat what rows in a provider's format say (model,system,...).",
    ),
    option(
        "--allow-dropping",
        metavar="NAME,...",
        help="Parameters of rows that may be left out where the provider has no word for them.",
    ),
    option("--max-models", type=_COUNT, help="Models that rows may name.  [default: 32]"),
)

inputs = click.argument("sources", metavar="INPUT", nargs=-1, required=True)

model = group(
    option(
        "--model",
        metavar="PROVIDER:NAME",
        help="gemini:gemini-2.5-flash, openai:gpt-5-mini, or simulated.",
    ),
    option(
        "--strategy", metavar="NAME", help="A strategy that --app registers, instead of --model."
    ),
    option("--params", metavar="JSON", help="Parameters of the strategy."),
    option("--app", metavar="MODULE", help="Module(s) that register strategies."),
    option("--system", metavar="TEXT", help="System instruction."),
    option(
        "--schema",
        metavar="FILE.json",
        type=click.Path(),
        help="JSON Schema that every answer must meet.",
    ),
    option("--temperature", type=Number(min=0)),
    option("--max-output-tokens", type=_COUNT, help="Length at which an answer is cut."),
)

base_url = option(
    "--base-url",
    metavar="URL",
    envvar=["BATCHLLM_BASE_URL", "BATCHLLM_OPENAI_BASE_URL"],
    help="An OpenAI-compatible server, for --model openai:NAME.",
)

bounds = group(
    option("--max-attempts", type=_COUNT, help="Calls for one item at most.  [default: 3]"),
    option("--attempt-timeout", type=_POSITIVE, help="Seconds for one call.  [default: 120]"),
    option(
        "--item-timeout", type=_POSITIVE, help="Seconds for one item, retries and waits included."
    ),
    option("--deadline", type=_POSITIVE, help="Seconds from now after which no call starts."),
    option("--max-cost", type=_POSITIVE, metavar="USD", help="No call starts once it is spent."),
    option(
        "--price",
        multiple=True,
        metavar="[MODEL=]IN,OUT",
        help="US dollars per million tokens of a model without a known price.",
    ),
    option("--token-budget", type=_COUNT, help="No call starts once these tokens are spent."),
    option(
        "--fail-fast",
        metavar="KIND,...",
        help="Failure kinds that end the batch (authentication,billing,...).",
    ),
)

batch = group(
    option(
        "--batch-id",
        metavar="ID",
        help="An id that exists resumes its batch; finished items are not run again.",
    ),
    option(
        "--rerun",
        type=click.Choice(["changed", "failed", "all", "none"]),
        multiple=True,
        help="Of a batch that goes on: rows to pay for again; none keeps changed rows' answers.",
    ),
    option("--retry-failed", is_flag=True, help="Run failed rows again: --rerun failed."),
    option("--items-per-task", type=click.IntRange(1, 1000), help="Items in one Celery message."),
    option("--queue", metavar="NAME", help="Queue of the fleet that runs it."),
    option("--priority", type=click.IntRange(0, 9), help="0 (usual) to 9 (urgent)."),
    option(
        "--strict", is_flag=True, help="Check every row first; stop before any call if one is bad."
    ),
    option("--dry-run", is_flag=True, help="Do everything except calls to the provider."),
)

columns = option(
    "--columns", metavar="A,B,...", help="Columns of the table, in this order.  [default: all]"
)

out = group(
    option(
        "-o",
        "--out",
        metavar="OUT",
        help="Result file: .jsonl, .csv, .parquet, also .gz; - for standard output.",
    ),
    option(
        "--out-format",
        type=click.Choice(OUT_FORMATS),
        help="Write OUT once more, as the provider's batch API does.",
    ),
    option("--keep-raw", is_flag=True, help="Keep the provider's whole reply with each result."),
    option("--ordered", is_flag=True, help="Results in the order of the input."),
    option("--overwrite", is_flag=True, help="Replace an OUT that holds other data."),
)

as_json = option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
quiet = option("--quiet", "-q", is_flag=True, help="No progress, no summary.")
verbose = option("--verbose", "-v", is_flag=True, help="Log internal events too.")
