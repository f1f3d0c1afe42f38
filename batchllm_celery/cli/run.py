"""`batchllm run`: the whole job in one command."""

from __future__ import annotations

import contextlib
import shlex
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

from batchllm_celery.cli import exit_codes, job, options
from batchllm_celery.cli.console import log_to, print_json, say, to_stderr, to_stdout
from batchllm_celery.cli.fleet import Fleet, SimulatedProviderProcess, environment_of
from batchllm_celery.cli.inputs import STDIN, Rows, check_all, spooled
from batchllm_celery.cli.outfile import (
    OutputError,
    ResultFile,
    Sink,
    check_out,
    open_sink,
    refuse_real_results,
)
from batchllm_celery.cli.progress_display import open_display
from batchllm_celery.cli.session import End, Interrupts, RedisWatch, Session
from batchllm_celery.cli.summary import Summary, exit_code, print_summary
from batchllm_celery.errors import InputError, UsageError
from batchllm_celery.events import Events
from batchllm_celery.models import BatchProgress, BatchSpec, BatchState, Quota, StrategySpec
from batchllm_celery.observability.switched_on import openers
from batchllm_celery.redaction import safe_url, without_secrets
from batchllm_celery.settings import Settings

if TYPE_CHECKING:
    from batchllm_celery.producer import Batch

DEFAULT_WORKERS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request."""

    settings: Settings
    spec: BatchSpec
    quota: Quota | None
    quota_update: bool
    rows: Rows
    out: str
    workers: int


@click.command()
@click.argument("source", metavar="INPUT")
@options.model
@options.base_url
@options.rows
@options.quota
@options.option("--workers", type=click.IntRange(min=0), default=DEFAULT_WORKERS, show_default=True,
                help="Worker processes; 0: those of a fleet that is there.")  # fmt: skip
@options.option("--slots", type=click.IntRange(min=1), help="Items in flight per worker.")
@options.option("--simulation", metavar="JSON",
                help="Settings of the simulated provider, as for `simulate`.")  # fmt: skip
@options.batch
@options.bounds
@options.out
@options.connection
@options.quiet
@options.as_json
@options.verbose
def run(source: str, **chosen: Any) -> int:
    """Answer every row of INPUT: submit, work, follow, write the results, print a summary.

    INPUT is JSONL, CSV, plain text (a prompt a line), Parquet, an OpenAI batch file, or - for
    standard input. The results go to INPUT.results.jsonl unless -o says otherwise.

    Exit code: 0 all succeeded, 1 some failed, 2 bad usage or input, 3 stopped early,
    130 interrupted.
    """
    console = to_stderr()
    log_to(console, verbose=chosen["verbose"])
    started = time.monotonic()
    with contextlib.ExitStack() as stack, Interrupts().counted() as interrupts:
        plan = _plan(source, chosen, stack)
        end, logs, total_time = _run(plan, chosen, console, interrupts, stack, started)
        summary = _summary(plan, end, total_time, logs)
    _report(summary, end, chosen)
    return summary.exit_code


# -- before anything is enqueued


def _plan(source: str, chosen: dict[str, Any], stack: contextlib.ExitStack) -> Plan:
    settings = job.settings_of(chosen)
    strategy = job.strategy_of(chosen)
    out = chosen["out"] or default_out(source, dry_run=chosen["dry_run"])
    _refuse_same_file(source, out)
    rows = open_rows(source, chosen, strategy, stack)
    instance = job.check_strategy(strategy, settings)
    if not chosen["dry_run"] and chosen["workers"]:
        job.check_key(strategy, settings)
    if chosen["workers"]:
        openers(settings)  # an extra that is missing ends the command, not each worker
    lane = None if chosen["workers"] else "default"
    spec = job.spec_of(chosen, strategy, source=source, queue=lane, keep_results=False)
    job.check_price(spec, instance, settings)
    if chosen["dry_run"]:
        refuse_real_results(out)
    check_out(out, spec.batch_id, overwrite=_overwrites(chosen))
    settings = settings.model_copy(update={"queue": spec.queue})
    quota = job.quota_of(chosen, job.default_quota_name(strategy))
    return Plan(settings, spec, quota, chosen["quota_update"], rows, out, chosen["workers"])


def open_rows(
    source: str, chosen: dict[str, Any], strategy: StrategySpec, stack: contextlib.ExitStack
) -> Rows:
    """The input. `--strict` reads it all first, standard input by way of a file."""
    if not chosen["strict"]:
        return _closed_at_the_end(job.rows_of(chosen, source, strategy), stack)
    path = spooled(source)
    if path != source:
        stack.callback(Path(path).unlink, missing_ok=True)
    check_all(job.rows_of(chosen, path, strategy))
    return _closed_at_the_end(job.rows_of(chosen, path, strategy), stack)


def _closed_at_the_end(rows: Rows, stack: contextlib.ExitStack) -> Rows:
    stack.callback(rows.close)
    return rows


def default_out(source: str, *, dry_run: bool = False) -> str:
    """INPUT.results.jsonl, beside the input; INPUT.dry-run.jsonl of a dry run."""
    name = "dry-run" if dry_run else "results"
    return f"{'stdin' if source == STDIN else source}.{name}.jsonl"


def _overwrites(chosen: dict[str, Any]) -> bool:
    """A dry run replaces what an earlier one wrote."""
    return bool(chosen["overwrite"] or chosen["dry_run"])


def _refuse_same_file(source: str, out: str) -> None:
    with contextlib.suppress(OSError):
        if out != "-" and source != STDIN and Path(out).samefile(source):
            raise UsageError(f"-o {out} is the input itself; choose another file")


# -- the run itself


def _run(
    plan: Plan,
    chosen: dict[str, Any],
    console: Console,
    interrupts: Interrupts,
    stack: contextlib.ExitStack,
    started: float,
) -> tuple[End, str | None, float]:
    from batchllm_celery.producer import Producer

    redis = RedisWatch()
    producer = Producer(plan.settings, events=Events(redis))
    stack.callback(_in_time, producer.close, interrupts)
    producer.check()
    settings, provider = _with_simulation(plan, chosen, stack)
    sink = open_sink(
        plan.out, plan.spec.batch_id, overwrite=_overwrites(chosen), ordered=chosen["ordered"]
    )
    try:
        batch = producer.open(plan.spec, quota=plan.quota, quota_update=plan.quota_update)
        batch.consume()
        _refuse_lost_results(batch, sink, plan.out)
    except BaseException:
        sink.abandon()
        raise
    logs = _new_log_folder(settings.state_dir, batch.id)
    fleet = Fleet(plan.workers, lambda _: environment_of(settings), log_dir=logs)
    stack.callback(fleet.kill)
    display = open_display(console, quiet=chosen["quiet"])
    display.say(f"Batch {batch.id}" + (", going on where it was" if batch.resumed else ""))
    session = Session(
        producer, batch, plan.rows, sink, fleet, display,
        interrupts=interrupts, redis=redis, drain_seconds=settings.drain_seconds,
        check=provider.check if provider is not None else None,
    )  # fmt: skip
    try:
        end = session.follow()
        took = time.monotonic() - started
        _finish(sink, end)
    finally:
        display.close()
    fleet.drain()
    fleet.wait(timeout=min(5.0, settings.drain_seconds))
    return end, _kept_logs(logs, fleet, end), took


def _with_simulation(
    plan: Plan, chosen: dict[str, Any], stack: contextlib.ExitStack
) -> tuple[Settings, SimulatedProviderProcess | None]:
    """Settings for the workers; for `--model simulated` with a provider of our own and its URL."""
    settings = plan.settings
    if plan.workers and "unrunnable_after" not in settings.model_fields_set:
        # Its workers are all of one kind: what one of them can't run, none can.
        settings = settings.model_copy(update={"unrunnable_after": 0.0})
    needs_one = plan.spec.strategy.name == "simulated" and settings.simulated_url is None
    if not needs_one or not plan.workers or chosen["dry_run"]:
        return settings, None
    from batchllm_celery.simulation.config import SimulationConfig

    config = SimulationConfig.model_validate_json(chosen["simulation"] or '{"latency": 0.2}')
    provider = SimulatedProviderProcess(config.model_dump_json())
    stack.callback(provider.close)
    return settings.model_copy(update={"simulated_url": provider.url}), provider


def _refuse_lost_results(batch: Batch, sink: Sink, out: str) -> None:
    """Answers written to another file are not in Redis any more, and are not paid again."""
    progress = batch.progress()
    if not isinstance(sink, ResultFile) or progress.unread is None:
        return
    lost = progress.finished - len(sink.written) - progress.unread
    if batch.resumed and lost > 0:
        raise OutputError(
            f"{lost:,} results of batch {batch.id} were written to another file than {out}; "
            "name that file with -o, or start anew with another --batch-id"
        )


def _finish(sink: Sink, end: End) -> None:
    try:
        sink.finish(complete=end.progress.is_over)
    except OutputError:
        if end.failure is None:
            raise


def _new_log_folder(state_dir: Path, batch_id: str) -> Path:
    """A folder that nobody else has, so that removing it removes nothing of anybody else's."""
    parent = state_dir.expanduser().absolute() / "logs"
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{batch_id}-", dir=parent))
    except OSError as error:
        raise UsageError(f"no logs can be kept in {parent}: {error.strerror}") from error


def _kept_logs(logs: Path, fleet: Fleet, end: End) -> str | None:
    """The workers' logs are worth keeping, and naming, when a worker died."""
    if fleet.deaths or end.failure is not None:
        return str(logs) if logs.exists() else None
    shutil.rmtree(logs, ignore_errors=True)
    return None


def _in_time(close: Any, interrupts: Interrupts) -> None:
    """Close, but let no dead Redis and no impatient person wait for it."""
    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    until = time.monotonic() + 5.0
    while closing.is_alive() and time.monotonic() < until - 4.0 * (interrupts.count >= 2):
        closing.join(timeout=0.1)


# -- afterwards


def _summary(plan: Plan, end: End, seconds: float, logs: str | None) -> Summary:
    progress, code = end.progress, _code(end)
    resumable = code in (exit_codes.INTERRUPTED, exit_codes.STOPPED) or end.failure is not None
    return Summary(
        batch_id=plan.spec.batch_id,
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
        output=None if plan.out == "-" else plan.out,
        resume=resume_command(plan.spec.batch_id, sys.argv[1:]) if resumable else None,
        logs=logs,
        dry_run=plan.spec.config.dry_run,
        resume_needs=_needs(plan.spec, progress) if resumable else None,
    )


def _needs(spec: BatchSpec, progress: BatchProgress) -> str | None:
    """What must change, or the resumed batch stops again at once; None for nothing."""
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


def resume_command(batch_id: str, arguments: list[str]) -> str:
    """The command that was typed, with the batch's id and without the passwords of its URLs."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--batch-id":
            skip = True
        elif argument != "--overwrite" and not argument.startswith("--batch-id="):
            kept.append(_without_password(argument))
    return shlex.join(["batchllm", *kept, "--batch-id", batch_id])


def _without_password(argument: str) -> str:
    option, equals, value = argument.partition("=")
    if not option.startswith("--"):
        option, equals, value = "", "", argument
    return option + equals + without_secrets(safe_url(value) if "://" in value else value)


def _report(summary: Summary, end: End, chosen: dict[str, Any]) -> None:
    if end.failure is not None:
        text = " ".join(str(end.failure).split()) or type(end.failure).__name__
        say(f"Error: {text}")
    if chosen["as_json"]:
        print_json(summary.to_json())
    if chosen["quiet"] and not summary.resume:
        return
    if not chosen["as_json"] or summary.resume:
        on_stdout = not chosen["as_json"] and not chosen["quiet"] and chosen["out"] != "-"
        console = to_stdout() if on_stdout else to_stderr()
        print_summary(console, summary, end.failures.examples)
