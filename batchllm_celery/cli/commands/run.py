"""`batchllm run`: the whole job in one command."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from batchllm_celery.cli import exit_codes, options, validation_message
from batchllm_celery.cli.batch_follower import BatchFollower, End, RedisWatch
from batchllm_celery.cli.display.console import log_to, print_json, say, to_stderr, to_stdout
from batchllm_celery.cli.display.progress import open_display
from batchllm_celery.cli.display.summary import Summary, exit_code, print_summary
from batchllm_celery.cli.going_on import begin
from batchllm_celery.cli.processes import Fleet, SimulatedProviderProcess, environment_of
from batchllm_celery.cli.request import (
    CommandRequest,
    check_key,
    check_price,
    check_strategy,
    columns_of,
    default_quota_name,
    each_model,
    given_strategy,
    open_rows,
    quota_of,
    rerun_words,
    resume_command,
    settings_of,
    spec_of,
)
from batchllm_celery.cli.signals import Interrupts
from batchllm_celery.errors import InputError, UsageError
from batchllm_celery.events import Events
from batchllm_celery.files.out_formats import write_out_format
from batchllm_celery.files.readers import STDIN
from batchllm_celery.files.result_file import (
    OutputError,
    Sink,
    check_out,
    open_sink,
    refusal,
    refuse_real_results,
)
from batchllm_celery.files.rows import Rows
from batchllm_celery.files.tables import read_results, table_suffix, write_table
from batchllm_celery.models import BatchProgress, BatchSpec, BatchState, Quota
from batchllm_celery.observability.switched_on import openers
from batchllm_celery.settings import Settings, absolute

if TYPE_CHECKING:
    from batchllm_celery.producer.plan import Rerun

#: Worker processes where the command line names no number.
MOST_WORKERS = 2


@dataclass(frozen=True, slots=True)
class CheckedRun:
    """What `run` will do: its options, checked."""

    request: CommandRequest
    settings: Settings
    spec: BatchSpec
    quota: Quota | None
    rows: Rows
    out: str
    workers: int | None
    """None: as many as the rows need, `MOST_WORKERS` at most."""
    simulation: str | None
    rerun: frozenset[Rerun]
    table: str | None = None
    """The table that is written from OUT at the end."""


@click.command()
@options.inputs
@options.model
@options.base_url
@options.rows
@options.quota
@options.option("--workers", type=click.IntRange(min=0),
                help="Worker processes; 0: use the workers of a running fleet.  "
                     "[default: 2, or 1 that has a slot for each row]")  # fmt: skip
@options.option("--slots", type=click.IntRange(min=1), help="Items in flight per worker.")
@options.option("--simulation", metavar="JSON",
                help="Settings of the simulated provider, as for `simulate`.")  # fmt: skip
@options.batch
@options.bounds
@options.out
@options.columns
@options.connection
@options.quiet
@options.as_json
@options.verbose
def run(
    sources: tuple[str, ...], workers: int | None, simulation: str | None, **shared: Any
) -> int:
    """Answer every row of INPUT, write the results and print a summary.

    INPUT is JSONL, a JSON array, CSV, plain text (a prompt a line), Parquet, Excel, an OpenAI batch
    file, each also as .gz or .zst, a folder (one item a file), several of them, or - for standard
    input. The results go to INPUT.results.jsonl unless -o says otherwise.

    Exit code: 0 all succeeded, 1 some failed, 2 bad usage or input, 3 stopped early,
    130 interrupted.
    """
    request = CommandRequest(**shared)
    console = to_stderr()
    log_to(console, verbose=request.verbose)
    started = time.monotonic()
    with contextlib.ExitStack() as stack, Interrupts().counted() as interrupts:
        checked = _check(sources, request, workers, simulation, stack)
        end, logs, total_time = _run(checked, console, interrupts, stack, started)
        summary = _summary(checked, end, total_time, logs)
    written = _write_out_format(checked, end)
    _report(summary, end, request)
    for path in written if not request.quiet else ():
        say(f"Written: {path}")
    return summary.exit_code


def _write_out_format(checked: CheckedRun, end: End) -> list[Path]:
    """The results once more in the format of `--out-format`."""
    out_format = checked.request.out_format
    if out_format is None or isinstance(end.failure, OutputError):
        return []
    return write_out_format(checked.out, out_format, checked.spec.batch_id)


# -- before anything is enqueued


def _check(
    sources: tuple[str, ...],
    request: CommandRequest,
    workers: int | None,
    simulation: str | None,
    stack: contextlib.ExitStack,
) -> CheckedRun:
    from batchllm_celery.producer.plan import Rerun

    settings = settings_of(request)
    given = given_strategy(request)
    source = sources[0]
    if len(sources) > 1 and request.out is None:
        raise UsageError("several inputs: say where the results go with -o OUT.jsonl")
    out = request.out or default_out(source, dry_run=request.dry_run)
    for one in sources:
        _refuse_same_file(one, out)
    table = out if out != "-" and table_suffix(out) is not None else None
    if request.columns and table is None:
        raise UsageError("--columns are those of a table: -o x.csv or -o x.parquet")
    if table is not None:
        out = f"{table}.jsonl"  # the table is written from it
        if Path(table).exists() and not Path(out).exists() and not _overwrites(request):
            raise OutputError(refusal(Path(table), None, request.batch_id or "this one"))
    rows = open_rows(request, sources, given, stack)
    strategy = rows.strategy
    if request.out_format is not None and out == "-":
        raise UsageError("--out-format writes files beside OUT: name OUT with -o")
    instance = check_strategy(strategy, settings)
    if not request.dry_run and workers != 0:
        check_key(strategy, settings)
    if workers != 0:
        openers(settings)  # a missing extra is one error here, instead of one of each worker
    queue = "default" if workers == 0 else None
    spec = spec_of(
        request, strategy, source=source, queue=queue, keep_results=False,
        own_models=rows.native.own_models and bool(rows.native.models),
    )  # fmt: skip
    check_price(spec, instance, settings)
    if request.dry_run:
        refuse_real_results(out)
    check_out(out, spec.batch_id, overwrite=_overwrites(request))
    settings = settings.model_copy(update={"queue": spec.queue})
    quota = quota_of(request, default_quota_name(strategy))
    rerun = frozenset(Rerun(word) for word in rerun_words(request))
    return CheckedRun(request, settings, spec, quota, rows, out, workers, simulation, rerun, table)


def default_out(source: str, *, dry_run: bool = False) -> str:
    """INPUT.results.jsonl beside the input; INPUT.dry-run.jsonl for a dry run."""
    name = "dry-run" if dry_run else "results"
    return f"{'stdin' if source == STDIN else source.rstrip('/')}.{name}.jsonl"


def _overwrites(request: CommandRequest) -> bool:
    """A dry run replaces the file of an earlier dry run."""
    return bool(request.overwrite or request.dry_run)


def _refuse_same_file(source: str, out: str) -> None:
    with contextlib.suppress(OSError):
        if out != "-" and source != STDIN and Path(out).samefile(source):
            raise UsageError(f"-o {out} is the input itself; choose another file")


# -- the run itself


def _run(
    checked: CheckedRun,
    console: Console,
    interrupts: Interrupts,
    stack: contextlib.ExitStack,
    started: float,
) -> tuple[End, str | None, float]:
    request = checked.request
    provider = _start_simulation(checked, stack)  # first: it starts while we look for Redis
    from batchllm_celery.producer import Producer

    redis = RedisWatch()
    producer = Producer(checked.settings, events=Events(redis))
    stack.callback(_close_in_time, producer.close, interrupts)
    producer.check()
    settings = _settings_of_workers(checked, provider)
    sink = open_sink(
        checked.out, checked.spec.batch_id, overwrite=_overwrites(request), ordered=request.ordered
    )
    try:
        beginning = begin(producer, checked.spec, checked.rows, sink, checked.rerun)
        batch = producer.open(
            beginning.spec,
            quota=checked.quota,
            quota_update=request.quota_update,
            renew=beginning.renew,
        )
        each_model(producer, checked.spec, checked.request, checked.rows, checked.settings)
        batch.consume()
    except BaseException:
        sink.abandon()
        raise
    logs = _new_log_folder(settings.state_dir, batch.id)
    workers = MOST_WORKERS if checked.workers is None else checked.workers
    fleet = Fleet(workers, lambda _: environment_of(settings), log_dir=logs)
    stack.callback(fleet.kill)
    display = open_display(console, quiet=request.quiet)
    display.say(f"Batch {batch.id}" + (", resumed" if batch.resumed else ""))
    for words in (f"Reading {checked.rows.words}", *beginning.words):
        display.say(words)
    follower = BatchFollower(
        producer, batch, checked.rows, sink, fleet, display, feed=beginning.feed(checked.rows),
        interrupts=interrupts, redis=redis, drain_seconds=settings.drain_seconds,
        rows_per_worker=settings.slots if checked.workers is None else None,
        check=provider.check if provider is not None else None,
    )  # fmt: skip
    try:
        end = follower.follow()
        took = time.monotonic() - started
        _finish(sink, end)
    finally:
        display.close()
    if checked.table is not None and end.failure is None and not end.interrupted:
        write_table(read_results(checked.out), checked.table, columns_of(request))
    fleet.drain()
    fleet.wait(timeout=min(5.0, settings.drain_seconds))
    return end, _kept_logs(logs, fleet, end), took


def _start_simulation(
    checked: CheckedRun, stack: contextlib.ExitStack
) -> SimulatedProviderProcess | None:
    """The provider of `--model simulated`, unless the settings name one that runs already."""
    strategy, settings = checked.spec.strategy, checked.settings
    if strategy.name != "simulated" or settings.simulated_url is not None:
        return None
    if checked.workers == 0 or checked.request.dry_run:
        return None
    from batchllm_celery.simulation.config import SimulationConfig

    try:
        config = SimulationConfig.model_validate_json(checked.simulation or '{"latency": 0.2}')
    except ValueError as error:
        raise UsageError(f"--simulation: {validation_message(error)}") from None
    provider = SimulatedProviderProcess(config.model_dump_json())
    stack.callback(provider.close)
    return provider


def _settings_of_workers(
    checked: CheckedRun, provider: SimulatedProviderProcess | None
) -> Settings:
    changes: dict[str, Any] = {}
    if checked.workers != 0 and "unrunnable_after" not in checked.settings.model_fields_set:
        # These workers are all alike: what one of them can't run, none can.
        changes["unrunnable_after"] = 0.0
    if provider is not None:
        changes["simulated_url"] = provider.wait_for_url()
    return checked.settings.model_copy(update=changes)


def _finish(sink: Sink, end: End) -> None:
    try:
        sink.finish(complete=end.progress.is_over)
    except OutputError:
        if end.failure is None:
            raise


def _new_log_folder(state_dir: Path, batch_id: str) -> Path:
    """Make a new folder, so that removing it removes only our logs."""
    parent = absolute(state_dir) / "logs"
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{batch_id}-", dir=parent))
    except OSError as error:
        raise UsageError(f"no logs can be kept in {parent}: {error.strerror}") from error


def _kept_logs(logs: Path, fleet: Fleet, end: End) -> str | None:
    """Keep and name the logs if a worker died or the run failed; else remove them."""
    if fleet.deaths or end.failure is not None:
        return str(logs) if logs.exists() else None
    shutil.rmtree(logs, ignore_errors=True)
    return None


def _close_in_time(close: Any, interrupts: Interrupts) -> None:
    """Close within 5 s though Redis can't be reached; within 1 s after a second Ctrl-C."""
    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    until = time.monotonic() + 5.0
    while closing.is_alive() and time.monotonic() < until - 4.0 * (interrupts.count >= 2):
        closing.join(timeout=0.1)


# -- afterwards


def _summary(checked: CheckedRun, end: End, seconds: float, logs: str | None) -> Summary:
    progress, code = end.progress, _code(end)
    resumable = code in (exit_codes.INTERRUPTED, exit_codes.STOPPED) or end.failure is not None
    return Summary(
        batch_id=checked.spec.batch_id,
        state=str(progress.state),
        exit_code=code,
        total=progress.total,
        succeeded=progress.succeeded,
        failed=progress.failed,
        answered_now=end.answered_now,
        errors=end.failures.counts,
        input_tokens=progress.input_tokens,
        output_tokens=progress.output_tokens,
        cached_input_tokens=progress.cached_input_tokens,
        cost=progress.cost,
        maybe_billed=progress.maybe_billed,
        seconds=round(seconds, 3),
        output=None if checked.out == "-" else _written(checked, end),
        resume=resume_command(checked.spec.batch_id, sys.argv[1:]) if resumable else None,
        retry=_retry(checked, progress) if progress.is_over else None,
        logs=logs,
        dry_run=checked.spec.config.dry_run,
        resume_needs=_needs(checked.spec, progress) if resumable else None,
    )


def _written(checked: CheckedRun, end: End) -> str:
    if checked.table is None or end.failure is not None or end.interrupted:
        return checked.out
    return checked.table


def _retry(checked: CheckedRun, progress: BatchProgress) -> str | None:
    """The command that runs failed rows again."""
    if not progress.failed or progress.state.stopped or checked.spec.config.dry_run:
        return None
    return resume_command(checked.spec.batch_id, sys.argv[1:]) + " --retry-failed"


def _needs(spec: BatchSpec, progress: BatchProgress) -> str | None:
    """The options that must change before the batch is resumed, or None."""
    if progress.state is not BatchState.BUDGET:
        return None
    tokens, cost = progress.input_tokens + progress.output_tokens, progress.cost or 0.0
    needs = []
    if spec.max_cost is not None and cost >= spec.max_cost:
        needs.append(f"--max-cost above {cost:.6g}")
    if spec.token_budget is not None and tokens >= spec.token_budget:
        needs.append(f"--token-budget above {tokens}")
    return " and ".join(needs) or "a larger --max-cost or --token-budget"


def _code(end: End) -> int:
    if end.interrupted:
        return exit_codes.INTERRUPTED
    if isinstance(end.failure, InputError):
        return exit_codes.USAGE
    return exit_codes.STOPPED if end.failure is not None else exit_code(end.progress)


def _report(summary: Summary, end: End, request: CommandRequest) -> None:
    if isinstance(end.failure, BrokenPipeError):
        raise end.failure  # whoever read the results has had enough
    if end.failure is not None:
        text = " ".join(str(end.failure).split()) or type(end.failure).__name__
        say(f"Error: {text}")
    if request.as_json:
        print_json(summary.to_json())
    if request.quiet and not summary.resume:
        return
    if not request.as_json or summary.resume:
        on_stdout = not request.as_json and not request.quiet and request.out != "-"
        console = to_stdout() if on_stdout else to_stderr()
        print_summary(console, summary, end.failures.examples)
